"""`bench kernels`: what the card can do, then how near each product with few-bit weights comes to it.

    copy and matmul: the ceilings ─► for each layer of a model's block: a set of layers of 64 MB ─► kernels.csv
                                        for each method (ours, 16 bit, peers), tokens: held         kernels.md
                                        against float64, then timed                                 kernels.png

`python -m quantize.kernels` is the same command: it needs torch and transformers, and matplotlib for the figure, so
that it runs in an engine's environment, where vLLM's kernels are. `--from kernels.csv` draws later, elsewhere.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantize.errors import InputError, OutputError, QuantizeError
from quantize.kernels import bench_dispatch, bench_page, bench_rows
from quantize.kernels.bench_clock import Clock, ceiling, clock
from quantize.kernels.bench_layers import Layer, Shape, rotated, shapes
from quantize.kernels.bench_rows import Conditions, Row
from quantize.kernels.peers import Method, Unfit, methods

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEGABYTE = 10**6
WRONG = 0.02
"""An error beyond this is no rounding: bfloat16 keeps 8 bits, and each product here ends within 0.005."""

Say = Callable[[str], None]


@dataclass
class Found:
    """Rows, and what has none: (method, reason) once each."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[tuple[str, str], None] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None, program: str = "python -m quantize.kernels") -> int:
    """Parse, measure, write. Returns the exit code: 0 done, 2 for a request that cannot be served, 1 for a failure."""
    try:
        _run(_parser(program).parse_args(arguments))
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; every finished row is in kernels.csv, and --from draws them", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.source is not None:
        rows = bench_rows.read(options.source)
        _paper(rows, bench_page.page(rows, {}, ()), options.out or options.source.parent)
        return
    if options.write_dispatch is not None and options.device == "cpu":
        raise InputError("--write-dispatch with --device cpu", "a GPU: the table is of cards", "Leave one of them out")
    used = clock(options.device)
    models = options.models or (MODELS if used.device.type == "cuda" else MODELS[:1])
    wanted = [shape for name in models for shape in shapes(name)]
    out = options.out or Path("kernels")
    if (out / "kernels.csv").exists():
        raise OutputError(f"--out {out}, which holds a kernels.csv", "another directory", "Name one, or move the file")
    dtype = DTYPES[options.dtype]
    copy, matmul = ceiling(used, dtype, options.ceiling_size)
    print(f"{used.name}: copy {copy / 1e9:,.0f} GB/s, {options.dtype} matmul {matmul / 1e12:,.2f} TFLOP/s")
    if used.device.type == "cpu":
        print("on a CPU: the torch functions that stand in for the kernels, not the kernels")
    conditions = Conditions(used.name, options.bits, options.group_size, options.dtype, copy, matmul)
    found = Found()
    out.mkdir(parents=True, exist_ok=True)
    for shape in wanted:
        layers = list(
            rotated(
                shape, options.bits, options.group_size, dtype, used.device, options.set_mb * MEGABYTE, options.seed
            )
        )
        for method in methods(used.device, options.bits, options.peers):
            for one in measure(used, conditions, shape, layers, method, options.tokens, options.runs, found):
                print(bench_page.line(one), flush=True)
                bench_rows.write(found.rows, out / "kernels.csv")
    if not found.rows:
        raise InputError("nothing that could be measured", "see the reasons above", "Try another --device or --bits")
    versions = bench_page.versions(used.device) | {"passes": str(options.runs), "set": f"{options.set_mb} MB"}
    _paper(found.rows, bench_page.page(found.rows, versions, list(found.left_out)), out)
    if options.write_dispatch is not None:
        bench_dispatch.write(found.rows, options.write_dispatch)
        print(f"{options.write_dispatch}: the limits of {used.name}")


def measure(
    used: Clock,
    conditions: Conditions,
    shape: Shape,
    layers: Sequence[Layer],
    method: Method,
    tokens: Sequence[int],
    runs: int,
    found: Found,
) -> Iterator[Row]:
    """One method's rows for one set of layers, added to `found` and yielded as they come.

    Whatever a method raises is a reason why it has no row, not the end of the run: others' kernels refuse shapes,
    types and cards in ways of their own. So is a result that is wrong.
    """
    try:
        products = [method.make(layer) for layer in layers]
    except Exception as error:
        found.left_out[method.name, _reason(error)] = None
        return
    exact = layers[0].weights(torch.float64).T
    for count in tokens:
        if method.most is not None and count > method.most:
            continue
        inputs = _inputs(count, layers, used.device)
        try:
            wrong_by = relative_error(products[0](inputs[0]), inputs[0].double() @ exact)
            if not wrong_by < WRONG:
                raise ArithmeticError(f"a relative error of {wrong_by:.3g} against float64")
            calls = [_call(product, x) for product, x in zip(products, inputs, strict=True)]
            seconds = used.passes(calls, runs)
        except Exception as raised:
            found.left_out[method.name, f"{shape.layer} of {shape.model}, {count} tokens: {_reason(raised)}"] = None
            continue
        bits = method.bits or conditions.bits
        one = bench_rows.row(conditions, shape, count, method.name, bits, seconds, len(layers), wrong_by)
        found.rows.append(one)
        yield one


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||, in float64."""
    return float((result.double() - exact).norm() / exact.norm())


def _call(product: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: product(x)


def _inputs(tokens: int, layers: Sequence[Layer], device: torch.device) -> list[Tensor]:
    """Activations of its own for each layer, [tokens, k], standard normal."""
    generator = torch.Generator(device).manual_seed(tokens)
    return [torch.randn(tokens, layer.k, device=device, generator=generator).to(layer.scales.dtype) for layer in layers]


def _reason(error: Exception) -> str:
    """Its first line; what it is, where it is not one of ours."""
    said = (str(error).strip().splitlines() or [""])[0]
    return said if isinstance(error, (Unfit, QuantizeError)) else f"{type(error).__name__}: {said}"


def _paper(rows: Sequence[Row], page: str, out: Path) -> None:
    """kernels.md and, where matplotlib is, kernels.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.md").write_text(page, encoding="utf-8")
    try:
        from quantize.kernels import bench_figure
    except ModuleNotFoundError as missing:
        print(f"no figure without {missing.name}: draw it elsewhere with --from {out / 'kernels.csv'}", file=sys.stderr)
    else:
        bench_figure.draw(rows, out / "kernels.png")
    print(f"{out}: {', '.join(sorted(file.name for file in out.glob('kernels.*')))}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in _listed(text)]
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError("whole numbers from 1, with commas between")
    return sorted(set(counts))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("a whole number from 1")
    return number


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Time products with 4- and 8-bit weights against what the device can do at best."
    )
    parser.add_argument(
        "--models",
        type=_listed,
        metavar="LIST",
        help=f"known shapes, or paths to a config.json (default {','.join(MODELS)}; on a CPU the first)",
    )
    parser.add_argument(
        "--tokens", type=_counts, default=TOKENS, metavar="LIST", help=f"of x (default {','.join(map(str, TOKENS))})"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of activations (default bf16)")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of weights (default 4)")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, -1), default=128, help="default 128; -1: a row")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours and the 16-bit product alone")
    parser.add_argument("--runs", type=_positive, default=20, metavar="N", help="timed passes (default 20)")
    parser.add_argument(
        "--set-mb",
        type=_positive,
        default=64,
        metavar="MB",
        help="packed weights that a pass goes over, at least (default 64)",
    )
    parser.add_argument(
        "--ceiling-size",
        type=_positive,
        metavar="N",
        help="of the matrices of the ceilings (default 8192, on a CPU 2048)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random layers (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default ./kernels")
    parser.add_argument(
        "--write-dispatch",
        type=Path,
        metavar="FILE",
        help="write which kernel is best at how many tokens on this card (dispatch.toml)",
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: page and figure from a kernels.csv"
    )
    return parser
