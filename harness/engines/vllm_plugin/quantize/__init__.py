"""Our package `quantize`, as vLLM's processes see it (the folder above stands on their PYTHONPATH): its real files.

Not a door of the plugin alone: vLLM sends its configuration, of which our class is a part, to processes that it spawns,
and they import what it names before they load any plugin. The real folder's parent cannot stand on the path, because in
an installed kneebench it is site-packages, and vLLM would find our versions of its own dependencies there.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[4] / "quantize")]
