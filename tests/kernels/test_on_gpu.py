"""The operators on a GPU: the same cases that the host build passes, larger ones, streams and graphs.

    compute-sanitizer --tool memcheck python -m pytest -q tests/kernels/test_on_gpu.py

Without a GPU all of it is skipped. KNEEBENCH_TEST_DEVICE=cpu runs what needs no stream on the CPU's operators, to try
the tests themselves.
"""

import os
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize.kernels import operators, reference
from quantize.kernels.tensors import Stored, Tiles
from tests.kernels.layers import LAYOUTS, random_layer
from tests.kernels.test_fallback import exact, layers, name, scattered, usual
from tests.kernels.torch_layers import TYPES, as_reference, numbers, same, stored_of

DEVICE = torch.device(os.environ.get("KNEEBENCH_TEST_DEVICE", "cuda"))
ON_GPU = torch.cuda.is_available()
if DEVICE.type == "cuda" and not ON_GPU:
    pytest.skip("no NVIDIA GPU on this machine", allow_module_level=True)
needs_streams = pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU on this machine")

LARGE = [(896, 896, 128), (1152, 896, 128), (4864, 896, 32), (896, 4864, 64), (4096, 4096, 128), (4096, 4096, -1)]
"""Layers of Qwen2.5 0.5B, and a 7B's size: several splits on any card."""


def here(stored: Stored) -> Stored:
    return Stored(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in stored))


def back(tiles: Tiles) -> Tiles:
    return Tiles(*(part.cpu() if isinstance(part, Tensor) else part for part in tiles))


def has_tensor_cores() -> bool:
    return DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 0)


def activations(tokens: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def check(stored: Stored, kernel: str, tokens: int) -> None:
    """Within the rounding that test_fallback.py derives; gemv multiplies exact weights, the others rounded ones."""
    x = activations(tokens, stored.k, stored.scales.dtype)
    result = getattr(operators, kernel)(x.to(DEVICE), *operators.tiles_of(here(stored))).cpu()
    weights = exact(stored) if kernel == "gemv" else operators.dequantize(*stored).double()
    wanted, spread = x.double() @ weights.T, x.double().abs() @ weights.abs().T
    half = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11
    summed = stored.k * 2.0**-23 * spread
    assert ((result.double() - wanted).abs() <= summed + half * (wanted.abs() + summed) + 2.0**-25).all()


@pytest.mark.parametrize("layer", [*layers(), *scattered()], ids=name)
def test_tiles_and_weights_are_the_reference_s(layer: reference.Layer) -> None:
    stored = here(stored_of(layer))
    tiles = operators.tiles_of(stored)
    perm = None if layer.g_idx is None else reference.act_order(layer.g_idx)
    wanted, made = reference.prepare(layer, perm), as_reference(back(tiles), layer.dtype)
    assert np.array_equal(made.tiles, wanted.tiles)
    assert np.array_equal(made.scales, wanted.scales)
    assert np.array_equal(made.zeros, wanted.zeros)
    weights = numbers(reference.dequantize(layer), layer.dtype)
    assert same(operators.dequantize(*stored).cpu(), weights)
    assert same(operators.expand(*tiles).cpu(), weights)


@pytest.mark.parametrize(("bits", "layout", "dtype"), [*product((2, 3), ("gptq", "gptq_v2"), TYPES)])
def test_two_and_three_bits_are_dequantized(bits: int, layout: str, dtype: str) -> None:
    layer = random_layer(64, 96, 32, layout=layout, bits=bits, dtype=dtype, act_order=True)
    found = operators.dequantize(*here(stored_of(layer))).cpu()
    assert same(found, numbers(reference.dequantize(layer), dtype))


@pytest.mark.parametrize("layer", [*layers(), *scattered()], ids=name)
def test_products_of_small_layers(layer: reference.Layer) -> None:
    for tokens in (1, 2, 5, 8):
        check(usual(layer), "gemv", tokens)
    for tokens in (1, 9, 17, 64) if has_tensor_cores() else ():
        check(usual(layer), "gemm", tokens)


@pytest.mark.parametrize(("size", "layout", "dtype"), [*product(LARGE, LAYOUTS, TYPES)])
def test_products_of_large_layers(size: tuple[int, int, int], layout: str, dtype: str) -> None:
    stored = usual(random_layer(*size, layout=layout, dtype=dtype))
    check(stored, "gemv", 1)
    check(stored, "gemv", 8)
    if has_tensor_cores():
        check(stored, "gemm", 16)
        check(stored, "gemm", 64)
    for tokens in (1, 33, 256):
        check(stored, "linear" if tokens > 8 else "gemv", tokens)


def test_the_same_input_gives_the_same_bits() -> None:
    stored = here(usual(random_layer(4864, 896, 32, layout="gptq", dtype="bfloat16")))
    tiles, x = operators.tiles_of(stored), activations(4, 896, torch.bfloat16).to(DEVICE)
    first = operators.gemv(x, *tiles)
    assert all(torch.equal(operators.gemv(x, *tiles), first) for _ in range(20))


@needs_streams
def test_a_graph_captures_every_product_and_replays_it_on_new_input() -> None:
    stored = here(usual(random_layer(896, 4864, 128, layout="gptq", dtype="bfloat16", act_order=True)))
    tiles = operators.tiles_of(stored)
    for tokens in (1, 8, 32, 128):
        x = activations(tokens, 4864, torch.bfloat16).to(DEVICE)
        operators.linear(x, *tiles)  # what is built or loaded on first use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = operators.linear(x, *tiles)
        x.copy_(activations(tokens + 1, 4864, torch.bfloat16)[:tokens])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, operators.linear(x, *tiles))


@needs_streams
def test_a_kernel_waits_for_its_own_stream() -> None:
    """The input comes late, on another stream than the default one: a kernel on the wrong stream would miss it."""
    stored = here(usual(random_layer(896, 896, 128, layout="awq", dtype="float16")))
    tiles, x = operators.tiles_of(stored), activations(1, 896, torch.float16).to(DEVICE)
    wanted = operators.gemv(x, *tiles)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = operators.gemv(late, *tiles)
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
