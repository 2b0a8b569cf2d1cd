"""llm-compressor: --method rtn, gptq, gptq-mse, awq or awq+gptq, with the modifiers' own defaults.

gptq-mse is GPTQ with scales by the observer "mse" in place of the default, the group's minimum and maximum.

One patch, for awq alone: before its grid search AWQModifier pins the memory of the inputs that it kept, which torch
refuses without an accelerator ("Cannot access accelerator device when none is available"). Pinning only makes copies to
a GPU quicker, so without one `IntermediatesCache.pin_memory` is replaced by nothing.
"""

from __future__ import annotations

from typing import Any

import common
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

BATCH = 1
"""oneshot's default."""


def recipe(method: str, bits: int, group_size: int, symmetric: bool) -> list[Any]:
    """The modifiers of `method`; they leave the head alone."""
    observer = {"observer": "mse"} if method.endswith("-mse") else {}
    weights = QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=group_size, symmetric=symmetric, **observer
    )
    where: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    modifiers: list[Any] = [AWQModifier()] if method.startswith("awq") else []
    rounding = GPTQModifier if "gptq" in method else QuantizationModifier
    return [*modifiers, rounding(**where)]


def main() -> None:
    options = common.arguments()
    report = common.Report(("llmcompressor", "compressed-tensors", "torch", "transformers"))
    common.import_architecture(options.model)
    report.resident("before_mib")
    if "awq" in options.method and not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
        report.fields["notes"].append("pin_memory replaced by nothing: no accelerator")
    with report.timing("load_seconds"):
        dtype = torch.float32 if options.dtype == "float32" else "auto"
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    rows = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        for ids in common.sequences(options.calibration)
    ]
    steps = recipe(options.method, options.bits, options.group_size, options.symmetric)
    data: Any = {} if options.method == "rtn" else {"dataset": DataLoader(rows, batch_size=BATCH)}  # type: ignore[arg-type]
    with report.timing("seconds"):
        oneshot(model=model, recipe=steps, num_calibration_samples=len(rows), **data)
    report.peak("peak_mib")
    with report.timing("save_seconds"):
        model.save_pretrained(options.out, save_compressed=True)
    report.peak("saved_mib")
    common.save_dense(options.out, common.from_compressed(common.read(options.out), options.bits))
    report.say()


if __name__ == "__main__":
    main()
