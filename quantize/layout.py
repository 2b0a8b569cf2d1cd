"""Reading what a config.json says of its quantized weights: the inverse of `formats.quantization_config`.

It also reads what other tools write in the same layouts (AutoAWQ, AutoGPTQ, GPTQModel, llm-compressor):

    layout = parse(config["quantization_config"])
    for module, (scheme, parts) in layout.modules(tensors).items():
        quantized = unpack({part: tensors[f"{module}.{part}"] for part in parts}, layout.format, scheme)

Anything else (floating point, sparse, rotated, GEMV orders) is refused with what it was: weights read by a wrong rule
would be wrong without a word.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import SchemeError
from quantize.formats import FORMATS, GPTQ_V2, HEAD
from quantize.scheme import PER_CHANNEL, Scheme

_REMEDY = "Dequantize it with the tool that made it"
_MARKS = ("qweight", "weight_packed", "weight_scale")
_PARTS = {*_MARKS, "qzeros", "scales", "g_idx", "weight", "weight_zero_point", "weight_shape"}


@dataclass(frozen=True)
class Layout:
    """format: of `formats.FORMATS`, or GPTQ_V2. rules: the first whose pattern matches a name has its scheme."""

    format: str
    rules: tuple[tuple[str, Scheme | None], ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of the linear layer of that name; None where it is left in 16 bit."""
        return next((scheme for pattern, scheme in self.rules if re.match(pattern, module)), None)

    def modules(self, tensors: Iterable[str]) -> dict[str, tuple[Scheme, tuple[str, ...]]]:
        """The quantized modules among the names of a checkpoint's tensors, each with its scheme and its parts.

        Raises SchemeError where a module is stored as integers and no rule says how.
        """
        parts: dict[str, list[str]] = {}
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part in _PARTS:
                parts.setdefault(module, []).append(part)
        found = {}
        for module, names in parts.items():
            if not any(mark in names for mark in _MARKS):
                continue
            if (scheme := self.scheme_of(module)) is None:
                raise SchemeError(f"{module}, stored as integers", "a scheme for it in config.json", "Fetch it again")
            found[module] = (scheme, tuple(names))
        return found


def parse(config: Mapping[str, Any]) -> Layout:
    """The layout that the quantization_config of a config.json describes. Raises SchemeError for one not read here."""
    method = config.get("quant_method")
    try:
        if method == "awq":
            return _awq(config)
        if method == "gptq":
            return _gptq(config)
        if method == "compressed-tensors":
            return _ct(config)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise SchemeError(
            f"a quantization_config for {method} with a fault ({error!r})", "its fields", _REMEDY
        ) from None
    raise _unread("quant_method", method, ", ".join(FORMATS))


def _awq(config: Mapping[str, Any]) -> Layout:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unread("an AWQ version", version, "gemm")
    if not config["zero_point"]:
        raise _unread("zero_point", False, "true: AutoAWQ's layout has zero points")
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    kept = [(f".*{re.escape(name)}", None) for name in config.get("modules_to_not_convert") or []]
    return Layout("awq", (*kept, *_unless_said(config), ("", Scheme(_integer(bits), _integer(size)))))


def _gptq(config: Mapping[str, Any]) -> Layout:
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", GPTQ_V2):
        raise _unread("checkpoint_format", version, f"gptq, {GPTQ_V2}")

    def scheme(changes: Mapping[str, Any]) -> Scheme:
        fields = {**config, **changes}
        return Scheme(_integer(fields["bits"]), _integer(fields["group_size"]), symmetric=bool(fields["sym"]))

    rules: list[tuple[str, Scheme | None]] = []
    for pattern, changes in (config.get("dynamic") or {}).items():  # GPTQModel's rules for single modules
        skips = pattern.startswith("-:")
        rules.append((pattern.removeprefix("-:").removeprefix("+:"), None if skips else scheme(changes)))
    return Layout(version, (*rules, *_unless_said(config), ("", scheme({}))))


def _unless_said(config: Mapping[str, Any]) -> list[tuple[str, Scheme | None]]:
    """The output head is left in 16 bit where the config does not say otherwise."""
    return [] if config.get("lm_head") else [(f".*{HEAD}$", None)]


def _ct(config: Mapping[str, Any]) -> Layout:
    for field in ("transform_config", "sparsity_config"):
        if config.get(field):
            raise _unread(field, config[field], "none")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise _unread("quantization_status", status, "compressed")
    named: list[tuple[str, Scheme]] = []
    broad: list[tuple[str, Scheme]] = []
    for group in config["config_groups"].values():
        scheme = _ct_scheme(group, group.get("format") or config["format"])
        for target in group["targets"]:
            # The library's precedence: a name, then a regular expression, then a class.
            if target == "Linear":
                broad.append(("", scheme))
            else:
                named.insert(len(named) if target.startswith("re:") else 0, (_ct_pattern(target), scheme))
    kept = [(_ct_pattern(target), None) for target in config.get("ignore") or []]
    return Layout("compressed-tensors", (*kept, *named, *broad))


def _ct_pattern(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


def _ct_scheme(group: Mapping[str, Any], stored: str) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    if stored not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise _unread("a format", stored, "pack-quantized, int-quantized")
    if weights["type"] != "int" or weights.get("dynamic"):
        raise _unread("weights", weights, "integers that are stored")
    if weights.get("strategy") not in ("group", "channel"):
        raise _unread("a weights' strategy", weights.get("strategy"), "group, channel")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _unread("actorder", weights["actorder"], "weight or static, which leave each group's inputs together")
    if group.get("output_activations"):
        raise _unread("output_activations", group["output_activations"], "none")
    if inputs and not (inputs["type"] == "int" and inputs["strategy"] == "token" and inputs["symmetric"]):
        raise _unread("input_activations", inputs, "none, or symmetric integers per token")
    size = weights["group_size"] if weights["strategy"] == "group" else PER_CHANNEL
    activations = inputs["num_bits"] if inputs else None
    return Scheme(_integer(weights["num_bits"]), _integer(size), bool(weights["symmetric"]), activations)


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value


def _unread(what: str, given: object, allowed: str) -> SchemeError:
    return SchemeError(f"{what} of {given!r}", allowed, _REMEDY)
