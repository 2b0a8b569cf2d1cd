"""What a student is told is wrong: cross-entropy with the text, divergence from a teacher, or both.

With the student's logits a, the teacher's b, and T the temperature (Hinton et al., arXiv 1503.02531):

    CE = -ln softmax(a)[next]                          over the places that something follows
    KL = T^2 sum_v p_v (ln p_v - ln q_v)               p = softmax(b / T), q = softmax(a / T); over all places
    H  = mean over blocks of ||h_a - h_b||^2 / ||h_b||^2     h: what transformers calls hidden_states; over all places
    loss = c CE + (1 - c) KL + w H

T^2 keeps the gradient's size when T changes. Each term is a mean over its places in the whole batch of a step, so how
the batch is cut into micro-batches, and over processes, changes nothing.

Where the teacher's distribution is kept on disk it is its k likeliest tokens and, as one more, all the rest: the KL of
the two lumped distributions, which is a lower bound of the whole one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantize.sequences import Batch
from quantize.training import Training


class Losses(NamedTuple):
    """Sums over the places of a micro-batch, scalars with gradients: of CE, KL and H."""

    cross_entropy: Tensor
    kl: Tensor
    hidden: Tensor


class Lumped(NamedTuple):
    """A distribution at temperature T over k tokens and the rest. ids: int64, logp: float32, [places, k] each."""

    ids: Tensor
    logp: Tensor


@dataclass(frozen=True)
class Places:
    """How many places a step's whole batch has: `all`, and `followed` by a token."""

    all: int
    followed: int

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> "Places":
        """Those of whole documents."""
        tokens = sum(map(len, documents))
        return cls(tokens, tokens - len(documents))


def total(losses: Losses, places: Places, training: Training) -> Tensor:
    """The loss that is minimized, of these sums."""
    mixed = training.cross_entropy * losses.cross_entropy / max(places.followed, 1)
    mixed = mixed + (1 - training.cross_entropy) * losses.kl / places.all
    return mixed + training.hidden * losses.hidden / places.all


def losses(student: Any, batch: Batch, training: Training, teacher: Any = None, kept: Lumped | None = None) -> Losses:
    """Of one micro-batch. The teacher is a model, or what was `kept` of its distributions, or nothing at all."""
    logits, hidden = _run(student, batch, training.hidden > 0)
    real = batch.real.to(logits.device)
    nothing = logits.new_zeros((), dtype=torch.float32)
    followed = real[:, 1:]
    nll = functional.cross_entropy(
        logits[:, :-1][followed].float(), batch.ids.to(logits.device)[:, 1:][followed], reduction="sum"
    )
    if kept is not None:
        kl = lumped_kl(kept, logits[real].float() / training.temperature).sum() * training.temperature**2
        return Losses(nll, kl, nothing)
    if teacher is None:
        return Losses(nll, nothing, nothing)
    with torch.no_grad():
        target, target_hidden = _run(teacher, batch, training.hidden > 0)
    kl = kl_divergence(target[real].float(), logits[real].float(), training.temperature).sum()
    apart = nothing
    for h, wanted in zip(hidden, target_hidden, strict=True):
        wanted = wanted[real].float()
        apart = apart + (((h[real].float() - wanted) ** 2).sum(dim=-1) / (wanted**2).sum(dim=-1)).sum()
    return Losses(nll, kl, apart / max(len(hidden), 1))


def kl_divergence(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each place, [places], from logits [places, vocabulary]."""
    logp, logq = (torch.log_softmax(x / temperature, dim=-1) for x in (target, logits))
    return (logp.exp() * (logp - logq)).sum(dim=-1) * temperature**2


def lump(target: Tensor, k: int, temperature: float) -> Lumped:
    """The k likeliest tokens of logits [places, vocabulary]."""
    logp, ids = torch.log_softmax(target.float() / temperature, dim=-1).topk(min(k, target.shape[-1]), dim=-1)
    return Lumped(ids, logp)


def lumped_kl(kept: Lumped, logits: Tensor) -> Tensor:
    """KL of the lumped distributions, [places], from the student's logits divided by T, [places, vocabulary]."""
    logq = torch.log_softmax(logits, dim=-1).gather(-1, kept.ids)
    p, q = kept.logp.exp(), logq.exp()
    rest_p, rest_q = ((1 - x.sum(dim=-1)).clamp(min=1e-7) for x in (p, q))  # float32's own doubt about a sum of 1
    return (p * (kept.logp - logq)).sum(dim=-1) + rest_p * (rest_p.log() - rest_q.log())


def _run(model: Any, batch: Batch, hidden: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """Logits [sequences, length, vocabulary], and if wanted the hidden states behind each block."""
    device = next(model.parameters()).device
    out = model(input_ids=batch.ids.to(device), use_cache=False, output_hidden_states=hidden)
    return out.logits, out.hidden_states[1:] if hidden else ()


class TeacherOnDisk:
    """The k likeliest tokens at each place of a corpus, computed when a document first comes by; kept for the next."""

    def __init__(self, folder: Path, documents: Sequence[int], k: int, key: str) -> None:
        """`documents`: the lengths of all of them; `key` names what they and the teacher are."""
        folder.mkdir(exist_ok=True)
        self._first = np.concatenate([[0], np.cumsum(documents)])
        note, shape = folder / "key", (int(self._first[-1]), k)
        fresh = not note.is_file() or note.read_text() != key
        mode: Any = "w+" if fresh else "r+"
        self._ids = np.memmap(folder / "ids", np.int32, mode, shape=shape)
        self._logp = np.memmap(folder / "logp", np.float32, mode, shape=shape)
        self._done = np.memmap(folder / "done", np.uint8, mode, shape=(len(documents),))
        note.write_text(key)

    def missing(self, document: int) -> bool:
        """Whether the document has not come by yet."""
        return not self._done[document]

    def put(self, document: int, found: Lumped) -> None:
        """Keep those of one document, [length, k]."""
        here = slice(self._first[document], self._first[document + 1])
        self._ids[here], self._logp[here] = found.ids.cpu().numpy(), found.logp.cpu().numpy()
        self._done[document] = 1

    def get(self, documents: Sequence[int]) -> Lumped:
        """Those of some documents, one after the other."""
        here = [slice(self._first[d], self._first[d + 1]) for d in documents]
        ids, logp = (np.concatenate([table[span] for span in here]) for table in (self._ids, self._logp))
        return Lumped(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logp))
