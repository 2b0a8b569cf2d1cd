"""How many tokens of KV cache an engine will have on a card, by what vLLM does when it starts.

    utilization × card memory
    ├── weights       16-bit parameters, quantized linear layers with their scales, the table of rotary positions
    ├── activation    the peak of one profile run, which is kept free for ever after
    ├── graphs        CUDA graphs; only engines that estimate them before (since 0.21) leave room for them
    ├── other         what the process takes beside PyTorch's tensors: kernels, workspaces
    └── KV cache      all that is left, in whole blocks:  tokens = ⌊bytes / bytes of a block⌋ × block size

Source: vllm/v1/worker/gpu_worker.py `determine_available_memory` (0.32.0: requested memory − what is gone from the
free memory after the profile run − the run's transient peak − the estimate of the graphs), vllm/worker/worker.py
`determine_num_available_blocks` before 0.8, and `num_blocks = available_memory // bytes_per_block` in
vllm/v1/core/kv_cache_utils.py. With a cache of given size (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE) nothing is
subtracted, and the tokens are exact.

The profile run computes T tokens, T the largest batch, and samples for R sequences. Two moments can be its peak:

    in the MLP        T × 6(I + H)           gate and up 2I, their product I; residual, input, norm 3H; 2 bytes each
    in the sampler    R × V × c + T × 4H     logits, and what top-k and top-p need; hidden states and residual

Engines before chunked prefill put whole prompts into T and, once prompts were chunked there, sampled for nobody. Until
0.17 the sampler sorts all logits (values, 64-bit indices, and the sort's own copies of both), then it no longer does.

A row of scenarios/catalogue/kv_logs.csv counts if it says everything that the formulas above ask for: version, memory
(its own log's total, else a card of the catalogue), a model whose size we compute, precision, utilization, longest
context, sequences and tokens a step (stated, or that engine's defaults where no flag is shown), and the size of the
cache in GiB or tokens. A row that lacks one is kept in the file, reported apart, and fitted to nothing. Starts that
differ only in a context length that changes nothing are one row. The rule asks for conditions and never for results,
but it is not blind: it was put down after some logs had been read, and the two moments of the peak, and the versions at
which constants change, were found in the same logs. Errors below are of known rows, not of unseen ones.

Fitted to the rows that count are four medians (kv_logs.py `fit`; the tests fit them again), and the estimate of graphs:

    c        until 0.16   37.8     13 logs, 11 of them 36.7 to 38.2 (14.2: FlashInfer samples; 302: other flags)
             since 0.17   14.4     16 logs, 12.5 to 14.5
    other    until 0.17   0.10     21 logs, 0.01 to 0.35 GiB and one of 1.79 (0.35: CUDA's context, counted until 0.6.4)
             since 0.18   0.25     16 logs, 0.24 to 0.26
    graphs   since 0.21   0.35 for 5 of them (1 log), 0.84 for all 51 (14 logs of 0.19, 0.52 to 0.84)

The 41 rows that count: median error of the KV tokens 0.1 %, 38 within 7 %. Each card fitted by the others: 0.6 %, 38
within. 22 rows are of H100s, most by one author; of the other 19 the median is 1.5 % and 16 are within. No row that
counts is of a 16 GB card but the two T4s, and five are of engines since 0.21. test_memory.py says which are outside and
why. Six starts of vLLM 0.32.0 on a CPU are exact.

Out of reach: models whose layers have sliding windows (vLLM shares blocks between kinds of layers; here every layer
keeps everything), several cards, and memory that other processes take while the engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.architecture import Architecture
from harness.errors import InputError, ModelError
from harness.models import GIB
from harness.predict.cards import Card
from harness.predict.roofline import KERNELS, kernel_of, weight_bytes

CAPTURE_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Batch sizes for which vLLM captures a graph, up to twice max_num_seqs (0.19: 51 of them)."""
FEW_GRAPHS = (5, 0.35)
"""vLLM's own estimate in GiB for so many graphs: one log, of 0.22 on an RTX 3090 with max_num_seqs 8."""
ALL_GRAPHS = (len(CAPTURE_SIZES), 0.84)
"""The same for all of them: median of 14 logs of 0.19 on an H100, 0.52 to 0.84."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What a line of vLLM versions keeps free. Constants: see the module's docstring."""

    logit_bytes: float
    """c: bytes of the sampler for each logit."""
    other_gib: float
    whole_prompts: bool = False
    """The profile run has prompts of max_model_len."""
    samples: bool = True
    """The profile run samples."""
    graphs: bool = False
    """The estimate of the CUDA graphs is subtracted."""


ENGINES = {
    "v0": Engine(37.8, 0.10, whole_prompts=True),
    "v0-chunked": Engine(37.8, 0.10, samples=False),
    "v1": Engine(37.8, 0.10),
    "v1-0.17": Engine(14.4, 0.10),
    "v1-0.18": Engine(14.4, 0.25),
    "v1-0.21": Engine(14.4, 0.25, graphs=True),
}
"""v0: before 0.8, and later on cards older than Ampere until 0.9; chunked where max_model_len > 32,768."""
CURRENT = ENGINES["v1-0.21"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one engine on one card. None where a cache of given size makes it nobody's concern."""

    weights_gib: float
    activation_gib: float | None
    graphs_gib: float | None
    other_gib: float | None
    kv_gib: float
    """In whole blocks."""
    kv_tokens: int
    kv_blocks: int


def memory(
    card: Card,
    shape: Architecture,
    precision: str,
    *,
    gpu_memory_utilization: float = 0.9,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int,
    block_size: int = 16,
    kv_cache_gib: float | None = None,
    eager: bool = False,
    kv_bits: int = 16,
    engine: Engine = CURRENT,
) -> Memory:
    """The split of a card's memory.

    block_size: `default_block_size(card)`. kv_cache_gib: the cache of given size, the only way on a CPU. kv_bits: 8 for
    --kv-cache-dtype fp8. Raises ModelError when not even one request of max_model_len tokens fits; it names a precision
    that would.
    """
    weights = weights_gib(card, shape, precision)
    parts: tuple[float, float, float] | None = None
    if kv_cache_gib is not None:
        left = kv_cache_gib
        fits = weights + kv_cache_gib <= card.memory_gib
    elif card.generation == "cpu":
        raise InputError(f"{card.name}: the size of its KV cache is not known", remedy="say how many GiB: kv_cache_gib")
    else:
        tokens = max(max_model_len, max_num_batched_tokens) if engine.whole_prompts else max_num_batched_tokens
        estimate = graphs_gib(max_num_seqs) if engine.graphs and not eager else 0.0
        parts = activation_gib(shape, max_num_seqs, tokens, engine), estimate, engine.other_gib
        left = card.memory_gib * gpu_memory_utilization - weights - sum(parts)
        fits = True
    block = shape.kv_bytes_per_token * kv_bits // 16 * block_size
    blocks = max(0, int(left * GIB // block))
    if not fits or blocks * block_size < max_model_len:
        request = shape.kv_bytes_per_token * kv_bits / 16 * max_model_len / GIB
        usable = card.memory_gib * (gpu_memory_utilization if kv_cache_gib is None else 1.0)
        raise _does_not_fit(
            card, shape, precision, weights, max(request, kv_cache_gib or 0.0), sum(parts or ()), usable
        )
    activation, graphs, other = parts or (None, None, None)
    return Memory(weights, activation, graphs, other, blocks * block / GIB, blocks * block_size, blocks)


def default_block_size(card: Card) -> int:
    """Tokens of a block that vLLM takes by default."""
    return 128 if card.generation == "cpu" else 16


def default_batch(card: Card) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) of a server started without them: vllm/engine/arg_utils.py of 0.32.0."""
    if card.generation == "cpu":
        return 128, 2048
    if card.memory_gib >= 160:
        return 1024, 16384
    if card.memory_gib >= 70 and "a100" not in card.name.lower():
        return 1024, 8192
    return 256, 2048


def weights_gib(card: Card, shape: Architecture, precision: str) -> float:
    """What is loaded: the linear layers as the kernel stores them, all else in 16 bit, and the rotary table.

    The table holds a sine and a cosine for each position and each half of a head: max_positions × head_dim × 2 bytes.
    A shape with a quantization of its own is that precision, whatever it is called.
    """
    table = (shape.max_positions or 0) * shape.head_dim * 2
    if shape.quantization is not None:
        return (shape.weight_bytes + table) / GIB
    kernel = KERNELS[kernel_of(card, precision)]
    if precision.partition("@")[0] == "awq":  # whichever kernel reads them
        kernel = replace(kernel, zeros=True)
    linear = shape.layers * sum(weight_bytes(kernel, *linear) for linear in shape.linears)
    return (linear + 2 * (shape.parameters - shape.linear_parameters) + table) / GIB


def activation_gib(shape: Architecture, max_num_seqs: int, tokens: int, engine: Engine = CURRENT) -> float:
    """The peak of a profile run of T tokens: max(T·6(I + H), R·V·c + T·4H) bytes."""
    mlp, logits = profiled(shape, max_num_seqs, tokens, engine)
    return max(mlp, logits * engine.logit_bytes + tokens * 4 * shape.hidden) / GIB


def profiled(shape: Architecture, max_num_seqs: int, tokens: int, engine: Engine) -> tuple[int, int]:
    """(bytes at the peak in the MLP, logits that the sampler sees) of a profile run of T tokens."""
    sequences = min(max_num_seqs, tokens) if engine.samples else 0
    return tokens * 6 * (shape.intermediate + shape.hidden), sequences * shape.vocabulary


def captured(max_num_seqs: int) -> int:
    """Batch sizes that get a graph."""
    return sum(size <= 2 * max_num_seqs for size in CAPTURE_SIZES)


def graphs_gib(max_num_seqs: int) -> float:
    """vLLM's estimate of its graphs: a straight line through the two numbers of graphs that logs are known of."""
    (few, least), (every, most) = FEW_GRAPHS, ALL_GRAPHS
    return least + (most - least) * (captured(max_num_seqs) - few) / (every - few)


def _does_not_fit(
    card: Card, shape: Architecture, precision: str, weights: float, cache: float, reserved: float, usable: float
) -> ModelError:
    """In the words of models.check_fits; all in GiB. `reserved`: what the engine keeps free."""
    beside = f" and {reserved:.2f} GiB for the engine itself" if reserved else ""
    problem = (
        f"The model in {precision} does not fit {card.name}: {weights:.1f} GiB of weights, {cache:.2f} GiB of KV cache "
        f"at least{beside}, where {usable:.1f} GiB may be used"
    )
    less = weights_gib(card, shape, "awq")
    if less < weights and less + reserved + cache <= usable:
        return ModelError(problem, remedy=f"take awq ({less:.1f} GiB of weights) or a shorter max_model_len")
    return ModelError(problem, remedy="take a smaller model, a shorter max_model_len, or a larger card")
