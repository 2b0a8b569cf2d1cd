"""A quantized checkpoint read as if it were a plain model: its tensors are the weights that the kernel multiplies with.

Each module's integers become (q - z) s, exact in float32, when they are asked for and not before; whoever reads a block
holds a block. What the checkpoint keeps in 16 bit comes as it is stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantize.errors import ModelError, SchemeError
from quantize.formats import narrow, unpack
from quantize.layout import parse
from quantize.packing import WORD
from quantize.scheme import Quantized, Scheme, dequantize
from quantize.weights import ModelDir, open_model


@dataclass(frozen=True)
class Dequantized(ModelDir):
    """A checkpoint whose `files` has <module>.weight in the place of a quantized module's parts.

    packed: the checkpoint as it is stored; format: of `layout.Layout`; modules: the quantized ones, each with its
    scheme and the names of its parts.
    """

    packed: ModelDir
    format: str
    modules: Mapping[str, tuple[Scheme, tuple[str, ...]]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As `ModelDir.read`; a quantized module's weight as float32 [out, in]."""
        wanted: list[str] = []
        quantized = []
        for name in names:
            if (module := name.removesuffix(".weight")) in self.modules:
                quantized.append(module)
                wanted += [f"{module}.{part}" for part in self.modules[module][1]]
            else:
                wanted.append(name)
        tensors = self.packed.read(wanted)
        for module in quantized:
            stored = {kind: tensors.pop(f"{module}.{kind}") for kind in self.modules[module][1]}
            tensors[f"{module}.weight"] = self._weight(module, stored)
        return tensors

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """As `ModelDir.rows`; of a quantized module those from the first to the last are dequantized for it."""
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return super().rows(name, indices)
        scheme, kinds = self.modules[module]
        stored = self.packed.read(f"{module}.{kind}" for kind in kinds)
        start, end = int(indices.min()) // WORD * WORD, (int(indices.max()) // WORD + 1) * WORD  # of whole words
        parts = narrow({kind: stored[f"{module}.{kind}"] for kind in kinds}, scheme, start, end)
        return self._weight(module, parts)[indices - start]

    def _weight(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Of a module or of some of its rows, float32 [out, in]."""
        try:
            return dequantize(unpack(parts, self.format, self.modules[module][0]))
        except SchemeError as error:
            raise ModelError(f"{self.path}, {module}: {error.given}", error.allowed, error.remedy) from error

    def integers(self, module: str) -> Quantized:
        """A quantized module as it is stored."""
        scheme, kinds = self.modules[module]
        stored = self.packed.read(f"{module}.{kind}" for kind in kinds)
        return unpack({kind: stored[f"{module}.{kind}"] for kind in kinds}, self.format, scheme)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of the module of that name; None where it is kept in 16 bit."""
        found = self.modules.get(module)
        return found[0] if found else None


def open_dequantized(path: Path) -> Dequantized:
    """Open a checkpoint in any layout that `layout.parse` reads, reading no weights.

    Raises ModelError as `open_model` does and where nothing is quantized, SchemeError for a layout not read here.
    """
    packed = open_model(path)
    if "quantization_config" not in packed.config:
        raise ModelError(f"{path}, which has no quantization_config", "a quantized checkpoint", "Quantize it first")
    layout = parse(packed.config["quantization_config"])
    modules = layout.modules(packed.files)
    parts = {f"{module}.{part}": module for module, (_, kinds) in modules.items() for part in kinds}
    files = {f"{parts[name]}.weight" if name in parts else name: file for name, file in packed.files.items()}
    return Dequantized(packed.path, packed.config, files, packed, layout.format, modules)
