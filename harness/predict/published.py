"""Published measurements that the predictor is held against, and the rule that says which of them count.

    published.csv ─► read() ─► Row ─► case() ─► Case: what was run (Condition) and what came out, or why it is left out

The rows are carried as they were found (scenarios/catalogue/published.csv; published_sources.csv has the addresses), so
the reading of them is code that can be looked at. **The rule was committed before anything was fitted.** A row is kept
when its conditions are complete, that is when all of these hold:

1. what was measured is a quantity that a sweep reports: output tokens a second, TTFT, TPOT (or one that follows from
   these by the lengths: total tokens, requests a second, the latency of one batch). How long a whole run took is none:
   it repeats the throughput beside it, or tells how requests came, not how they were served;
2. it is one card, of a named kind that the catalogue has;
3. the model is a dense decoder whose shape the catalogue has;
4. it was served by vLLM, a fork of it, or SGLang, of a stated version: engines that batch continuously over a paged KV
   cache and replay CUDA graphs. Other engines (transformers, llama.cpp, TensorRT-LLM ...) are not what is predicted;
5. the precision is stated, and the kernel follows from it and the version;
6. input and output length are stated as numbers, or by the name of a data set whose lengths are published;
7. the load is stated: one stream, n users, n requests at once, or Poisson arrivals with their number;
8. whoever published or transcribed the row does not call it noisy, presumed, crippled or eager, and it was not timed
   across the internet.

A row that is left out keeps the first of these that it breaks as its reason. Its error is reported too where its
conditions can be guessed (`guess`), but nothing is fitted to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from harness.records import read_table
from harness.scenario import scenarios_dir

Quantity = Literal["tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"]
"""What a sweep would report; tok_s: output tokens of all requests over the time that they took together."""
Era = Literal["v0", "v1"]
"""v0: whole prompts go first and decodes wait (vLLM before 0.8). v1: chunked prefill (vLLM from 0.8, SGLang)."""
LoadKind = Literal["users", "burst", "poisson"]


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement, as it was found."""

    source: str
    gpu: str
    model: str
    engine: str
    engine_version: str
    precision: str
    group_size: str
    input_len: str
    output_len: str
    load: str
    metric: str
    value: float
    unit: str
    note: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers: means, and how far an answer may go where it ends by itself."""

    input_mean: float
    output_mean: float
    output_cap: int | None = None
    """None: every answer is as long as the mean."""
    input_sigma: float = 0.0
    """Spread of the prompts' lengths, of their logs; 0: all are as long as the mean."""


@dataclass(frozen=True, slots=True)
class PublishedLoad:
    kind: LoadKind
    n: int
    """users: how many; burst and poisson: requests."""
    rate_rps: float = 0.0


@dataclass(frozen=True, slots=True)
class Condition:
    """What was run, in the words of the catalogue."""

    card: str
    shape: str
    kernel: str
    """A key of roofline.KERNELS: 16bit, marlin, awq-gemm, exllama, w8a8, w8a16, fp8."""
    era: Era
    engine: str
    version: str
    lengths: Lengths
    load: PublishedLoad
    max_num_seqs: int = 256
    max_model_len: int = 4096
    graphs_to: int | None = None
    """Longest context that decodes by CUDA graph; None: all do."""
    streamed: bool = True
    """Somebody listened; False: a batch that was answered at its end."""


@dataclass(frozen=True, slots=True)
class Case:
    """A row that says enough to be predicted: what was run and what came out; or the reason why it is left out."""

    row: Row
    condition: Condition | None = None
    quantity: Quantity | None = None
    value: float | None = None
    left_out: str | None = None
    """The part of the rule that it breaks; None: it is kept. A row may break it and still have a guessed condition."""

    @property
    def kept(self) -> bool:
        return self.left_out is None


@cache
def read() -> tuple[Row, ...]:
    """All carried rows."""
    return tuple(read_table(scenarios_dir() / "catalogue" / "published.csv", Row))


@cache
def cases() -> tuple[Case, ...]:
    return tuple(case(row) for row in read())


CARDS = {
    "A100-80GB": "a100-80gb-sxm",  # which form is not said; bandwidths differ by 5 %
    "A100-SXM4-80GB": "a100-80gb-sxm",
    "A100-SXM4-40GB": "a100-40gb-sxm",
    "A100 PCIe 80GB": "a100-80gb-pcie",
    "A800-SXM4-80GB": "a800-80gb-sxm",
    "A10G 24GB": "a10g",
    "A10 24GB": "a10",
    "A40 48GB": "a40",
    "H20 96GB": "h20-96gb",
    "H20-3e 141GB": "h20-3e-141gb",
    "H200 141GB": "h200-141gb-sxm",
    "H100 SXM 80GB": "h100-80gb-sxm",
    "H100 (GCP)": "h100-80gb-sxm",  # that cloud rents no other form
    "H100 PCIe 80GB": "h100-80gb-pcie",
    "L4 24GB": "l4",
    "L40 48GB": "l40",
    "L40S 48GB": "l40s",
    "RTX 3090 24GB": "rtx-3090",
    "RTX 3090 Ti 24GB": "rtx-3090-ti",
    "RTX 4090 24GB": "rtx-4090",
    "RTX 4090 D 24GB": "rtx-4090-d",
    "RTX 5090 32GB": "rtx-5090",
    "RTX A5000 24GB": "rtx-a5000",
    "RTX A6000 48GB": "rtx-a6000",
    "RTX 5000 Ada 32GB": "rtx-5000-ada",
    "RTX PRO 5000 Blackwell 48GB": "rtx-pro-5000-blackwell",
    "T4 16GB": "t4",
    "V100 32GB": "v100-32gb-pcie",
    "V100S 32GB": "v100s-32gb-pcie",
}
"""Published name -> id in gpus.toml."""

SHAPES = {
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Meta-Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "DeepSeek-R1-Distill-Llama-8B": "llama-3.1-8b",
    "Meta-Llama-3-8B-Instruct": "llama-3-8b",
    "LLaMA-3-8B": "llama-3-8b",
    "Llama-3-8B": "llama-3-8b",
    "Llama-2-7b-chat-hf": "llama-2-7b",
    "Llama-2-7B": "llama-2-7b",
    "llama2-7b": "llama-2-7b",
    "Llama-2-13B": "llama-2-13b",
    "OpenHermes-2.5-Mistral-7B": "mistral-7b",
    "OpenHermes-2.5-Mistral-7B-GPTQ": "mistral-7b",
    "OpenHermes-2.5-Mistral-7B-marlin": "mistral-7b",
    "Mistral-7B-AWQ": "mistral-7b",
    "Mistral-7B": "mistral-7b",
    "Mistral-7B-Instruct-v0.3": "mistral-7b",
    "Qwen2-0.5B-Instruct": "qwen2.5-0.5b",  # Qwen2 and Qwen2.5 of one size have the same shape
    "Qwen2-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen2-7B-Instruct": "qwen2.5-7b",
    "Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen2.5-3B-Instruct": "qwen2.5-3b",
    "Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "Qwen2.5-14B-Instruct": "qwen2.5-14b",
    "DeepSeek-R1-Distill-Qwen-14B": "qwen2.5-14b",
    "Qwen3-0.6B": "qwen3-0.6b",
    "Qwen3-1.7B": "qwen3-1.7b",
    "Qwen3-4B": "qwen3-4b",
    "Qwen3-4B-Instruct-2507": "qwen3-4b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-14B": "qwen3-14b",
}
"""Published name -> id in scenarios/shapes."""

_SERVERS = {"vLLM", "nm-vllm (vLLM fork)", "SGLang"}
_DATASETS = {
    # AccelMark's data sets (its datasets/*/requests.jsonl): mean of the prompts by the server's count, chat template
    # included, and the spread of the lengths that it lists (64 to 592 and 20 to 198 tokens; 28,245 to 29,932).
    "~256 mean (ShareGPT std v1)": (256.0, 0.65),
    "~103 mean (ShareGPT edge v1)": (103.0, 0.65),
    "~28.7K p50 (long ctx)": (28_700.0, 0.02),
}
_MEANS = re.compile(r"~?(\d+(?:\.\d+)?)(?: mean(?:[ ,(]+(?:cap )?(\d+)(?: cap)?\)?)?)?$")
_DOUBTS = ("noisy", "presumed", "crippled", "enforce_eager", "over WAN", "WAN;", "LOW DETAIL", "DirectML")


def case(row: Row) -> Case:
    """A row by the rule: kept, or left out with the reason; and its condition as far as it can be told."""
    reason = None
    for broken in (_quantity, _card, _shape, _server, _kernel, _lengths, _load, _doubt):
        reason = reason or broken(row)
    return Case(row, *_guess(row), left_out=reason)


# --- the rule, one part a function: None where it is kept -------------------------------------------------------------


def _quantity(row: Row) -> str | None:
    return None if quantity(row) else f"1 quantity: {row.metric}"


def _card(row: Row) -> str | None:
    return None if row.gpu in CARDS else f"2 card: {row.gpu}"


def _shape(row: Row) -> str | None:
    return None if row.model in SHAPES else f"3 model: {row.model}"


def _server(row: Row) -> str | None:
    if row.engine not in _SERVERS:
        return f"4 engine: {row.engine}"
    return None if version(row.engine_version) or _dated(row) else "4 engine: no version"


def _kernel(row: Row) -> str | None:
    return None if kernel(row) and "likely" not in row.precision else f"5 precision: {row.precision}"


def _lengths(row: Row) -> str | None:
    return None if lengths(row) else "6 lengths: not stated"


def _load(row: Row) -> str | None:
    return None if load(row) else f"7 load: {row.load}"


def _doubt(row: Row) -> str | None:
    text = f"{row.note} {row.precision} {row.engine_version}"
    return next((f"8 doubt: {word}" for word in _DOUBTS if word in text), None)


# --- reading ----------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Quantity] = {
    "ttft_p50": "ttft_p50_ms",
    "median_ttft_ms": "ttft_p50_ms",
    "ttft_p99": "ttft_p99_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "tpot_p50": "tpot_p50_ms",
    "median_tpot_ms": "tpot_p50_ms",
    "tpot_p99": "tpot_p99_ms",
    "p99_tpot_ms": "tpot_p99_ms",
    "output_throughput": "tok_s",
    "total_throughput": "tok_s",
    "token_throughput": "tok_s",
    "request_throughput": "tok_s",
    "e2e_latency": "tok_s",
}


def quantity(row: Row) -> Quantity | None:
    return _PLAIN.get(row.metric)


def version(text: str) -> tuple[int, ...]:
    """(0, 7, 3) of "0.7.3"; () where there is no number."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _dated(row: Row) -> bool:
    """A month stands for the version of a pull request that was measured on the main branch."""
    return row.engine_version in {"Jan 2024", "Aug 2025 (PR)"}


def era(row: Row) -> Era:
    """SGLang chunks prompts as vLLM does since 0.8; a fork of vLLM has its number."""
    numbers = version(row.engine_version)
    if row.engine == "SGLang" or row.engine_version.startswith("Aug 2025"):
        return "v1"
    return "v1" if numbers >= (0, 8) else "v0"


_KERNELS = (
    # (words of the published precision, kernel); the first that is found.
    ("forced => exllama", "exllama"),
    ("exllama kernel", "exllama"),
    ("awq_marlin", "marlin"),
    ("INT4 Marlin", "marlin"),
    ("RTN-Marlin", "marlin"),
    ("AWQ gemm (main)", "awq-gemm"),
    ("dequant+FP16 matmul", "awq-dequant"),
    ("W8A16", "w8a16"),
    ("INT8 GPTQ", "w8a16"),
    ("FP8", "fp8"),
    ("W8A8", "w8a8"),
)
_SIXTEEN = frozenset({"BF16", "FP16", "BF16 (presumed)", "FP16/BF16 (auto dtype)"})


def kernel(row: Row) -> str | None:
    """The kernel behind the linear layers; None where the published words do not tell it.

    vLLM takes Marlin for GPTQ of itself since 0.4.2 (its pull request 3922) and for AWQ since 0.5.3 (6612), on cards
    from compute capability 8.0; before that exllama, and its own AWQ GEMM, which since 0.3 unpacks the weights first
    from 256 tokens on (2566). Asked for "gptq", it took exllama until both were merged into one (37767 to 37770, March
    2026; 0.32 has auto_gptq.py), which is dated here as 0.19.
    """
    if row.precision in _SIXTEEN:
        return "16bit"
    if row.precision.startswith("INT8 RTN"):
        return "w8a16"
    numbers = version(row.engine_version)
    if "forced => exllama" in row.precision and row.engine == "vLLM":
        # AccelMark's runner asks for "gptq" where it gives its engine a batch, and lets its server choose for itself
        # (runners/nvidia_vllm_47f5d58e/runner.py, load_model: only llm_kwargs has quantization).
        chosen = numbers >= (0, 19) or not row.load.startswith("offline")
        return "marlin" if chosen and not row.gpu.startswith("V100") else "exllama"
    if row.precision == "INT4 GPTQ" and row.engine == "vLLM":
        return "marlin" if numbers >= (0, 4, 2) else "exllama"
    if row.precision == "INT4 AWQ" and row.engine == "vLLM" and numbers:
        return "marlin" if numbers >= (0, 5, 3) else "awq-dequant" if numbers >= (0, 3) else "awq-gemm"
    if row.precision.startswith("INT4 GPTQ (auto-Marlin"):
        return "marlin"
    return next((kernel for words, kernel in _KERNELS if words in row.precision), None)


def lengths(row: Row) -> Lengths | None:
    """Means and cap of the lengths; None where they are not stated."""
    given = _DATASETS.get(row.input_len)
    if given is None:
        given = (float(row.input_len), 0.0) if row.input_len.isdecimal() else None
    answer = _MEANS.match(row.output_len)
    if given is None or answer is None or not float(answer[1]):
        return None
    return Lengths(given[0], float(answer[1]), int(answer[2]) if answer[2] else None, given[1])


_POISSON = re.compile(r"Poisson ([\d.]+) QPS(?:, (\d+) reqs)?")
_BURST = re.compile(r"(?:offline, )?(\d+) (?:reqs|requests|prompts)(?: at once)?$")
_COUNTED = re.compile(r"Poisson arrivals, (\d+) requests")


def load(row: Row) -> PublishedLoad | None:
    """Users, a burst, or Poisson arrivals; None where the load is not stated."""
    if row.load.isdecimal():
        return PublishedLoad("users", int(row.load))
    if found := _POISSON.match(row.load):
        count = found[2] or (counted[1] if (counted := _COUNTED.search(row.note)) else None)
        return PublishedLoad("poisson", int(count), float(found[1])) if count else None
    if found := _BURST.match(row.load):
        return PublishedLoad("burst", int(found[1]))
    return None


def _guess(row: Row) -> tuple[Condition | None, Quantity | None, float | None]:
    """Condition, quantity and value of a row, whether or not it is kept; None where they cannot be told."""
    found, sizes, pressure, how = quantity(row), lengths(row), load(row), kernel(row)
    if found == "tok_s" and "one-batch bench" in row.note and row.metric == "output_throughput":
        found = "tpot_p50_ms"  # SGLang's bench_one_batch tells the decode steps' tokens a second
    if found is None or sizes is None or pressure is None or how is None:
        return None, None, None
    if row.gpu not in CARDS or row.model not in SHAPES:
        return None, None, None
    value = _as_tok_s(row, sizes, pressure) if found == "tok_s" else row.value
    if found == "tpot_p50_ms" and row.unit == "tok/s":
        value = 1e3 * pressure.n / row.value
    if value is None:
        return None, None, None
    accelmark = row.source.startswith("accelmark")
    condition = Condition(
        card=CARDS[row.gpu],
        shape=SHAPES[row.model],
        kernel=how,
        era=era(row),
        engine=row.engine,
        version=row.engine_version,
        lengths=sizes,
        load=pressure,
        # AccelMark's runner gives 512 to its batch engine and leaves the server's default to the other.
        max_num_seqs=512 if accelmark and pressure.kind == "burst" else 256,
        max_model_len=_context(row, sizes),
        streamed=pressure.kind != "burst" and row.source in _streaming(),
        # The default of max_seq_len_to_capture in the first engines; the page for Qwen2 says that it kept the defaults.
        graphs_to=8192 if row.engine == "vLLM" and () < version(row.engine_version) < (0, 6) else None,
    )
    return condition, found, value


@cache
def _streaming() -> frozenset[str]:
    """Sources that publish when tokens came: whoever knows that had them streamed."""
    return frozenset(
        row.source for row in read() if "ttft" in row.metric or "tpot" in row.metric or "itl" in row.metric
    )


def _context(row: Row, sizes: Lengths) -> int:
    """The server's context: AccelMark's suites state theirs; else 4,096, or as much as the lengths need."""
    stated = {"~28.7K p50 (long ctx)": 30_208, "~103 mean (ShareGPT edge v1)": 2048}.get(row.input_len)
    return stated or max(4096, int(sizes.input_mean + (sizes.output_cap or sizes.output_mean)) + 1)


def _as_tok_s(row: Row, sizes: Lengths, pressure: PublishedLoad) -> float | None:
    """Output tokens a second from what was published; None where it does not follow, or repeats another row.

    total (input and output) tokens: times output / (input + output). Requests a second: times output tokens. The time
    that a batch took: its output tokens over it.
    """
    output = sizes.output_mean
    if row.metric == "output_throughput":
        return row.value
    if row.metric in ("total_throughput", "token_throughput"):
        return row.value * output / (sizes.input_mean + output)
    if row.metric == "request_throughput":
        return row.value * output
    return pressure.n * output / row.value if pressure.kind == "users" else None
