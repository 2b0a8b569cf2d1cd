"""The training loop: batches in a set order, mixed precision, states on disk, and nothing that a kill could change.

    step:  documents of the corpus, whole ─► this process's share ─► micro-batches ─► losses ─► gradients, summed
           ─► (loss scaling undone) ─► clipped ─► AdamW ─► a row of metrics.csv

Mixed precision is torch.amp's: parameters, gradients and AdamW's state are float32, products are rounded to bfloat16 or
float16 forward and backward. float16 reaches down to 6e-8, and gradients of single activations are often less, so the
loss is multiplied by a scale before the backward pass and the gradients divided by it after; a step whose gradients
overflow is left out, counted, and the scale halved.

A state holds the student, the optimizer, the scaler, the place in the corpus and the rows so far; with the same threads
a run that was killed ends in the same bits. Of all states at which the held-out loss was taken, the start among them,
the best is what comes out: training can then not do worse than what it began with, by that measure.

Several processes (torchrun) each take every n-th document of a batch; torch's DistributedDataParallel averages their
gradients, and each loss is divided by the places of the WHOLE batch, times the processes, so the average is the
gradient that one process would have had.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantize import distill, products, qat
from quantize.corpus import Corpus, Place
from quantize.distill import Places, TeacherOnDisk
from quantize.errors import RunError
from quantize.sequences import Batch, batches
from quantize.training import RATE, Training

STATE = "training.pt"
_OVERFLOWS = 60
"""Steps left out in a row before it is no longer the scale that is at fault: 2^16 halved so often is nothing."""


@dataclass(frozen=True)
class Row:
    """A step; step 0 is the start, whose loss is the held-out one and has no parts.

    tokens: trained on by then; losses are means over the step's whole batch, heldout the one that decides, where it was
    taken; skipped: steps left out so far; tokens_s: of this step.
    """

    step: int
    tokens: int
    loss: float
    cross_entropy: float | None
    kl: float | None
    hidden: float | None
    learning_rate: float
    grad_norm: float
    loss_scale: float
    skipped: int
    heldout: float | None
    tokens_s: float
    seconds: float


class Observer(Protocol):
    def __call__(self, row: Row, steps: int) -> None:
        """Told after each step."""


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number, and how many they are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """For all the others."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, elementwise."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """What torchrun says in the environment; without it one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    corpus: Corpus,
    training: Training,
    folder: Path,
    key: str,
    *,
    among: World | None = None,
    device: str = "cpu",
    observe: Observer | None = None,
) -> list[Row]:
    """Train `student` in place, and leave it as it was at its best; returns the rows.

    States go to `folder`, and training goes on from the one that is there, if it is `key`'s. Raises RunError where a
    loss or a gradient is NaN or infinite; the last state before stays.
    """
    among = among or World()
    loop = _Loop(student, teacher, corpus, training, folder, key, among, device)
    loop.restore()
    if not loop.rows:
        loop.begin()
    while loop.step < training.steps:
        row = loop.advance()
        if observe and among.first:
            observe(row, training.steps)
        if loop.step % training.save == 0 or loop.step == training.steps:
            loop.save()
    loop.load(loop.best)
    return loop.rows


class _Loop:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        corpus: Corpus,
        training: Training,
        folder: Path,
        key: str,
        among: World,
        device: str,
    ) -> None:
        self.student, self.teacher, self.corpus, self.training = student, teacher, corpus, training
        self.folder, self.key, self.among, self.device = folder, key, among, device
        self.place, self.step, self.tokens, self.skipped, self.overflows = Place(), 0, 0, 0, 0
        self.rows: list[Row] = []
        self.start = time.perf_counter()
        self.best: dict[str, Tensor] = {}
        self.least = math.inf
        self.optimizer = torch.optim.AdamW(_groups(student, training), betas=(0.9, 0.98), weight_decay=0.0)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        scaled = training.precision == "fp16" and training.loss_scale == "dynamic"
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=scaled, growth_interval=200)
        self.disk: TeacherOnDisk | None = None
        if training.top_k and teacher is not None:
            lengths = corpus.lengths.tolist()
            self.disk = TeacherOnDisk(folder / f"teacher-{among.rank}", lengths, training.top_k, key)
        if training.checkpointing:
            _checkpoint(student, self._products)
        self.parallel: Any = self._wrapped()

    def _wrapped(self) -> nn.Module:
        return nn.parallel.DistributedDataParallel(self.student) if self.among.size > 1 else self.student

    def _freeze(self) -> None:
        qat.freeze(self.student)
        self.parallel = self._wrapped()  # which would wait for the scales' gradients

    def begin(self) -> None:
        """Take the held-out loss of the start, which is the best state until another is better."""
        heldout = self.judge()
        seconds = time.perf_counter() - self.start
        self.rows.append(
            Row(0, 0, heldout, None, None, None, 0.0, 0.0, self.scaler.get_scale(), 0, heldout, 0.0, seconds)
        )

    def advance(self) -> Row:
        """One step."""
        training, began = self.training, time.perf_counter()
        if self.step == round(training.freeze * training.steps):
            self._freeze()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * training.learning_rate(self.step)
        indices, place = self.corpus.batch(self.place, training.batch)
        documents = [self.corpus[i] for i in indices]
        places = Places.of(documents)
        sums = self._gradients(indices, places)
        loss = float(distill.total(distill.Losses(*sums), places, training))
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.student.parameters(), training.clip))
        self._check(loss, norm)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.place, self.step, self.tokens = place, self.step + 1, self.tokens + places.all
        ended = time.perf_counter()
        heldout = self.judge() if self._due() else None
        ce, kl, hidden = sums.tolist()
        row = Row(
            self.step, self.tokens, loss, ce / max(places.followed, 1), kl / places.all, hidden / places.all,
            self.rates[0] * training.learning_rate(self.step - 1), norm, scale, self.skipped, heldout,
            places.all / (ended - began), time.perf_counter() - self.start,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def _gradients(self, indices: Sequence[int], places: Places) -> Tensor:
        """Add up the gradients of this process's share; returns the sums of all processes' losses, [3]."""
        sums = torch.zeros(3, dtype=torch.float64)
        share = indices[self.among.rank :: self.among.size]
        # Where there are fewer documents than processes, the last of them take part with nothing.
        weight = self.among.size if share else 0
        parts = list(self._micro(share or indices[:1]))
        for number, (own, batch) in enumerate(parts):
            last = number == len(parts) - 1
            # Gradients are averaged over the processes once a step, at the last backward pass.
            alone = self.parallel.no_sync() if self.among.size > 1 and not last else contextlib.nullcontext()
            with alone:
                with self._products(), self._autocast():
                    found = self._losses(own, batch)
                loss = distill.total(found, places, self.training) * weight
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if share:
                sums += torch.stack([part.detach().double().cpu() for part in found])
        return self.among.sum(sums)

    def _micro(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Micro-batches, each with the documents that its rows are."""
        documents = {i: self.corpus[i] for i in indices}
        order = sorted(documents, key=lambda i: (-len(documents[i]), documents[i]))
        for batch in batches([documents[i] for i in order], self.training.micro):
            own, order = order[: len(batch.ids)], order[len(batch.ids) :]
            yield own, batch

    def _losses(self, own: Sequence[int], batch: Batch) -> distill.Losses:
        if self.disk is None:
            return distill.losses(self.parallel, batch, self.training, self.teacher)
        if any(self.disk.missing(i) for i in own):
            with torch.no_grad():
                assert self.teacher is not None
                logits = self.teacher(input_ids=batch.ids.to(self.device), use_cache=False).logits
            for i, row, real in zip(own, logits, batch.real, strict=True):
                self.disk.put(i, distill.lump(row[real.to(row.device)], self.training.top_k, self.training.temperature))
        kept = self.disk.get(own)
        return distill.losses(
            self.parallel, batch, self.training, kept=distill.Lumped(*(x.to(self.device) for x in kept))
        )

    def _products(self) -> AbstractContextManager[Any]:
        return products.Faster() if self.training.precision == "fp32" else contextlib.nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self.training.precision)
        return torch.autocast(torch.device(self.device).type, dtype) if dtype else contextlib.nullcontext()

    def _check(self, loss: float, norm: float) -> None:
        """Count a step that overflows under loss scaling, which the scaler leaves out; stop at any other."""
        self.overflows = self.overflows + 1 if self.scaler.is_enabled() and not math.isfinite(norm) else 0
        self.skipped += self.overflows > 0
        if (math.isfinite(loss) and math.isfinite(norm)) or 0 < self.overflows < _OVERFLOWS:
            return
        raise RunError(
            f"step {self.step + 1}: a loss of {loss:g} with a gradient of norm {norm:g}",
            "finite numbers",
            f"Lower --rate, or try --train-precision fp32; the state after step {self._saved()} is kept",
        )

    def _saved(self) -> int:
        return self.step // self.training.save * self.training.save

    def _due(self) -> bool:
        every = max(1, self.training.steps // self.training.evaluate)
        return self.step % every == 0 or self.step == self.training.steps

    @torch.no_grad()
    def judge(self) -> float:
        """The held-out loss as things stand, a mean over places; remembers the student where it is the least so far.

        In float32, whatever it is trained in, for that is what is served: every process takes its share.
        """
        own = self.corpus.heldout
        places = Places.of([self.corpus[i] for i in own])
        sums = torch.zeros(3, dtype=torch.float64)
        with products.Faster():
            for _, batch in self._micro(own[self.among.rank :: self.among.size]):
                found = distill.losses(self.student, batch, self.training, self.teacher)
                sums += torch.stack([part.double().cpu() for part in found])
        heldout = float(distill.total(distill.Losses(*self.among.sum(sums)), places, self.training))
        if heldout < self.least:
            self.least = heldout
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in _learned(self.student).items()}
        return heldout

    def save(self) -> None:
        """Put the state on disk, in one piece."""
        if not self.among.first:
            return
        state = {
            "key": self.key, "step": self.step, "tokens": self.tokens, "skipped": self.skipped,
            "place": asdict(self.place), "rows": [asdict(row) for row in self.rows], "least": self.least,
            "best": self.best, "student": _learned(self.student), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "seconds": time.perf_counter() - self.start,
        }  # fmt: skip
        partial = self.folder / f"{STATE}.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / STATE)

    def restore(self) -> None:
        """Go on from the state on disk, if there is one of this key."""
        file = self.folder / STATE
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["key"] != self.key:
            return
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        self.place, self.rows = Place(**state["place"]), [Row(**row) for row in state["rows"]]
        self.least, self.best = state["least"], state["best"]
        if self.step > round(self.training.freeze * self.training.steps):
            self._freeze()
        self.load(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.start = time.perf_counter() - state["seconds"]

    def load(self, learned: dict[str, Tensor]) -> None:
        """Give the student what it was at another time."""
        self.student.load_state_dict(learned, strict=False)


def _learned(student: nn.Module) -> dict[str, Tensor]:
    """All that training can change."""
    return {name: tensor for name, tensor in student.state_dict().items() if "parametrizations" in name}


def _groups(student: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Weights, norms and biases; and the scales."""
    scales = {id(quantizer.log_ratio) for quantizer, _ in qat.quantizers(student).values()}
    steps = [
        float(quantizer.points(weight).scales.float().mean()) for quantizer, weight in qat.quantizers(student).values()
    ]
    rate = training.rate or RATE * sum(steps) / len(steps)
    others = [p for p in student.parameters() if p.requires_grad and id(p) not in scales]
    learned = [p for p in student.parameters() if p.requires_grad and id(p) in scales]
    groups = [{"params": others, "lr": rate}, {"params": learned, "lr": training.scale_rate}]
    return [group for group in groups if group["params"]]


def _checkpoint(student: Any, products: Callable[[], AbstractContextManager[Any]]) -> None:
    """Have each block's activations computed again in the backward pass, under the same `products`.

    transformers does that in train mode only; nothing is dropped out all the same, for the student is to become what is
    served.
    """
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)  # its late name
    enable({"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), products())})
    student.train()


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """metrics.csv: a line a step; what overflowed, or was not taken, is empty."""
    import csv

    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            values = asdict(row).values()
            writer.writerow(["" if v is None or not math.isfinite(v) else f"{v:.8g}" for v in values])
