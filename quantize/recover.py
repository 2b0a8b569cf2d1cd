"""`bench recover MODEL`: what each method costs and what it leaves, so that one can see when training is worth it.

    model, text ─► split ─► for each bits, method, seed:  python -m quantize (timed, its peak memory taken)
                                                                │ checkpoint
                     fidelity.report on text that none was given ─► recover.csv ─► recover.md, recover.png

All methods at one number of bits have one scheme, calibrate on the same sequences (`<out>/calibration.jsonl`) and are
compared with the original on the same others. Each run is a process of its own. What a call has finished is in
recover.csv; the next one with the same --out goes on from there, and refuses to mix conditions. A run that was stopped
begins anew, for half of one is no measurement.
"""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import QuantizeError, SchemeError
from quantize.measured import Watch, execute
from quantize.recover_page import markdown
from quantize.recover_rows import Row, held, resume
from quantize.recover_runs import Execute, Request, run_all, scheme_at
from quantize.recover_words import points, words
from quantize.training import METHODS as TRAINED

if TYPE_CHECKING:
    from quantize.calibration import CalibrationSet
    from quantize.evaluation_text import Split
    from quantize.fidelity import Fidelity


def main(
    arguments: Sequence[str] | None = None,
    program: str = "python -m quantize.recover",
    resolve: Callable[[str], str] = str,
    execute: Execute = execute,
) -> int:
    """Parse, run, report. Returns the exit code: 0 done, 1 where a run failed, 2 for a request that cannot be served.

    Another command line that is this one (`bench recover`) gives its name and what it calls models besides; `execute`
    runs its processes.
    """
    given, flags = _cut(list(sys.argv[1:] if arguments is None else arguments))
    options = _parser(program).parse_args(given)
    try:
        options.model = resolve(options.model)
        rows = _recover(options, flags, execute)
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    return 1 if any(row.error for row in rows) else 0


def _recover(options: argparse.Namespace, flags: Sequence[str], execute: Execute) -> list[Row]:
    """The rows that were asked for, after the files are written."""
    from quantize import evaluation_text, fidelity, job
    from quantize.recipe import Recipe
    from quantize.weights import content_hash, locate

    model = locate(options.model)
    request = _request(options, model, flags)
    recipe = Recipe(samples=request.samples, length=request.length)
    text = evaluation_text.split(model, recipe, options.calibration, options.text)
    conditions = _conditions(request, text, content_hash(model), job.default_device())

    def judge(checkpoint: Path) -> "Fidelity":
        return fidelity.report(model, checkpoint, text.evaluation.sequences, job.default_device()).whole

    with held(request.out), _watching() as (watch, say):
        known = resume(request.out, conditions)
        (request.out / "calibration.jsonl").write_text(
            "".join(json.dumps({"input_ids": ids}) + "\n" for ids in text.calibration.sequences), encoding="utf-8"
        )
        rows = run_all(request, known, execute, judge, watch, say)
        _report(request.out, rows, conditions)
    for line in words(rows):
        print(line)
    print(f"\nreport  {request.out / 'recover.md'}")
    wanted = {row.key for row in request.runs}
    return [row for row in rows if row.key in wanted]


def _request(options: argparse.Namespace, model: Path, flags: Sequence[str]) -> Request:
    """Look at all that was asked before anything is run. Raises SchemeError, ModelError."""
    from quantize.blocks import family_of
    from quantize.methods import METHODS
    from quantize.recipe import Recipe
    from quantize.weights import check_unquantized, open_model

    methods, allowed = _listed(options.methods, "--methods"), (*METHODS, *TRAINED)
    for method in methods:
        if method not in allowed:
            raise SchemeError(f"--methods {method}", ", ".join(dict.fromkeys(allowed)), "Choose among these")
    if flags and not set(methods) & set(TRAINED):
        raise SchemeError(
            f"{' '.join(flags)!r} after --, and no method that trains", " and ".join(TRAINED), "Leave it out"
        )
    if options.seeds < 1:
        raise SchemeError(f"--seeds {options.seeds}", "1 or more", "Say how many seeds trained methods run with")
    source = open_model(model)
    check_unquantized(model, source.config)
    family, blocks = family_of(source.config.get("model_type")), int(source.config["num_hidden_layers"])
    runs = []
    for bits in map(_integer, _listed(options.bits, "--bits")):
        scheme = scheme_at(bits, options.group_size, options.symmetric)
        plan = Recipe("rtn", scheme).plan(family, blocks)
        Recipe("rtn", scheme).resolve_format(plan, {name: source.matrix_shape(f"{name}.weight") for name in plan})
        for method in methods:
            seeds = range(options.seeds) if method in TRAINED else range(1)
            runs += [Row(method, bits, seed, str(scheme)) for seed in seeds]
    name = model.name if Path(options.model).expanduser().is_dir() else Path(options.model).name
    return Request(
        name=name,
        model=model,
        out=options.out or Path(f"recovery-{name}"),
        runs=tuple(runs),
        symmetric=options.symmetric,
        group_size=options.group_size,
        samples=options.samples,
        length=options.length,
        flags=tuple(flags),
    )


def _conditions(request: Request, text: "Split", model_sha256: str, device: str) -> dict[str, str]:
    """What all rows of a table have in common, by name; where it changes, figures no longer compare."""
    from importlib.metadata import PackageNotFoundError, version

    from quantize.evaluation_text import tokens

    def found(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} not installed"

    def told(part: "CalibrationSet") -> str:
        return f"{tokens(part.sequences):,} tokens of {part.origin} (sha256 {part.sha256()[:12]})"

    groups = "a row" if request.group_size < 0 else str(request.group_size)
    return {
        "model": request.name,
        "model sha256": model_sha256[:12],
        "scheme": f"{'symmetric' if request.symmetric else 'zero points, but for 8 bits'}, groups of {groups}",
        "calibration": told(text.calibration),
        "evaluation": told(text.evaluation),
        "draw": f"{request.samples} samples x {request.length} tokens at most",
        "flags of trained methods": " ".join(request.flags) or "none",
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}, {device}",
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as torch chooses"),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *map(found, ("kneebench", "torch", "transformers"))]
        ),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def _report(out: Path, rows: Sequence[Row], conditions: Mapping[str, str]) -> None:
    from quantize.recover_figure import draw

    original = next((row for row in rows if row.kl_nats is not None), None)
    measured = dict(conditions)
    if original is not None:
        measured["perplexity of the original"] = f"{original.perplexity_original:.4g}"
        draw(points(rows), conditions["model"], out / "recover.png")
    (out / "recover.md").write_text(markdown(rows, measured), encoding="utf-8")


# --- words on the terminal --------------------------------------------------------------------------------------------


@contextmanager
def _watching() -> Iterator[tuple[Watch, Callable[[str], None]]]:
    """Two functions: one for what is going on, which a log is spared, one for a line that stays. Both go to stderr."""
    if not sys.stderr.isatty():
        yield lambda _: None, lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status("") as status:
        yield (
            lambda line: status.update(escape(line)),
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and what comes after `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _listed(text: str, option: str) -> list[str]:
    """The items of a list with commas, each once."""
    items = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not items:
        raise SchemeError(f"{option} {text!r}", "names or numbers with commas between them", "Name one at least")
    return items


def _integer(text: str) -> int:
    if not text.isdecimal():
        raise SchemeError(f"--bits {text!r}", "2, 3, 4 and 8, with commas between them", "Correct it")
    return int(text)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Quantize a model by several methods at several numbers of bits: quality against seconds, tokens "
        "and memory, in a table, a figure and words.",
        epilog="What comes after -- goes to the runs of qat and qad as it is: -- --steps 100. Stopped, the same "
        "command goes on after the last finished run.",
    )
    parser.add_argument("model", help="a model's directory, or its name on the hub")
    parser.add_argument("--bits", default="4,3,2", metavar="LIST", help="of 8, 4, 3, 2 (default 4,3,2)")
    parser.add_argument(
        "--methods", default="rtn,awq,gptq,qat,qad", metavar="LIST",
        help="rtn, awq, gptq, qat, qad, awq+gptq and what else --method of quantize takes (default: the first five)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="default ./recovery-<model>")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="trained methods run with 0 to N-1 (default 1)"
    )
    scheme = parser.add_argument_group("what a weight becomes, by all methods alike")
    scheme.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="32, 64, 128, or -1: a row (default 128)"
    )
    kind = scheme.add_mutually_exclusive_group()
    kind.add_argument("--sym", dest="symmetric", action="store_true", default=True, help="no zero points (default)")
    kind.add_argument(
        "--asym", dest="symmetric", action="store_false", help="zero points; 8 bits have none in any case"
    )
    data = parser.add_argument_group("text")
    data.add_argument("--calibration", type=Path, metavar="FILE", help=".txt or .jsonl (default: the model's own)")
    data.add_argument(
        "--text", type=Path, metavar="FILE",
        help="what is compared on (default: a part of the calibration text, which is then kept from every method)",
    )  # fmt: skip
    data.add_argument("--samples", type=int, default=128, help="calibrate on samples x length tokens (default 128)")
    data.add_argument("--length", type=int, default=512, help="longest sequence, in tokens (default 512)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
