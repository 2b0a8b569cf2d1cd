"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""What a file's name ends in until it is complete."""


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write UTF-8 text under another name, make it durable, give it its own. Raises OSError and then leaves nothing."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
