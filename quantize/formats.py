"""How a quantized checkpoint is described: which format holds which scheme, config.json's words, and the parts' names.

    format               holds                                                        vLLM 0.32's CPU build runs
    awq                  4 bits, with zero points (all 8 for a symmetric scheme)      all of it
    gptq                 4 and 8 bits, symmetric                                      4 bits
    compressed-tensors   2, 3, 4, 8 bits, symmetric or not, several schemes at once   4 bits, W8A8, and mixes of them
                         W8A8: int8 per channel, activations to int8 per token

Groups of 32, 64, 128 or a whole row, for which the Marlin kernels of its CUDA build are made. Marlin also has 8 bits
symmetric; 2 and 3 bits, and 8 asymmetric, need an optional kernel package there (its source; not tried here). What the
CPU build does not run is verified by reading it with compressed-tensors' own code, GPTQ of 8 bits with vLLM's.

All three hold a quantized lm_head, which vLLM reads only where config.json names it. It pads the vocabulary to a
multiple of 64 rows, and reads awq and gptq, whose rows are columns there, and zero points only where that adds nothing.

vLLM fuses q, k and v, and gate and up, into one matrix each, which has one scheme: where the parts differ it refuses
the checkpoint or, worse, reads all of them by the first part's scheme. So `check` refuses that for every format.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.errors import SchemeError
from quantize.packing import (
    AwqTensors,
    CtInt8,
    CtPacked,
    GptqTensors,
    pack_awq,
    pack_ct,
    pack_gptq,
    pack_int8,
    unpack_awq,
    unpack_ct,
    unpack_gptq,
    unpack_int8,
)
from quantize.scheme import PER_CHANNEL, Quantized, Scheme

FORMATS = ("awq", "gptq", "compressed-tensors")
GPTQ_V2 = "gptq_v2"
"""Read, not written: GPTQModel's own, which stores zero points as they are."""

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)
HEAD = "lm_head"
"""The output head, by its name as a module."""
_HEAD_ROWS = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE (its vocab_parallel_embedding.py)."""
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_CT_VERSION = "0.20.0"
"""Of the library whose packing is ours; older ones pack 3 bits otherwise."""

_OUTPUTS = dict.fromkeys(("weight", "weight_packed", "weight_scale", "weight_zero_point"), 0)
_OUTPUTS |= dict.fromkeys(("qweight", "qzeros", "scales"), 1)
"""The dimension in which a part has the outputs, one by one or several to a word; other parts have them in none."""

Shapes = Mapping[str, tuple[int, int]]
"""(outputs, inputs) by module name."""


def default(schemes: Mapping[str, Scheme]) -> str:
    """The format for `schemes`, by module name: of those that vLLM serves, the one that most other tools read too."""
    if len(kinds := set(schemes.values())) == 1:
        (scheme,) = kinds
        if scheme.bits == 4 and scheme.activation_bits is None:
            return "gptq" if scheme.symmetric else "awq"
    return "compressed-tensors"


def check(format: str, schemes: Mapping[str, Scheme], kept: Sequence[str] = (), shapes: Shapes | None = None) -> None:
    """Raise SchemeError, naming the formats that can, where `format` cannot hold `schemes`.

    schemes: by the name of each quantized module; kept: the modules left in 16 bit; shapes: for the rules on sizes,
    which are skipped without them.
    """
    if format not in FORMATS:
        raise SchemeError(f"format = {format!r}", ", ".join(FORMATS), "Choose one of these with --format")
    if not schemes:
        raise SchemeError("a model of which nothing is quantized", "one module at least", "Keep fewer in 16 bit")
    problem = _torn(schemes, kept) or _objection(format, schemes, shapes)
    if problem is None:
        return
    able = [other for other in FORMATS if not _torn(schemes, kept) and not _objection(other, schemes, shapes)]
    raise SchemeError(
        f"format {format}: {problem}",
        f"what vLLM reads from {format}; {' and '.join(able) or 'no format'} can hold this",
        f"Choose --format {able[0]}" if able else "Change the scheme",
    )


def cpu_objection(schemes: Mapping[str, Scheme], shapes: Shapes | None = None) -> str | None:
    """Why vLLM's CPU build cannot serve what `check` allows, in whatever format, or None where it can."""
    for name, scheme in schemes.items():
        if scheme.activation_bits is None and scheme.bits != 4:
            return f"vLLM has no CPU kernel for {scheme}"
        outputs, inputs = (shapes or {}).get(name, (32, 32))
        padded = name == HEAD  # by vLLM
        if scheme.activation_bits is None and (inputs % 32 or (outputs % 32 and not padded)):
            return f"vLLM's CPU kernel wants multiples of 32, and {name} is {outputs} x {inputs}"
    return None


def _objection(format: str, schemes: Mapping[str, Scheme], shapes: Shapes | None) -> str | None:
    """Why `format` cannot hold `schemes`, or None where it can."""
    kinds = sorted(set(_body(schemes).values() if format == "gptq" else schemes.values()), key=str)
    if len(kinds) > 1 and format != "compressed-tensors":
        return f"several schemes at once ({', '.join(map(str, kinds))})"
    for name, scheme in schemes.items():
        if scheme.group_size not in GROUP_SIZES:
            return f"groups of {scheme.group_size}, and vLLM's kernels have {', '.join(map(str, GROUP_SIZES))}"
        if scheme.activation_bits is not None:
            if scheme != Scheme(8, PER_CHANNEL, symmetric=True, activation_bits=8):
                return f"{scheme}, and with quantized activations vLLM runs W8A8 per channel symmetric only"
            if format != "compressed-tensors":
                return f"{scheme} quantizes activations, for which {format} has no words"
        elif format == "awq" and scheme.bits != 4:
            return f"{scheme}, and the layout has 4 bits"
        elif format == "gptq" and (scheme.bits not in (4, 8) or not scheme.symmetric):
            return f"{scheme}, and vLLM reads 4 or 8 bits symmetric"
        outputs, inputs = (shapes or {}).get(name, (64, 64))
        values = 32 // scheme.bits
        if format != "compressed-tensors" and (outputs % values or (format == "gptq" and inputs % values)):
            return f"{name} is {outputs} x {inputs}, and {values} of its values share a word"
        if name == HEAD and format != "compressed-tensors" and outputs % _HEAD_ROWS:
            return f"{name} is {outputs} x {inputs}, and its rows have to be a multiple of {_HEAD_ROWS}"
        if name == HEAD and not scheme.symmetric and outputs * scheme.bits % 32:
            return f"{name} is {outputs} x {inputs}, and zero points of {scheme.bits} bits for it end within a word"
    return None


def _body(schemes: Mapping[str, Scheme]) -> Mapping[str, Scheme]:
    """`schemes` without the output head's, unless that is all."""
    return {name: scheme for name, scheme in schemes.items() if name != HEAD} or schemes


def _torn(schemes: Mapping[str, Scheme], kept: Sequence[str]) -> str | None:
    """Which modules that vLLM fuses have more than one scheme, or None."""
    known: dict[str, Scheme | None] = {**dict.fromkeys(kept), **schemes}
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        for part in next((parts for parts in _FUSED.values() if leaf in parts), ()):
            sibling = f"{parent}.{part}"
            if (other := known.get(sibling, scheme)) != scheme:
                return f"{name} is {scheme} and {sibling} {other or '16 bit'}, which vLLM fuses into one matrix"
    return None


def quantization_config(format: str, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
    """The part of config.json that says how the weights are stored. Arguments and errors as for `check`."""
    check(format, schemes, kept)
    if format == "compressed-tensors":
        return _ct_config(schemes, kept)
    (scheme,) = set(_body(schemes).values())
    head = schemes.get(HEAD)
    if format == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,  # of a symmetric scheme too: AutoAWQ's kernels know no other
            "modules_to_not_convert": list(kept),
        } | ({"lm_head": True} if head else {})
    # vLLM asks for the fused name, others for the parts'; lm_head has a field of its own.
    skipped = patterns(_with_fused([name for name in kept if name != HEAD]), _with_fused([*kept, *schemes]))
    dynamic: dict[str, Any] = {f"-:{pattern}": {} for pattern in skipped}
    if head and head != scheme:
        dynamic[f"+:{HEAD}$"] = {"bits": head.bits, "group_size": head.group_size, "sym": True}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "true_sequential": True,
        "lm_head": head is not None,
        "pack_dtype": "int32",
    } | ({"dynamic": dynamic} if dynamic else {})


def _with_fused(names: Sequence[str]) -> list[str]:
    """`names`, and those of the matrices that vLLM fuses them into."""
    fused = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused += [f"{parent}.{whole}" for whole, parts in _FUSED.items() if leaf == parts[0]]
    return [*names, *fused]


def _ct_config(schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    everything = [*schemes, *kept]
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.items()):
        targets = _targets(names, everything)
        if len(by_scheme) == 1:
            targets = ["Linear", *([HEAD] if HEAD in names else [])]  # which is no Linear in vLLM
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": _ct_arguments(scheme.bits, scheme.symmetric, scheme.group_size),
            "input_activations": None if scheme.activation_bits is None else _ct_tokens(scheme.activation_bits),
            "output_activations": None,
            "format": "pack-quantized" if scheme.activation_bits is None else "int-quantized",
        }
    stored = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": _CT_VERSION,
        "format": stored.pop() if len(stored) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _targets(kept, everything),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ct_arguments(bits: int, symmetric: bool, group_size: int) -> dict[str, Any]:
    grouped = group_size != PER_CHANNEL
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }


def _ct_tokens(bits: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
    }


def _targets(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """`names` as compressed-tensors' targets: the full name, or "re:" and a regular expression."""
    plain = [name for name in names if _NUMBERED.fullmatch(name) is None]
    rest = [name for name in names if _NUMBERED.fullmatch(name) is not None]
    return plain + [f"re:{pattern}" for pattern in patterns(rest, everything)]


_NUMBERED = re.compile(r"(.*?\.)(\d+)\.(.+)")


def patterns(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    r"""Regular expressions that match `names` and no other of `everything`, one for each set of layers.

    model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj -> ["model\.layers\.\d+\.mlp\.up_proj$"], if that is all
    """
    where: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        prefix, layer, leaf = found.groups() if found else ("", "", name)
        where.setdefault((prefix, leaf), []).append(layer)
    total: dict[tuple[str, str], int] = {}
    for name in dict.fromkeys(everything):
        if found := _NUMBERED.fullmatch(name):
            total[found[1], found[3]] = total.get((found[1], found[3]), 0) + 1
    leaves: dict[str, list[str]] = {}
    for (prefix, leaf), layers in where.items():
        number = r"\d+" if len(layers) == total.get((prefix, leaf)) else "|".join(layers)
        start = f"{re.escape(prefix)}{f'({number})' if '|' in number else number}" + r"\." if prefix else ""
        leaves.setdefault(start, []).append(re.escape(leaf))
    return [f"{start}({'|'.join(ends)})$" if len(ends) > 1 else f"{start}{ends[0]}$" for start, ends in leaves.items()]


def pack(format: str, quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one module as `format` stores them, by part: <module>.<part> is the name in the checkpoint."""
    parts: Any
    if format == "awq":
        parts = pack_awq(quantized)
    elif format == "gptq":
        parts = pack_gptq(quantized, scheme.bits)
    elif scheme.activation_bits is None:
        parts = pack_ct(quantized, scheme.bits, scheme.symmetric)
    else:
        parts = pack_int8(quantized)
    return {name: tensor for name, tensor in parts._asdict().items() if tensor is not None}


def pack_slices(format: str, slices: Sequence[Quantized], scheme: Scheme) -> dict[str, Tensor]:
    """As `pack`, of a matrix in slices of its rows, each but the last of a multiple of 32."""
    packed = [pack(format, part, scheme) for part in slices]
    whole = dict(packed[0])
    for name, axis in _OUTPUTS.items():
        if name in whole:
            whole[name] = torch.cat([parts[name] for parts in packed], axis)
    if "weight_shape" in whole:
        whole["weight_shape"] = torch.tensor([sum(len(part.q) for part in slices), slices[0].q.shape[1]])
    return whole


def narrow(parts: Mapping[str, Tensor], scheme: Scheme, start: int, end: int) -> dict[str, Tensor]:
    """Of the tensors of one module those of the rows from `start` to `end`, multiples of 32, or to the last one."""
    narrowed = dict(parts)
    scales = next((name for name in ("scales", "weight_scale") if name in parts), None)
    if scales is None:
        return narrowed  # `unpack` says what is missing
    outputs = parts[scales].shape[_OUTPUTS[scales]]
    end = min(end, outputs)
    for name, axis in _OUTPUTS.items():
        if name in parts:
            packed = parts[name].shape[axis] != outputs
            first, last = (start * scheme.bits // 32, -(-end * scheme.bits // 32)) if packed else (start, end)
            narrowed[name] = parts[name].narrow(axis, first, last - first)
    if "weight_shape" in parts:
        narrowed["weight_shape"] = torch.tensor([end - start, int(parts["weight_shape"][1])])
    return narrowed


def unpack(parts: Mapping[str, Tensor], format: str, scheme: Scheme) -> Quantized:
    """The inverse of `pack`, exactly; `format` may also be GPTQ_V2.

    Other tools' files have scales in other types, which stay what they are. Raises SchemeError where a part is missing
    or the layout is another one.
    """
    kind: Any = AwqTensors
    if format != "awq":
        kind = GptqTensors if format in ("gptq", GPTQ_V2) else CtPacked if "weight_packed" in parts else CtInt8
    fields = [name for name in kind._fields if not (scheme.symmetric and name == "weight_zero_point")]
    optional = {"g_idx", *([] if kind is CtPacked else ["weight_zero_point"])}
    if missing := set(fields) - set(parts) - optional:
        raise SchemeError(f"a {format} layer without {', '.join(sorted(missing))}", ", ".join(fields), "Fetch it again")
    tensors = kind(**{name: parts.get(name) if name in fields else None for name in kind._fields})
    if kind is AwqTensors:
        quantized = unpack_awq(tensors)
    elif kind is GptqTensors:
        quantized = unpack_gptq(tensors, scheme.bits, 2 if format == GPTQ_V2 else 1)
    else:
        quantized = unpack_ct(tensors, scheme.bits) if kind is CtPacked else unpack_int8(tensors, scheme.bits)
    if (groups := quantized.scales.shape[1]) != (expected := scheme.groups(quantized.q.shape[1])):
        raise SchemeError(f"{groups} scales a row", f"{expected}, which {scheme} implies", "Fetch the checkpoint again")
    return quantized
