"""AutoRound with its defaults (200 iterations, batch 8, symmetric): --method autoround, or rtn for its own rounding.

rtn is iters=0, which AutoRound by default does not leave at plain rounding but searches scales for.
"""

from __future__ import annotations

import common
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = common.arguments()
    report = common.Report(("auto-round", "torch", "transformers"))
    common.import_architecture(options.model)
    report.resident("before_mib")
    with report.timing("load_seconds"):
        dtype = torch.float32 if options.dtype == "float32" else "auto"
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = common.sequences(options.calibration)
    length = len(rows[0])
    data = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length).long()} for ids in rows]
    rounding = {"iters": 0} if options.method == "rtn" else {}
    tool = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=options.symmetric,
        dataset=data,
        seqlen=length,
        nsamples=len(rows),
        seed=options.seed + 42,  # 42 is its default
        device_map="cpu",
        **rounding,
    )
    with report.timing("seconds"):
        tool.quantize()
    report.peak("peak_mib")
    with report.timing("save_seconds"):
        tool.save_quantized(str(options.out), format="auto_gptq")
    report.peak("saved_mib")
    common.save_dense(options.out, common.from_gptq(common.read(options.out), options.bits))
    report.say()


if __name__ == "__main__":
    main()
