"""Fake quantization: forward the checkpoint's weight bit for bit, backward the papers' formulas, and torch's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from torch import Tensor, nn

from quantize import qat
from quantize.fidelity import load_original
from quantize.qat import FakeQuantize, Stored
from quantize.scheme import PER_CHANNEL, Grid, Scheme, dequantize, grid, quantize, round_scales, search, to_grid

SCHEMES = [
    Scheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (32, PER_CHANNEL) for symmetric in (True, False)
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clipping(weight: Tensor, scheme: Scheme) -> Grid:
    """A grid that leaves some weights outside of its range."""
    return grid(weight, scheme, torch.full((len(weight), scheme.groups(weight.shape[1])), 0.6))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_forward_is_what_the_checkpoint_holds(scheme: Scheme, learned: bool) -> None:
    weight = noise(16, 64)
    found = FakeQuantize(scheme, grid(weight, scheme), learned)
    assert torch.equal(found(weight), dequantize(quantize(weight, scheme)))
    assert torch.equal(dequantize(found.integers(weight)), found(weight))
    moved = weight + 0.3 * noise(16, 64, seed=1)  # the weights have learnt; a learned grid has stayed
    points = grid(weight if learned else moved, scheme)
    assert torch.equal(found.integers(moved).q, to_grid(moved, points, scheme))
    assert torch.equal(found(moved), dequantize(found.integers(moved)))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size == PER_CHANNEL], ids=str)
def test_gradients_are_those_of_torch_s_own_fake_quantize(scheme: Scheme) -> None:
    """torch's learnable fake quantizer has a scale a row; its gradient's factor is ours without what s_0 adds."""
    weight, upstream = noise(8, 96), noise(8, 96, seed=2)
    start = clipping(weight, scheme)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    fake = FakeQuantize(scheme, start, learned=True)
    fake(ours).backward(upstream)
    scales = start.scales.float()[:, 0].clone().requires_grad_()
    factor = (96 * scheme.highest) ** -0.5
    out = torch._fake_quantize_learnable_per_channel_affine(
        theirs, scales, start.zeros.float()[:, 0], 0, 0, scheme.highest, factor
    )
    out.backward(upstream)
    assert torch.allclose(fake(weight), out, atol=1e-6)
    assert ours.grad is not None and theirs.grad is not None and scales.grad is not None
    assert 0 < int((ours.grad == 0).sum()) < weight.numel()
    assert torch.equal(ours.grad, theirs.grad)
    assert fake.log_ratio.grad is not None
    assert torch.allclose(fake.log_ratio.grad[:, 0], scales.grad * start.scales.float()[:, 0], rtol=1e-4, atol=1e-6)


def test_gradients_by_hand() -> None:
    """One group of 2 bits, symmetric: s = 0.5, levels -2 to 1; -3 is clipped, 0.6 rounds up, 0.1 down."""
    scheme = Scheme(2, 4, symmetric=True)
    weight = torch.tensor([[-3.0, 0.6, 0.1, 0.5]], requires_grad=True)
    fake = FakeQuantize(
        scheme, Grid(torch.tensor([[0.5]]).half(), torch.tensor([[2]], dtype=torch.uint8)), learned=True
    )
    out = fake(weight)
    assert out.tolist() == [[-1.0, 0.5, 0.0, 0.5]]
    out.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 10.0, 100.0, 1000.0]]
    slopes = [-2.0, 1 - 1.2, 0 - 0.2, 0.0]  # clipped: its level; else what rounding did, in steps
    by_hand = sum(g * slope for g, slope in zip([1, 10, 100, 1000], slopes, strict=True)) / (4 * 3) ** 0.5
    assert fake.log_ratio.grad is not None
    assert fake.log_ratio.grad.item() == pytest.approx(by_hand * 0.5)


def test_the_scale_s_gradient_is_a_finite_difference_where_there_is_one() -> None:
    """With every weight clipped What = (q - z) s has a slope in s, and no rounding to spoil it."""
    weight = torch.tensor([[5.0, -7.0, 9.0, 6.0]])
    scheme = Scheme(2, 4, symmetric=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])

    def loss(scale: float) -> float:
        points = Grid(torch.tensor([[scale]]).half(), torch.tensor([[2]], dtype=torch.uint8))
        return float((FakeQuantize(scheme, points, learned=True)(weight).detach() * upstream).sum())

    fake = FakeQuantize(
        scheme, Grid(torch.tensor([[0.5]]).half(), torch.tensor([[2]], dtype=torch.uint8)), learned=True
    )
    (fake(weight) * upstream).sum().backward()
    difference = (loss(0.5625) - loss(0.4375)) / 0.125  # scales that 8 bits hold
    assert fake.log_ratio.grad is not None
    assert fake.log_ratio.grad.item() == pytest.approx(difference * 0.5 / (4 * 3) ** 0.5)


def test_frozen_scales_stay_and_recomputed_ones_follow() -> None:
    scheme, weight = Scheme(4, 32), noise(4, 64)
    for learned in (False, True):
        fake = FakeQuantize(scheme, grid(weight, scheme), learned)
        with torch.no_grad():
            fake.log_ratio.add_(0.1 if learned else 0.0)
        before = fake.points(2 * weight)
        assert torch.equal(before.scales, grid(2 * weight, scheme).scales) != learned
        fake.freeze(2 * weight)
        kept = fake.points(3 * weight)
        assert torch.equal(kept.scales, before.scales) and torch.equal(kept.zeros, before.zeros)
        assert not fake.log_ratio.requires_grad
        again = FakeQuantize(scheme, grid(weight, scheme), learned)
        again.load_state_dict(fake.state_dict())
        assert torch.equal(again.points(5 * weight).scales, kept.scales)


def test_learned_scales_are_those_that_a_checkpoint_can_hold() -> None:
    scheme, weight = Scheme(4, 32), noise(4, 64)
    fake = FakeQuantize(scheme, grid(weight, scheme), learned=True)
    with torch.no_grad():
        fake.log_ratio.copy_(0.05 * noise(4, 2, seed=5))
    scales = fake.points(weight).scales
    assert torch.equal(scales, round_scales(scales)) and scales.dtype == torch.float16
    assert not torch.equal(scales, grid(weight, scheme).scales)


@pytest.fixture(scope="module", params=["qwen2", "gemma2", "phi"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tiny_model.save(tmp_path_factory.mktemp("models") / request.param, family=request.param)
    return load_original(path)


def student_of(model: Any, scheme: Scheme, learned: bool = True) -> tuple[Any, dict[str, Scheme]]:
    student = copy.deepcopy(model)
    schemes = {n: scheme for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    stored = dict.fromkeys(student.state_dict(), torch.bfloat16)
    grids = {n: Grid(*search(student.get_submodule(n).weight, scheme)[0][1:]) for n in schemes}
    qat.prepare(student, schemes, grids if learned else {}, stored, learned)
    return student, schemes


IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", [Scheme(4, 32, True), Scheme(2, 32), Scheme(8, PER_CHANNEL, True, 8)], ids=str)
def test_the_exported_model_computes_what_the_student_did(model: Any, scheme: Scheme) -> None:
    """After some steps of training; the largest difference of the logits is nothing at all."""
    student, schemes = student_of(model, scheme)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    first = None
    for _ in range(4):
        logits = student(input_ids=IDS).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first
    integers, kept = qat.export(student)
    assert integers.keys() == schemes.keys()
    plain = copy.deepcopy(model)
    tensors = {f"{name}.weight": dequantize(values) for name, values in integers.items()} | kept
    tensors = {
        name: t if name.removesuffix(".weight") in integers else t.bfloat16().float() for name, t in tensors.items()
    }
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if "lm_head" not in name]
    if scheme.activation_bits:
        for name in schemes:
            qat.fake_quantize_inputs(plain.get_submodule(name), 8)
    with torch.no_grad():
        assert float((plain(input_ids=IDS).logits - student(input_ids=IDS).logits).abs().max()) == 0
    changed = [name for name in tensors if not torch.equal(tensors[name], model.state_dict()[name])]
    assert any("norm" in name for name in changed) and any("proj" in name for name in changed)
    assert "model.embed_tokens.weight" not in changed


def test_activations_are_rounded_as_the_kernel_does_and_let_gradients_through() -> None:
    layer = nn.Linear(32, 8)
    qat.fake_quantize_inputs(layer, 8)
    x = noise(4, 32).requires_grad_()
    out = layer(x)
    scale = x.detach().abs().amax(dim=-1, keepdim=True) / 127
    seen = torch.round(x.detach() / scale).clamp(-128, 127) * scale
    assert torch.allclose(out, nn.functional.linear(seen, layer.weight, layer.bias), atol=1e-6)
    out.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(dim=0).expand_as(x), atol=1e-6)


def test_what_is_stored_in_16_bits_is_seen_in_16_bits() -> None:
    x = torch.tensor([1.0, 1.001, 3.14159], requires_grad=True)
    out = Stored(torch.bfloat16)(x)
    assert torch.equal(out, x.detach().bfloat16().float()) and not torch.equal(out, x.detach())
    out.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3]


def test_only_what_is_meant_to_learn_learns(model: Any) -> None:
    student, schemes = student_of(model, Scheme(4, 32), learned=False)
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert not any("embed" in name or "lm_head" in name or "log_ratio" in name for name in names)
    assert {f"{name}.parametrizations.weight.original" for name in schemes} <= names
    assert any("norm" in name for name in names)
