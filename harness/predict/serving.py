"""What `bench serve-simulated` serves: from typed names to a model on a card, and the words in which it says so."""

from __future__ import annotations

from dataclasses import dataclass

from harness.predict import answers, cell, coefficients
from harness.predict.answers import Model
from harness.predict.bands import Band, LoadClass, bands
from harness.predict.cards import card
from harness.predict.shapes import shape
from harness.records import Scenario

_LOADS: tuple[LoadClass, ...] = ("one", "users")
_LONGEST_CONTEXT = 8192
"""Context served where none is asked for, unless the model's own is shorter."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, under which name, and how far predictions of it may be from the truth."""

    name: str
    what: cell.Served
    bands: tuple[Band, ...] = ()

    @property
    def model(self) -> Model:
        limits = self.what.limits
        context = limits.max_model_len or limits.kv_blocks * limits.block_size
        return Model(self.name, context, self.what.shape.vocabulary)


def prepared(
    gpu: str,
    model: str,
    precision: str,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.9,
    kv_cache_gib: float | None = None,
) -> Serving:
    """From typed names. Raises InputError for a card, a model or a precision that is not known, or does not fit."""
    found, known = card(gpu), shape(model)
    if precision == "bf16" and found.bf16_tflops is None:
        precision = "fp16"
    context = max_model_len or min(_LONGEST_CONTEXT, known.architecture.max_positions or _LONGEST_CONTEXT)
    what = cell.served(
        found,
        known.architecture,
        precision,
        Scenario("serve-simulated", max_model_len=context),
        coefficients.fitted(),
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
    )
    basis = bands().basis(found.id)
    return Serving(known.name, what, tuple(bands().band("tok_s", load, basis) for load in _LOADS))


def announced(serving: Serving, url: str, speed: float) -> str:
    """What is served, as lines."""
    what, limits = serving.what, serving.what.limits
    base_s, slope_s = what.steps.decode(1)
    token_ms = (base_s + slope_s * min(512, serving.model.context)) * 1e3
    lines = [
        f"{serving.name} in {what.precision} ({what.kernel} kernels) on {what.card.name}: simulated, nothing measured",
        f"  {url}/v1  model {serving.name}" + (f"  {speed:g} times as fast as predicted" if speed != 1 else ""),
        f"  context {serving.model.context:,} tokens, KV cache {limits.kv_blocks * limits.block_size:,} tokens, "
        f"at most {limits.max_num_seqs} requests at once",
        f"  a lone user gets a token every {token_ms:.1f} ms (512 tokens cached)",
    ]
    for band in serving.bands:
        users = "a lone user" if band.load == "one" else "several users"
        strange = "cards of its architecture" if band.basis == "architecture" else "the card"
        lines.append(
            f"  tok/s of {users}: 95 % of {band.n} published measurements were {band.low:.2f} to {band.high:.2f} times "
            f"what is predicted without {strange}" + (" (unvalidated)" if band.basis == "architecture" else "")
        )
    return "\n".join(
        [
            *lines,
            f"  an answer has max_tokens tokens, with ignore_eos or without; where none are asked for, "
            f"{answers.COMPLETION_TOKENS} (completions) or {answers.CHAT_ANSWER_TOKENS} (chat)",
            f"  {answers.BYTES_A_TOKEN} bytes of text count as a token; no prefix cache; API keys are not looked at",
            "  Ctrl-C ends it",
        ]
    )
