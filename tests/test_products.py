"""oneDNN's products are torch's own to float32's rounding, in every shape and layout, and only where they may be."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantize import products


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, added = noise(*shape), noise(4, 7), noise(4) if bias else None
    assert torch.allclose(products.linear(x, weight, added), functional.linear(x, weight, added), atol=1e-5)


def test_linear_of_views() -> None:
    x, weight = noise(64, 96), noise(96, 96)
    for left, right in ((x, weight.T), (x[:, 8:40], weight[::2, 8:40]), (x.T[3:50], noise(9, 64))):
        assert torch.allclose(products.linear(left, right), left @ right.T, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_causal_attention(length: int, shared: int, scale: float | None) -> None:
    query = noise(2, length, 4, 16).transpose(1, 2)  # as transformers hands them over: not contiguous
    key, value = (noise(2, length, 4 // shared, 16 * i).transpose(1, 2)[..., :16] for i in (1, 2))
    wanted = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    with products.Faster():
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_it_does_not_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other types, masks, unequal lengths, nothing at all; and every product of a layer where oneDNN is missing."""
    layer, x = nn.Linear(16, 8), noise(4, 16)
    q, k = noise(1, 2, 3, 8), noise(1, 2, 6, 8)
    mask = torch.zeros(3, 6).masked_fill(torch.ones(3, 6).triu(2).bool(), -torch.inf)
    with torch.no_grad(), products.Faster():
        assert products.linear(x.bfloat16(), noise(8, 16).bfloat16()).dtype == torch.bfloat16
        assert products.linear(x[:0], layer.weight).shape == (0, 8)
        masked = functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        ours = layer(x)
        assert not torch.equal(masked, functional.scaled_dot_product_attention(q, k, k, is_causal=True))
    assert torch.equal(masked, functional.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    monkeypatch.setattr(products, "_AVAILABLE", False)
    with torch.no_grad(), products.Faster():
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    assert torch.allclose(layer(x), ours, atol=1e-5)


@pytest.mark.skipif(not products._AVAILABLE, reason="this torch has no oneDNN")
def test_while_it_is_entered_the_layers_of_a_module_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: seen.append(1) or real(*args))
    with torch.no_grad(), products.Faster():
        nn.Linear(16, 8)(noise(4, 16))
    nn.Linear(16, 8)(noise(4, 16))
    assert seen == [1]
