"""What the scheduler is given: who asks what, the limits of the engine, and how long a step takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from harness.errors import InputError
from harness.predict.stretches import Served

WATERMARK = 0.01
"""Share of the blocks that the engine before V1 keeps free when it admits (vllm/core/block_manager.py)."""


class StepTime(Protocol):
    """How long a step takes; never 0."""

    def decode(self, sequences: int) -> tuple[float, float]:
        """(a, b): a step that gives each of `sequences` its next token, reading `context` cached tokens in all, takes
        a + b · context seconds."""

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        """Seconds of a step that computes `prompt` prompt tokens (chunks) besides `sequences` decodes over `context`
        cached tokens. `pairs`: query-key pairs of the prompt tokens (a chunk of n after s cached: n·s + n·(n+1)/2);
        `finishing`: prompts that end in this step and so get a token. Only `sequences` may be 0, with its context."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as its client sends it."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    user: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine was started with, and what lies between it and its clients."""

    kv_blocks: int
    block_size: int = 16
    """16 on CUDA, 128 on the CPU backend."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool = True
    """False: the engine before V1 (vLLM < 0.8)."""
    max_model_len: int | None = None
    request_s: float = 0.0
    """From the client's send to the scheduler: HTTP, tokenisation."""
    token_s: float = 0.0
    """From the end of a step to the client."""

    @property
    def spare_blocks(self) -> int:
        """Blocks that admission leaves free."""
        return 0 if self.chunked_prefill else int(WATERMARK * self.kv_blocks)

    def check(self, asked: Asked) -> None:
        """InputError for a request that could never be served, even alone."""
        tokens = asked.input_tokens + asked.output_tokens
        words = f"a request of {asked.input_tokens} + {asked.output_tokens} tokens"
        if min(asked.input_tokens, asked.output_tokens) < 1:
            raise InputError(f"{words} cannot be served", allowed="at least one token in and one out")
        if self.max_model_len is not None and tokens > self.max_model_len:
            raise InputError(
                f"{words} is longer than the context",
                allowed=f"{self.max_model_len} tokens (max_model_len)",
                remedy="ask for less, or raise max_model_len",
            )
        cache_tokens = (self.kv_blocks - self.spare_blocks) * self.block_size
        if tokens > cache_tokens:
            raise InputError(
                f"{words} does not fit the KV cache",
                allowed=f"{cache_tokens} tokens",
                remedy="ask for less, or leave more memory to the cache: fewer bits, a smaller model, a larger card",
            )
        # After a preemption the whole answer but its last token may have to be computed in one piece.
        if not self.chunked_prefill and tokens - 1 > self.max_num_batched_tokens:
            raise InputError(
                f"{words} cannot be computed in one step, as it must be without chunked prefill",
                allowed=f"{self.max_num_batched_tokens + 1} tokens (max_num_batched_tokens + 1)",
                remedy="raise max_num_batched_tokens, or switch chunked prefill on",
            )


class Load(Protocol):
    """Who asks when."""

    def first(self) -> Iterable[Asked]:
        """Arrivals known at the start, in any order. Open loop: all of them; closed loop: one a user."""

    def after(self, served: Served) -> Asked | None:
        """What the user of a closed loop asks next, not before served.last_token_s; None: no more."""
