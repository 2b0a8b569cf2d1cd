"""`python -m quantize MODEL --method awq --out DIR`: the job as a process of its own.

The last line on stdout is one JSON object, for whoever started it; progress and errors go to stderr. Exit codes:
0 done, 2 for a request that cannot be served, 1 for a run that failed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError


def main(arguments: list[str] | None = None) -> int:
    """Parse, call `job`, print. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from quantize.recipe import Recipe
    from quantize.scheme import Scheme

    recipe = Recipe(
        options.method, Scheme(options.bits, options.group_size), options.samples, options.length, options.seed
    )
    from quantize.job import quantize_config, quantize_model

    if options.config_only:
        return _plain(quantize_config(Path(options.model), recipe, out=options.out, cache=options.cache))
    from quantize.progress import reporter

    with reporter() as progress:
        result = quantize_model(
            options.model,
            recipe,
            out=options.out,
            cache=options.cache,
            calibration=options.calibration,
            progress=progress,
        )
    return _plain(result)


def _plain(result: Any) -> dict[str, Any]:
    return asdict(result) | {"path": str(result.path), "seconds": round(result.seconds, 3)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m quantize", description="Quantize a model for vLLM.")
    parser.add_argument("model", help="a model's directory, or its name on the hub")
    parser.add_argument("--method", default="awq", help="rtn or awq (default awq)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=".txt or .jsonl (default: the model's own)")
    parser.add_argument("--samples", type=int, default=128, help="calibrate on samples x length tokens (default 128)")
    parser.add_argument("--length", type=int, default=512, help="longest sequence, in tokens (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--config-only", action="store_true", help="write config.json alone, for --load-format dummy")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="DIR", help="where the checkpoint goes")
    place.add_argument("--cache", type=Path, metavar="DIR", help="cache to look in and write to (default: the user's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
