"""GPTQModel with its defaults: --method gptq.

On a machine of two cores or fewer GPTQModel 7.7 does not start by itself: it gives the "cpu" pool min(12, (cores + 1)
// 2) threads, that is one, and then asks for a pool of two loaders inside it ("Virtual pool 'model_loader:cpu' requests
2 workers but parent 'cpu' only has 1"). Its own variable GPTQMODEL_CPU_WORKERS=2 lets it start, and is set here where
there are fewer than three cores.
"""

from __future__ import annotations

import os

NOTES = []
if (os.cpu_count() or 1) < 3 and "GPTQMODEL_CPU_WORKERS" not in os.environ:
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # read when the pool is built
    NOTES.append("GPTQMODEL_CPU_WORKERS=2: does not start on two cores without it")

import common  # noqa: E402
import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402

BATCH = 1
"""quantize's default."""


def main() -> None:
    options = common.arguments()
    report = common.Report(("gptqmodel", "torch", "transformers"))
    report.fields["notes"] += NOTES
    common.import_architecture(options.model)
    report.resident("before_mib")
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=options.symmetric)
    with report.timing("load_seconds"):
        dtype = {"dtype": torch.float32} if options.dtype == "float32" else {}
        model = GPTQModel.load(str(options.model), config, **dtype)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in common.sequences(options.calibration)]
    with report.timing("seconds"):
        model.quantize(rows, batch_size=BATCH)
    report.peak("peak_mib")
    with report.timing("save_seconds"):
        model.save(str(options.out))
    report.peak("saved_mib")
    common.save_dense(options.out, common.from_gptq(common.read(options.out), options.bits))
    report.say()


if __name__ == "__main__":
    main()
