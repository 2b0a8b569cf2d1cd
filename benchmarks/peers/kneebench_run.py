"""Ours: `python -m quantize MODEL ...` in this process, so that its memory is read as the other tools' is.

`seconds` is the whole call, with reading the model and writing the checkpoint, which for the others stand apart: a tool
that works block by block has no moment at which only the one goes on. What follows `--` goes to the command line as is.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

import common

import quantize.job  # noqa: F401
from quantize.__main__ import main as quantize_main


def main() -> None:
    flags: list[str] = []
    if "--" in sys.argv:
        at = sys.argv.index("--")
        sys.argv, flags = sys.argv[:at], sys.argv[at + 1 :]
    options = common.arguments()
    rows = common.sequences(options.calibration)
    line = [str(options.model), "--method", options.method, "--bits", str(options.bits), "--out", str(options.out)]
    line += ["--group-size", str(options.group_size), "--seed", str(options.seed)]
    line += ["--calibration", str(options.calibration), "--samples", str(len(rows)), "--length", str(len(rows[0]))]
    line += ["--sym" if options.symmetric else "--asym"]
    report = common.Report(("kneebench", "torch", "transformers"))
    common.import_architecture(options.model)
    report.resident("before_mib")
    said = io.StringIO()
    with report.timing("seconds"), contextlib.redirect_stdout(said):
        code = quantize_main([*line, *flags])
    report.peak("peak_mib")
    report.peak("saved_mib")
    if code:
        raise SystemExit(code)
    report.fields |= {"load_seconds": None, "save_seconds": None}
    report.fields["result"] = json.loads(said.getvalue().splitlines()[-1])
    report.say()


if __name__ == "__main__":
    main()
