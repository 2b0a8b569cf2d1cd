"""The common claims about INT4 and BF16, and about AWQ and GPTQ, judged by a run's own rows.

A claim is a sentence as people say it, with one place where they do, and the trial that it is put to (trials.py). The
claims contradict each other, which is why each one is tried. A verdict is about this machine, this model and this load:
a claim that is refuted here is no law, and no more than that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.analysis.compare import compare
from harness.analysis.evidence import EIGHT_BIT, Evidence
from harness.analysis.levels import compared, latest
from harness.analysis.sides import MOST, ONE_USER, SAFE, SOME_USERS, Sides
from harness.analysis.trials import (
    SIZE_SHARE,
    Finding,
    Trial,
    above,
    below,
    equal,
    fading,
    file_size,
    kernels_only_for_other,
    less_energy,
    long_prompts,
    loses_less,
    more_users,
    own_failures,
    rivals_eight_bits,
    size,
    slow_on_fallback,
)
from harness.records import Knee, Ratio, RequestRecord, SweepPoint
from harness.variants import is_baseline, precision_of, split


@dataclass(frozen=True, slots=True)
class Claim:
    topic: str
    says: str
    source: str
    """A place where it is said, or said with figures."""
    trial: Trial


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim and what the run says to it, for a pair of its precisions; both are "" where it lacks one of the two."""

    claim: Claim
    finding: Finding
    one: str = ""
    other: str = ""


def judge(
    points: Sequence[SweepPoint],
    requests: Sequence[RequestRecord],
    knees: Sequence[Knee],
    ratios: Sequence[Ratio],
    checkpoint_bytes: Mapping[str, int] | None = None,
    evidence: Evidence | None = None,
) -> tuple[list[Judged], list[Judged]]:
    """(INT4 against BF16, AWQ against GPTQ): each claim for each 4-bit precision, and for the first AWQ and GPTQ.

    `ratios` are those of `compare` against the run's baseline.
    """
    names = list(dict.fromkeys(point.precision for point in points))
    by_precision, failed = {knee.precision: knee for knee in knees}, failures(requests)

    def sides(one: str, other: str, paired: Sequence[Ratio]) -> Sides:
        rows = [point for point in latest(points) if point.precision in (one, other)]
        return Sides(one, other, rows, paired, by_precision, failed, checkpoint_bytes, evidence)

    against = {one: base for one, base in compared(points).items() if is_baseline(base) and is_int4(one)}
    int4 = [sides(one, base, [ratio for ratio in ratios if ratio.precision == one]) for one, base in against.items()]
    base = any(map(is_baseline, names))
    awq, gptq = _methods(names)
    both = [point for point in points if point.precision in (awq, gptq)]
    methods = [sides(awq, gptq, compare(both, requests, baseline=gptq))] if awq and gptq else []
    return (
        _judged(INT4_AGAINST_BF16, int4, "no 4-bit precision in this run" if base else "no BF16 in this run"),
        _judged(AWQ_AGAINST_GPTQ, methods, f"no {'GPTQ' if awq else 'AWQ'} in this run"),
    )


def _methods(names: Sequence[str]) -> tuple[str, str]:
    """The first AWQ and the first GPTQ with the same engine arguments, else whichever there is; "" for none."""
    awq, gptq = ([name for name in names if is_method(name, method)] for method in ("awq", "gptq"))
    pairs = [(one, two) for one in awq for two in gptq if split(one)[1] == split(two)[1]]
    if pairs:
        return pairs[0]
    return (awq[0] if awq else "", "" if awq else gptq[0] if gptq else "")


def is_method(precision: str, method: str) -> bool:
    """Whether a precision's name says that it is this method and no mixture: awq and awq-g32, but not awq+gptq."""
    return _words(precision) & {"awq", "gptq"} == {method}


def is_int4(precision: str) -> bool:
    """Whether a precision's name says 4-bit weights: the bits, or a method that makes 4 unless it is told otherwise."""
    words = _words(precision)
    other_bits = EIGHT_BIT | {"int3", "w3a16", "3bit", "int2", "w2a16", "2bit"}
    return bool(words & {"awq", "gptq", "rtn", "qat", "qad", "int4", "w4a16", "4bit"}) and not words & other_bits


def failures(requests: Sequence[RequestRecord]) -> dict[str, Counter[str]] | None:
    """Failed requests of each precision by kind; those that we cut ourselves have not failed. None without requests."""
    kinds: dict[str, Counter[str]] = {}
    for record in requests:
        precision = record.cell.rsplit("-", 2)[0]
        if record.error is not None and record.error != "cut":
            kinds.setdefault(precision, Counter())[record.error] += 1
    return kinds if requests else None


def _words(precision: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", precision_of(precision).lower()))


def _judged(claims: Sequence[Claim], pairs: Sequence[Sides], lacking: str) -> list[Judged]:
    if not pairs:
        return [Judged(claim, Finding("not measured", why=lacking)) for claim in claims]
    return [Judged(claim, claim.trial(sides), *sides.names) for claim in claims for sides in pairs]


# --- the claims -------------------------------------------------------------------------------------------------------

QUARTER = 0.30
"""4 of 16 bits, and what scales and the layers that stay in 16 bits add in a large model."""
MORE = 1.02
"""A size that is larger by more than packing and padding make of it."""

INT4_AGAINST_BF16: tuple[Claim, ...] = (
    Claim(
        "throughput, 1 user", "INT4 makes a model two to three times as fast",
        "https://github.com/casper-hansen/AutoAWQ", above("tok_s", ONE_USER, border=2.0),
    ),
    Claim(
        "throughput, 1 user", "INT4 pays for one request at a time, where reading the weights is the work",
        "https://arxiv.org/abs/2411.02355", above("tok_s", ONE_USER),
    ),
    Claim(
        "throughput, 16–32 users", "INT4 keeps its gain up to 16–32 requests at once",
        "https://github.com/IST-DASLab/marlin", above("tok_s", SOME_USERS),
    ),
    Claim(
        "throughput, most users", "INT4 has the lower throughput when many ask at once",
        "https://docs.vllm.ai/en/v0.7.1/_sources/features/quantization/auto_awq.md", below("tok_s", MOST),
    ),
    Claim(
        "throughput, most users", "INT4's gain fades as batches grow: dequantizing costs, and the work is compute",
        "https://arxiv.org/abs/2405.04532", fading("tok_s"),
    ),
    Claim(
        "p95", "INT4 cuts latency by a quarter or more",
        "https://trackai.dev/tracks/performance/latency-ttft/quantization-latency", below("p95_ms", SAFE, border=0.75),
    ),
    Claim(
        "p99", "INT4 cuts latency by a quarter or more",
        "https://trackai.dev/tracks/performance/latency-ttft/quantization-latency", below("p99_ms", SAFE, border=0.75),
    ),
    Claim(
        "TTFT", "INT4 takes longer to the first token: reading a prompt is compute, and dequantizing comes on top",
        "https://github.com/vllm-project/vllm/issues/2404", above("ttft_p50_ms", ONE_USER),
    ),
    Claim(
        "weights in memory", "4-bit weights take a quarter of the memory",
        "https://huggingface.co/docs/transformers/v4.53.0/quantization/gptq",
        size("weights_gib", most=QUARTER),
    ),
    Claim(
        "VRAM", "In vLLM a 4-bit model takes as much of the card as the original",
        "https://github.com/vllm-project/vllm/issues/2948", size("total_gib", 1 - SIZE_SHARE, 1 + SIZE_SHARE, gpu=True),
    ),
    Claim(
        "file size", "A 4-bit file is smaller by about 70 %",
        "https://docs.vllm.ai/en/v0.7.1/_sources/features/quantization/auto_awq.md", file_size(most=0.35),
    ),
    Claim(
        "KV room", "What the weights give up becomes KV cache",
        "https://github.com/vllm-project/vllm/issues/15204", size("kv_cache_tokens", least=1 + SIZE_SHARE, gpu=True),
    ),
    Claim(
        "concurrency", "INT4 carries more users inside the same service level",
        "https://lyceum.technology/magazine/gguf-vs-gptq-vs-awq-quantization/", more_users,
    ),
    Claim(
        "long context", "4-bit models hold up over long contexts",
        "https://neuralmagic.com/blog/how-well-do-quantized-models-handle-long-context-tasks", long_prompts,
    ),
    Claim(
        "failure kinds", "INT4 brings failures of its own",
        "https://github.com/vllm-project/vllm/issues/1573", own_failures,
    ),
    Claim(
        "kernels", "The kernel decides, not the format: on a fallback INT4 is the slower one",
        "https://theaiengineer.substack.com/p/quantization-in-practice-gptq-vs", slow_on_fallback,
    ),
    Claim(
        "energy", "INT4 takes less energy a token",
        "https://doi.org/10.34190/icair.5.1.4367", less_energy,
    ),
    Claim(
        "quality", "4-bit weights rival 8-bit ones in accuracy",
        "https://arxiv.org/abs/2411.02355", rivals_eight_bits,
    ),
)  # fmt: skip

AWQ_AGAINST_GPTQ: tuple[Claim, ...] = (
    Claim(
        "throughput, 1 user", "AWQ is slightly faster than GPTQ",
        "https://github.com/vllm-project/vllm/issues/1853", above("tok_s", ONE_USER),
    ),
    Claim(
        "throughput, 1 user", "GPTQ is twice as fast as AWQ for a single request",
        "https://huggingface.co/TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ/discussions/9",
        below("tok_s", ONE_USER, border=0.5),
    ),
    Claim(
        "throughput, most users", "AWQ is the slower one when many ask at once",
        "https://github.com/vllm-project/vllm/issues/3399", below("tok_s", MOST),
    ),
    Claim(
        "throughput, most users", "With the same kernel AWQ and GPTQ are equally fast",
        "https://aifoss.dev/blog/gptq-awq-gguf-vllm-production-inference-2026/", equal("tok_s", MOST),
    ),
    Claim(
        "p95", "AWQ has the higher latency",
        "https://huggingface.co/TheBloke/Llama-2-70B-Chat-AWQ/discussions/3", above("p95_ms", SAFE),
    ),
    Claim(
        "p99", "AWQ has the higher latency",
        "https://huggingface.co/TheBloke/Llama-2-70B-Chat-AWQ/discussions/3", above("p99_ms", SAFE),
    ),
    Claim(
        "TTFT", "GPTQ is the faster one to the first token",
        "https://github.com/HandH1998/QQQ/issues/15", above("ttft_p50_ms", ONE_USER),
    ),
    Claim(
        "weights in memory", "AWQ takes more memory than GPTQ",
        "https://github.com/mit-han-lab/llm-awq/issues/54", size("weights_gib", least=MORE),
    ),
    Claim(
        "file size", "AWQ and GPTQ files are of one size",
        "https://theneuralbase.com/awq/learn/advanced/comparing-awq-vs-gptq-in-prod/",
        file_size(1 - SIZE_SHARE, 1 + SIZE_SHARE),
    ),
    Claim(
        "concurrency", "AWQ is the better one for many users",
        "https://huggingface.co/TheBloke/Llama-2-70B-Chat-AWQ/discussions/3", more_users,
    ),
    Claim(
        "long context", "AWQ is the steadier one over long contexts",
        "https://shingo.online/wiki/concepts/gptq/", long_prompts,
    ),
    Claim(
        "failure kinds", "AWQ fails where GPTQ does not",
        "https://github.com/mit-han-lab/llm-awq/issues/54", own_failures,
    ),
    Claim(
        "kernels", "GPTQ has kernels on cards where AWQ has none",
        "https://docs.vllm.ai/en/v0.11.2/features/quantization/", kernels_only_for_other,
    ),
    Claim(
        "quality", "AWQ loses less accuracy than GPTQ",
        "https://aifoss.dev/blog/gptq-awq-gguf-vllm-production-inference-2026/", loses_less,
    ),
)  # fmt: skip
