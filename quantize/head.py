"""The end of a model: its last norm and its output head, taken a slice of the vocabulary at a time.

Two models' next-token distributions are compared without ever holding the vocabulary.

A slice of both models' lm_head at a time, over all tokens, with sums that are carried on from slice to slice. Of a
token with logits a (original) and b (quantized), and M the largest a so far:

    A = sum_v exp(a_v - M)      B likewise of b      D = sum_v exp(a_v - M) (a_v - b_v)

When M grows, A and D are multiplied by exp(M - M_new). After the last slice

    KL(p, q) = D / A - ln Z_a + ln Z_b      ln Z_a = M + ln A       -ln p(v) = ln Z_a - a_v

so each row of lm_head is read once, and memory is a slice of it whatever the vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.blocks import family_of
from quantize.errors import SchemeError
from quantize.formats import HEAD
from quantize.scheme import Scheme, fake_quantize_tokens
from quantize.sequences import Batch
from quantize.store import Store
from quantize.walk import Gathered, InputStats, skeleton_of
from quantize.weights import ModelDir

_ROWS = 8192
"""Of lm_head at a time: 128 MiB at a hidden size of 4096. A multiple of 32, where packed integers come apart."""
_TOKENS = 1024
"""At a time: their logits over a slice are 32 MiB."""


@dataclass(frozen=True)
class Head:
    """norm: the module before the lm_head, ready to run; weight: the name of lm_head's tensor, which may be the
    embedding's; bias: float32 [vocabulary] or None; softcap: c in c tanh(logit / c), or None (Gemma 2);
    activation_bits: of a quantized lm_head's inputs, None where they are not rounded."""

    model: ModelDir
    norm: nn.Module
    weight: str
    bias: Tensor | None
    softcap: float | None
    vocabulary: int
    device: str
    activation_bits: int | None = None

    def inputs(self, hidden: Tensor) -> Tensor:
        """What lm_head sees of `hidden`, the states after the last block, [..., hidden]."""
        normed: Tensor = self.norm(hidden.to(self.device))
        return normed if self.activation_bits is None else fake_quantize_tokens(normed, self.activation_bits)

    def logits(self, hidden: Tensor, weight: Tensor, start: int) -> Tensor:
        """Those of the tokens from `start` on whose rows of lm_head are `weight`: [n, hidden] -> [n, rows]."""
        logits = hidden @ weight.T
        if self.bias is not None:
            logits += self.bias[start : start + len(weight)]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def slices(self) -> Iterator[tuple[int, int]]:
        """lm_head's rows from the first to the last, a few at a time: where each slice starts and ends."""
        return ((start, min(start + _ROWS, self.vocabulary)) for start in range(0, self.vocabulary, _ROWS))

    def rows(self, start: int, end: int) -> Tensor:
        """A slice of lm_head's weight, float32."""
        return self.model.rows(self.weight, torch.arange(start, end)).to(self.device).float()


def head_of(model: ModelDir, device: str = "cpu", activation_bits: int | None = None) -> Head:
    """The end of `model`; `activation_bits` as in `Head`. Raises ModelError where its tensors are missing."""
    skeleton = skeleton_of(model)
    config = skeleton.config
    final = family_of(model.config.get("model_type")).final
    norm: nn.Module = getattr(skeleton.model, final).to_empty(device=device)
    prefix = f"model.{final}."
    stored = model.read([f"{prefix}{name}" for name in norm.state_dict()])
    norm.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in stored.items()})
    weight = "model.embed_tokens.weight" if getattr(config, "tie_word_embeddings", False) else "lm_head.weight"
    bias = None
    if skeleton.lm_head.bias is not None:
        bias = model.read(["lm_head.bias"])["lm_head.bias"].float().to(device)
    softcap = getattr(config, "final_logit_softcapping", None)
    vocabulary = skeleton.lm_head.out_features
    return Head(model, norm.requires_grad_(False), weight, bias, softcap, vocabulary, device, activation_bits)


def check_untied(plan: Mapping[str, Scheme | None], tied: bool) -> None:
    """Raise SchemeError where `plan` has a scheme for an output head that is `tied` to the embeddings."""
    if tied and (scheme := plan.get(HEAD)):
        raise SchemeError(
            f"{HEAD} as {scheme}, which is the embedding matrix here (tie_word_embeddings)",
            "a model with an output head of its own; embeddings are kept in 16 bits",
            f"Leave {HEAD} out of --keep",
        )


@torch.no_grad()
def input_stats(head: Head, store: Store, batches: Sequence[Batch]) -> InputStats:
    """What lm_head sees of `batches`, whose hidden states after the last block a finished walk left in `store`."""
    gathered = Gathered()
    for number, batch in enumerate(batches):
        gathered.add(head.inputs(store.get(f"hidden.{number}")), batch.real)
    return gathered.stats("the last norm")


@dataclass(frozen=True)
class Ends:
    """How two models' next-token distributions differ, float64 [tokens] each. nll: of the two models, 0 where
    nothing follows; agreed: 1 where both find the same token likeliest."""

    kl_nats: Tensor
    nll: tuple[Tensor, Tensor]
    agreed: Tensor


@torch.no_grad()
def compare_ends(
    heads: tuple[Head, Head], stores: tuple[Store, Store], names: Sequence[str], following: Sequence[Tensor]
) -> list[Ends]:
    """Of each batch, by the hidden states [tokens, hidden] that each model's store has under each of `names`: those of
    real tokens after the last block. They are replaced by what lm_head sees of them.

    following: int64 [tokens], the token that came next, or -1.
    """
    for head, store in zip(heads, stores, strict=True):
        for name in names:
            store.put(name, head.inputs(store.get(name)))
    sums = [_Sums(next_token) for next_token in following]
    for start, end in heads[0].slices():
        weights = [head.rows(start, end) for head in heads]
        for name, each in zip(names, sums, strict=True):
            hidden = [store.get(name) for store in stores]
            for first in range(0, len(hidden[0]), _TOKENS):
                tokens = slice(first, first + _TOKENS)
                a, b = (
                    head.logits(h[tokens].to(head.device), weight, start)
                    for head, h, weight in zip(heads, hidden, weights, strict=True)
                )
                each.add(tokens, a, b, start)
    return [each.ends() for each in sums]


class _Sums:
    """What is carried from slice to slice for the tokens of one batch; the module's text has the letters."""

    def __init__(self, following: Tensor) -> None:
        self.following = following
        count = len(following)
        self.highest = torch.full((2, count), -torch.inf, dtype=torch.float64)
        self.best = torch.full((2, count), -1)
        self.mass = torch.zeros(2, count, dtype=torch.float64)
        self.difference = torch.zeros(count, dtype=torch.float64)
        self.chosen = torch.zeros(2, count, dtype=torch.float64)

    def add(self, tokens: slice, a: Tensor, b: Tensor, start: int) -> None:
        """The logits [tokens, rows] of the tokens of the vocabulary from `start` on."""
        here = (self.following[tokens] >= start) & (self.following[tokens] < start + a.shape[1])
        wanted = torch.where(here, self.following[tokens] - start, 0).to(a.device)[:, None]
        for i, logits in enumerate((a, b)):
            value, index = (found.cpu() for found in logits.max(dim=-1))
            old = self.highest[i, tokens]
            self.best[i, tokens] = torch.where(value > old, index + start, self.best[i, tokens])
            new = torch.maximum(old, value.double())
            shrink, share = torch.exp(old - new), torch.exp(logits - new.to(logits.device, logits.dtype)[:, None])
            self.highest[i, tokens] = new
            self.mass[i, tokens] = self.mass[i, tokens] * shrink + share.sum(dim=-1, dtype=torch.float64).cpu()
            if i == 0:
                more = (share * (a - b)).sum(dim=-1, dtype=torch.float64).cpu()
                self.difference[tokens] = self.difference[tokens] * shrink + more
            found = logits.gather(-1, wanted)[:, 0].cpu().double()
            self.chosen[i, tokens] = torch.where(here, found, self.chosen[i, tokens])

    def ends(self) -> Ends:
        log_z = self.highest + self.mass.log()
        nll = torch.where(self.following >= 0, log_z - self.chosen, 0.0)
        kl = self.difference / self.mass[0] - log_z[0] + log_z[1]
        return Ends(kl, (nll[0], nll[1]), (self.best[0] == self.best[1]).double())
