"""A quantized checkpoint as a plain model in 16 bits: `python -m quantize.expand CHECKPOINT`.

For schemes that no kernel serves (2 and 3 bits): the expanded model answers what the quantized one would, at the speed
and the size of the original. Each weight is the (q - z) s that a W<bits>A16 kernel multiplies with, rounded to the type
of the model's other weights, as such kernels round it in their registers.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from quantize.blocks import family_of
from quantize.checkpoint import RECORD, carry, drafted, finished, write_json
from quantize.dequantized import Dequantized, open_dequantized
from quantize.errors import QuantizeError, SchemeError
from quantize.examine import BLOCK
from quantize.job import default_cache
from quantize.weights import content_hash


def expand(checkpoint: Path, out: Path | None = None, cache: Path | None = None) -> tuple[Path, str]:
    """Write `checkpoint` as a plain model; returns where it is and its content hash.

    It goes to `out`, or to the cache, and what is there already is found again. Raises SchemeError for a checkpoint
    whose activations are quantized too: its weights alone would be another model.
    """
    model = open_dequantized(checkpoint)
    family_of(model.config.get("model_type"))
    for name, (scheme, _) in model.modules.items():
        if scheme.activation_bits is not None:
            raise SchemeError(
                f"{checkpoint}, whose {name} quantizes activations ({scheme})",
                "weights alone in few bits",
                "Serve it as it is",
            )
    source = content_hash(checkpoint)
    key = hashlib.sha256(f"expanded\n{source}".encode()).hexdigest()
    out = out or (cache or default_cache()) / "checkpoints" / f"{checkpoint.resolve().name}-expanded-{key[:12]}"
    digest = finished(out, key)
    if digest is None:
        digest = _write(model, out, key, source)
    return out, digest


def _write(model: Dequantized, out: Path, key: str, source: str) -> str:
    dtype = _stored_dtype(model)
    shards: dict[str, list[str]] = {}
    for name in model.files:
        block = BLOCK.search(name)
        shards.setdefault(block[1] if block else "", []).append(name)
    with drafted(out, key, {"expanded_from": source}) as draft:
        for names in shards.values():
            draft.add({name: tensor.to(dtype) for name, tensor in model.read(names).items()})
        draft.finish()
        config = {name: value for name, value in model.config.items() if name != "quantization_config"}
        write_json(draft.path / "config.json", config)
        carry(model.path, draft.path)
        digest = content_hash(draft.path)
        write_json(draft.path / RECORD, {"key": key, "expanded_from": source, "checkpoint_sha256": digest})
    return digest


def _stored_dtype(model: Dequantized) -> torch.dtype:
    """The type of what the checkpoint keeps in 16 bits."""
    for name in model.files:
        if name.removesuffix(".weight") not in model.modules:
            (tensor,) = model.read([name]).values()
            if tensor.dtype in (torch.bfloat16, torch.float16):
                return tensor.dtype
    return torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call `expand`, print one JSON object with path and checkpoint_sha256. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quantize.expand", description="Write a quantized checkpoint as a plain model in 16 bits."
    )
    parser.add_argument("checkpoint", type=Path, help="a quantized checkpoint's directory")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="DIR", help="where the model goes (default: the user's cache)")
    place.add_argument("--cache", type=Path, metavar="DIR", help="another cache to look in and write to")
    options = parser.parse_args(arguments)
    try:
        path, digest = expand(options.checkpoint, options.out, options.cache)
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"path": str(path), "checkpoint_sha256": digest}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
