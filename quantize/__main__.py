"""`python -m quantize MODEL --method awq --out DIR`, which `bench quantize` is too: the job as a process of its own.

The last line on stdout is one JSON object, for whoever started it; progress and errors go to stderr. Exit codes:
0 done, 2 for a request that cannot be served, 1 for a run that failed, 130 for Ctrl-C.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.errors import OutputError, QuantizeError

_FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the process that speaks, of those that torchrun started."""

_METHODS = "rtn, awq, gptq, smoothquant, awq+gptq, smoothquant+gptq; trained: qat or qad"


def main(
    arguments: Sequence[str] | None = None,
    program: str = "python -m quantize",
    resolve: Callable[[str], str] = str,
    say: Callable[[dict[str, Any]], str] = json.dumps,
) -> int:
    """Parse, call `job`, print. Returns the exit code.

    Another command line that is this one (`bench quantize`) gives its name, what it calls models besides, and how it
    wants a result said.
    """
    options = _parser(program).parse_args(arguments)
    try:
        options.model = resolve(options.model)
        found = _run(options)
        if found is not None and _FIRST:
            print(say(found))
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: finished blocks are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any] | None:
    """What was made, as plain data; None for a dry run, which makes nothing."""
    from quantize.recipe import Recipe, default_scheme, parse_exception

    scheme = default_scheme(
        options.method, options.bits, options.group_size, options.symmetric, options.activation_bits
    )
    recipe = Recipe(
        options.method,
        scheme,
        tuple(parse_exception(text, scheme) for text in options.keep),
        options.search,
        options.format,
        options.samples,
        options.length,
        options.seed,
        options.arithmetic,
        _training(options),
    )
    from quantize import job

    if options.config_only:
        result = job.quantize_config(Path(options.model), recipe, out=options.out, cache=options.cache)
    elif options.dry_run:
        _dry_run(options, recipe)
        return None
    else:
        from quantize.progress import reporter, step_reporter

        with reporter() as progress, step_reporter() as observe:
            result = job.quantize_model(
                options.model,
                recipe,
                out=options.out,
                cache=options.cache,
                calibration=options.calibration,
                target_gib=options.target_gib,
                budget=int(options.ram_gib * 2**30),
                progress=progress,
                device=options.device,
                corpus=options.corpus,
                observe=observe,
                shard_bytes=_shard_bytes(options.shard_gb),
            )
        if options.fidelity is not None and _FIRST:
            _fidelity(options, recipe, result.path)
    return asdict(result) | {"path": str(result.path), "seconds": round(result.seconds, 3)}


def _shard_bytes(gigabytes: float) -> int:
    if not 1e-9 <= gigabytes <= 1e6:  # NaN is no such number
        raise OutputError(f"--shard-gb {gigabytes:g}", "1e-9 to 1e6", "Leave it out: it is 5 then")
    return int(gigabytes * 10**9)


def _training(options: argparse.Namespace) -> Any:
    """The training of qat and qad; None for the other methods. Raises SchemeError for its options without it."""
    from quantize.errors import SchemeError
    from quantize.training import METHODS, default_training

    given = {name: getattr(options, _FIELDS.get(name, name)) for name in _TRAINING}
    given = {name: value for name, value in given.items() if value is not None}
    if options.method in METHODS:
        return default_training(options.method, **{_FIELDS.get(name, name): value for name, value in given.items()})
    if given or options.corpus:
        named = [f"--{name.replace('_', '-')}" for name in given] + ["--corpus"] * bool(options.corpus)
        raise SchemeError(
            f"{', '.join(named)} with --method {options.method}",
            " and ".join(METHODS),
            "Choose --method qad, or leave them out",
        )
    return None


def _dry_run(options: argparse.Namespace, recipe: Any) -> None:
    from dataclasses import replace

    from rich.console import Console

    from quantize import estimate, job
    from quantize.blocks import family_of
    from quantize.devices import parse as parse_devices
    from quantize.weights import read_config

    path = Path(options.model)
    device = parse_devices(options.device)[0]
    source: Any
    if path.is_file() or (path.is_dir() and not any(path.glob("*.safetensors"))):  # a shape: config.json alone
        source = read_config(path)
        plan = recipe.plan(family_of(source.get("model_type")), int(source["num_hidden_layers"]))
        tokens, form = recipe.samples * recipe.length, None
    else:
        wanted = {"calibration": options.calibration, "target_gib": options.target_gib, "device": device}
        request = job.prepare(options.model, recipe, **wanted)
        source, plan, recipe, form = request.source, request.plan, request.recipe, request.format
        tokens = sum(map(len, request.samples.sequences)) if request.samples else 0
    rounding = recipe.start.method if recipe.start else "rtn" if recipe.training else recipe.method
    found = estimate.estimate(
        source, plan, rounding, tokens, format=form, search=recipe.search, length=recipe.length, device=device
    )
    if recipe.training:
        learning = estimate.training_seconds(source, recipe.training, device)
        found = replace(found, method=recipe.method, seconds={**found.seconds, "training": learning})
    estimate.show(found, Console())


def _fidelity(options: argparse.Namespace, recipe: Any, checkpoint: Path) -> None:
    """Compare with the original, and write what came out beside the weights.

    On the file that --fidelity names; without one, on what the calibration text has beyond what was calibrated on.
    Where it has no more, on that, which is said.
    """
    from quantize import evaluation_text, fidelity
    from quantize.devices import parse as parse_devices
    from quantize.weights import locate

    model = locate(options.model)
    file = Path(options.fidelity) if options.fidelity else None
    text = evaluation_text.choose(model, recipe, file, options.calibration)
    found = fidelity.report(model, checkpoint, text.sequences, parse_devices(options.device)[0])
    fidelity.write(found, checkpoint)
    whole = found.whole
    print(
        f"KL {whole.kl_nats:.5f} nat a token, same most likely token {whole.top1_agreement:.2%}, perplexity "
        f"{whole.perplexity_original:.3f} -> {whole.perplexity_quantized:.3f}  "
        f"({whole.positions} tokens of {text.origin})\n"
        f"each layer: {checkpoint}/fidelity.csv, .json and .png",
        file=sys.stderr,
    )


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Quantize a model, one decoder block in memory at a time, into a checkpoint that vLLM serves.",
        epilog="Stopped or killed, the same command goes on from the last finished block.",
    )
    parser.add_argument("model", help="a model's directory, or its name on the hub")
    parser.add_argument("--method", default="awq", help=f"{_METHODS} (default awq)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="DIR", help="where the checkpoint goes (default: the user's cache)")
    place.add_argument("--cache", type=Path, metavar="DIR", help="another cache to look in and write to")

    scheme = parser.add_argument_group("what a weight becomes")
    scheme.add_argument("--bits", type=int, help="2, 3, 4 or 8 (default 4; 8 for smoothquant)")
    scheme.add_argument("--group-size", type=int, metavar="N", help="32, 64, 128, or -1: a row (default 128)")
    kind = scheme.add_mutually_exclusive_group()
    kind.add_argument(
        "--sym", dest="symmetric", action="store_true", default=None, help="no zero points (gptq's default)"
    )
    kind.add_argument("--asym", dest="symmetric", action="store_false", help="zero points (the others' default)")
    scheme.add_argument("--activation-bits", type=int, metavar="8", help="W8A8: per-token int8 activations")
    scheme.add_argument("--search", help="grids by minmax, mse or (gptq) output (default: the method's own)")
    scheme.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help='other bits for layers whose name matches, e.g. "down_proj=8bit" or "layers\\.0\\.=16bit"; "lm_head=8bit" '
        "quantizes the output head, which is kept otherwise; repeatable",
    )
    scheme.add_argument(
        "--target-gib", type=float, metavar="GIB", help="choose the bits of each layer to fit this size"
    )
    scheme.add_argument("--format", help="awq, gptq or compressed-tensors (default: what suits the scheme)")

    data = parser.add_argument_group("calibration")
    data.add_argument("--calibration", type=Path, metavar="FILE", help=".txt or .jsonl (default: the model's own)")
    data.add_argument("--samples", type=int, default=128, help="calibrate on samples x length tokens (default 128)")
    data.add_argument("--length", type=int, default=512, help="longest sequence, in tokens (default 512)")
    data.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")

    _add_training(parser.add_argument_group("training (qat learns from the text, qad from the model as it was)"))
    how = parser.add_argument_group("how")
    how.add_argument(
        "--arithmetic",
        default="float32",
        help="of the calibration forward: float32, or bfloat16, quicker where the processor has it (default float32)",
    )
    how.add_argument(
        "--device", "--devices", help="cpu or cuda (default: the GPU if there is one), or several: cuda:0,cuda:1"
    )
    how.add_argument("--ram-gib", type=float, default=0.0, help="activations in memory; the rest on disk (default 0)")
    how.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="most that a file of the checkpoint holds (default 5)"
    )
    how.add_argument("--dry-run", action="store_true", help="say sizes, time and what fits a 16 GB card; write nothing")
    how.add_argument(
        "--fidelity",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare with the original afterwards, on FILE or on other text of the calibration set: table and figure",
    )
    how.add_argument("--config-only", action="store_true", help="write config.json alone, for --load-format dummy")
    return parser


_TRAINING: dict[str, tuple[type | None, str]] = {
    "start_from": (str, "what training begins with: a method above, or none, the model itself (default gptq)"),
    "steps": (int, "of the optimizer (default 150)"),
    "batch": (int, "tokens of a step (default 8192)"),
    "micro": (int, "tokens at a time; gradients add up over a step (default 2048)"),
    "corpus_tokens": (int, "how much the model writes where there is no --corpus (default 262144)"),
    "rate": (float, "AdamW's learning rate (default: 0.008 of the mean quantization step)"),
    "scale_rate": (float, "of the logarithms of the scales (default 0.003)"),
    "warmup": (float, "share of the steps in which the rate rises (default 0.05); it falls along a cosine"),
    "freeze": (float, "share of the steps after which the scales stay (default 0.9)"),
    "scales": (str, "learned (LSQ) or recomputed from the weights' range at each step (default learned)"),
    "train_precision": (str, "of the products: fp32, bf16 or fp16; the rest is float32 (default fp32)"),
    "loss_scale": (str, "fp16's: dynamic or none (default dynamic)"),
    "clip": (float, "the gradient's largest norm (default 1)"),
    "checkpointing": (None, "compute activations again in the backward pass instead of keeping them"),
    "temperature": (float, "of teacher and student in qad's loss (default 1)"),
    "cross_entropy": (float, "its share of the loss, the rest is qad's KL (default 0; 1 for qat)"),
    "hidden": (float, "weight of the loss of hidden states (default 0)"),
    "top_k": (int, "keep the teacher's k likeliest tokens on disk instead of running it each time"),
    "save": (int, "steps between states on disk, from which a killed run goes on (default 50)"),
    "evaluate": (int, "how many times the held-out loss is taken; the best state is kept (default 10)"),
}
"""Options of a training: type (None: a switch) and help."""

_FIELDS = {"start_from": "start", "train_precision": "precision"}
"""Those that `training.Training` has another name for. (torchrun takes --start for one of its own.)"""


def _add_training(group: Any) -> None:
    group.add_argument("--corpus", type=Path, metavar="FILE", help="what to train on (default: the model writes it)")
    for name, (kind, text) in _TRAINING.items():
        flag, target = f"--{name.replace('_', '-')}", _FIELDS.get(name, name)
        if kind is None:
            group.add_argument(flag, dest=target, action="store_true", default=None, help=text)
        else:
            group.add_argument(flag, dest=target, type=kind, metavar=kind.__name__.upper(), help=text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what lies in temporary directories goes as by Ctrl-C
    sys.exit(main())
