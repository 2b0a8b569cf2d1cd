"""The losses of distillation, against torch's own and by hand; the teacher's distributions on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantize import distill
from quantize.distill import Losses, Lumped, Places, TeacherOnDisk
from quantize.sequences import Batch, batches
from quantize.training import Training


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(torch.nn.Module):
    """Logits by token id alone, and two blocks of hidden states."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(noise(11, 11, seed=seed))

    def forward(self, input_ids: Tensor, use_cache: bool, output_hidden_states: bool) -> Any:
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits, hidden_states=(logits, 2 * logits, logits**2))


DOCUMENTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3]]


def one_batch() -> Batch:
    (batch,) = batches(DOCUMENTS)
    return batch


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_torch_s(temperature: float) -> None:
    target, logits = noise(7, 20), noise(7, 20, seed=1)
    wanted = functional.kl_div(
        functional.log_softmax(logits / temperature, -1), functional.log_softmax(target / temperature, -1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    found = distill.kl_divergence(target, logits, temperature)
    assert torch.allclose(found, wanted * temperature**2, atol=1e-6)
    assert float(distill.kl_divergence(target, target + 3.0, temperature).abs().max()) < 1e-6


def test_each_loss_is_the_sum_over_real_places() -> None:
    """Document by document, without padding."""
    student, teacher = Model(1), Model(2)
    training = Training(hidden=0.5, temperature=2.0)
    with torch.no_grad():
        found = distill.losses(student, one_batch(), training, teacher)
    nll = kl = 0.0
    for ids in DOCUMENTS:
        a, b = (model.table.detach()[torch.tensor(ids)] for model in (student, teacher))
        nll += float(functional.cross_entropy(a[:-1], torch.tensor(ids[1:]), reduction="sum"))
        kl += float(distill.kl_divergence(b, a, 2.0).sum())
    assert float(found.cross_entropy) == pytest.approx(nll, rel=1e-5)
    assert float(found.kl) == pytest.approx(kl, rel=1e-5)
    every = torch.tensor([i for ids in DOCUMENTS for i in ids])
    a, b = student.table.detach()[every], teacher.table.detach()[every]
    apart = [((f(a) - f(b)) ** 2).sum(-1) / (f(b) ** 2).sum(-1) for f in (lambda x: 2 * x, lambda x: x**2)]
    assert float(found.hidden) == pytest.approx(float(sum(apart).sum()) / 2, rel=1e-5)


def test_the_mixture_is_of_means() -> None:
    sums = Losses(torch.tensor(30.0), torch.tensor(20.0), torch.tensor(10.0))
    places = Places.of(DOCUMENTS)
    assert places == Places(10, 7)
    assert float(distill.total(sums, places, Training(cross_entropy=0.25, hidden=2.0))) == pytest.approx(
        0.25 * 30 / 7 + 0.75 * 20 / 10 + 2 * 10 / 10
    )


def test_a_student_without_a_teacher_has_the_text_alone() -> None:
    found = distill.losses(Model(1), one_batch(), Training(cross_entropy=1.0))
    assert float(found.cross_entropy.detach()) > 0 and float(found.kl) == 0 == float(found.hidden)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_of_the_vocabulary_lumped_is_the_whole_kl(temperature: float) -> None:
    target, logits = noise(5, 12), noise(5, 12, seed=1)
    whole = distill.kl_divergence(target, logits, temperature) / temperature**2
    kept = distill.lump(target, 12, temperature)
    assert torch.allclose(distill.lumped_kl(kept, logits / temperature), whole, atol=1e-5)
    last = torch.zeros(5)
    for k in range(1, 13):  # merging tokens only loses information: each is a lower bound, growing
        bound = distill.lumped_kl(distill.lump(target, k, temperature), logits / temperature)
        assert bool((bound <= whole + 1e-5).all()) and bool((bound >= last - 1e-5).all())
        last = bound


def test_lumped_kl_by_hand() -> None:
    """Two tokens kept of four: (0.5, 0.3, rest 0.2) against (0.25, 0.25, rest 0.5)."""
    kept = Lumped(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]).log())
    found = distill.lumped_kl(kept, torch.zeros(1, 4))
    wanted = 0.5 * torch.tensor(2.0).log() + 0.3 * torch.tensor(1.2).log() + 0.2 * torch.tensor(0.4).log()
    assert float(found) == pytest.approx(float(wanted), abs=1e-6)


def test_what_the_teacher_said_comes_back_from_disk(tmp_path: Path) -> None:
    lengths = [len(ids) for ids in DOCUMENTS]
    found = [distill.lump(noise(n, 11, seed=n), 3, 1.0) for n in lengths]
    disk = TeacherOnDisk(tmp_path / "teacher", lengths, 3, "key")
    assert all(disk.missing(i) for i in range(3))
    disk.put(2, found[2])
    disk.put(0, found[0])
    assert [disk.missing(i) for i in range(3)] == [False, True, False]
    again = TeacherOnDisk(tmp_path / "teacher", lengths, 3, "key")
    kept = again.get([2, 0])
    assert torch.equal(kept.ids, torch.cat([found[2].ids, found[0].ids]))
    assert torch.equal(kept.logp, torch.cat([found[2].logp, found[0].logp]))
    assert TeacherOnDisk(tmp_path / "teacher", lengths, 3, "another").missing(2)
