"""What a model is made of, without its weights: the tensors that config.json implies, and those that the files declare.

    config.json ─► transformers' own modules on the meta device ─► names and shapes, exact for whatever it knows
    *.safetensors ─► 8 bytes of length, a JSON header of that length ─► names, types, shapes, bytes

The first says what a checkpoint must hold and what a shape without weights would weigh; the second costs milliseconds
whatever the size of the file. Building the modules costs the import of transformers, some seconds; a formula of our own
for each architecture would be quicker, and wrong without a word where one of them differs.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.blocks import heads_of
from quantize.errors import ModelError

_LARGEST_HEADER = 100 * 2**20
"""Bytes. A length beyond this, which is safetensors' own limit, is no header's."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header declares it: `dtype` in its words (BF16, F16, I32 ...). start: of its bytes in
    the file, 0 where there is none."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Implied:
    """What a config.json implies. `tensors`: shapes by name; where the output head is `tied`, it is not among them.

    kv_bytes: of one token in a 16-bit cache, 2 (K and V) x layers x key-value heads x head size x 2 bytes. Every layer
    is counted as one of full attention, so for a model with sliding windows it is an upper bound.
    """

    tensors: Mapping[str, tuple[int, ...]]
    tied: bool
    kv_bytes: int


def implied(config: Mapping[str, Any]) -> Implied:
    """What `config`, a config.json, implies. Raises ModelError where transformers does not know it or refuses it."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    build: Any = AutoModelForCausalLM.from_config
    try:
        known = AutoConfig.for_model(str(config.get("model_type")), **fields)
        with torch.device("meta"):
            model = build(known, dtype=torch.bfloat16)
        heads, layers = heads_of(known), int(known.num_hidden_layers)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"a config.json of type {config.get('model_type')!r} ({error})",
            "the configuration of a decoder that transformers knows",
            "Correct it, or fetch it again",
        ) from error
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a shared one once
    return Implied(tensors, bool(known.tie_word_embeddings), 2 * layers * heads.key_value * heads.size * 2)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header alone. Raises ModelError for a file that is not whole."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            size = file.stat().st_size
            if length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, tensor in header.items():
            shape, (begin, end) = tuple(map(int, tensor["shape"])), map(int, tensor["data_offsets"])
            found[name] = Stored(str(tensor["dtype"]), shape, end - begin, 8 + length + begin)
        ends = (tensor.start + tensor.bytes for tensor in found.values())
        if missing := max(ends, default=8 + length) - size:
            raise ValueError(f"{missing:,} bytes are missing at its end" if missing > 0 else f"{-missing:,} too many")
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}", "a safetensors file", "Fetch it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{file.name}: {error}", "a whole safetensors file", "Fetch it again") from error
    return found
