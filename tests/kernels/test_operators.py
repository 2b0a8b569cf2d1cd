"""The operators as torch sees them: schema, shapes, tracing, the way to the kernels, and what is refused.

The CUDA implementations run here too, with the library that g++ built of the same sources and tensors on the CPU: all
of them but the device and the stream, which torch.cuda gives.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from quantize.errors import InputError, RunError
from quantize.kernels import dispatch, fallback, library, native, operators
from quantize.kernels.tensors import Stored, Tiles
from tests.kernels.layers import random_layer
from tests.kernels.torch_layers import same, stored_of

NAMES = ("prepare", "dequantize", "expand", "gemv", "gemm", "linear")


def stored(bits: int = 4, layout: str = "gptq", act_order: bool = False, zeros: bool = True) -> Stored:
    layer = random_layer(40, 192, 64, layout=layout, bits=bits, dtype="bfloat16", act_order=act_order, zeros=zeros)
    found = stored_of(layer)
    return found._replace(scales=torch.full_like(found.scales, 0.01))


def x_of(tokens: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens)).to(dtype)


LAYERS = [stored(), stored(8), stored(act_order=True), stored(layout="awq"), stored(8, "gptq_v2", zeros=False)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.layout}-{layer.bits}-{layer.g_idx is not None}")
@pytest.mark.parametrize("name", NAMES)
def test_torch_s_own_check_of_operators_passes(name: str, layer: Stored) -> None:
    """Schema, no input changed or aliased, and the shape function against the real one, with dynamic sizes too."""
    operator = getattr(operators, name)
    arguments: tuple[Any, ...] = tuple(layer)
    if name not in ("prepare", "dequantize"):
        arguments = tuple(operators.tiles_of(layer))
    if name in ("gemv", "gemm", "linear"):
        arguments = (x_of(), *arguments)
    found = opcheck(operator, arguments)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_each_operator_has_a_kernel_for_both_devices(name: str) -> None:
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kneebench::{name}", key)


def test_shapes_without_data_are_those_of_the_data() -> None:
    for layer in LAYERS:
        real = operators.prepare(*layer)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            told = [mode.from_tensor(part) if isinstance(part, Tensor) else part for part in layer]
            fake = operators.prepare(*told)
            assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
            product = operators.linear(mode.from_tensor(x_of(6).view(2, 3, 192)), *fake, *layer[5:], layer.n, layer.k)
            assert (product.shape, product.dtype) == ((2, 3, 40), torch.bfloat16)


def test_a_compiled_function_holds_the_operator_and_takes_any_number_of_tokens() -> None:
    tiles = operators.tiles_of(stored())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(x: Tensor) -> Tensor:
        return torch.relu(operators.linear(x, *tiles))

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 20):  # not 3: torch takes sizes that are alike at first, as the tiles' are, for one size
        assert torch.equal(compiled(x_of(tokens)), layer(x_of(tokens)))
    assert seen.count("kneebench.linear.default") == 1  # one graph for all of them


def test_fx_traces_it_with_symbolic_tokens() -> None:
    tiles = operators.tiles_of(stored())
    traced = make_fx(lambda x, *parts: operators.linear(x, *parts, *tiles[4:]), tracing_mode="symbolic")
    graph = traced(x_of(5), *tiles[:4])
    assert any(node.target is operators.linear for node in graph.graph.nodes)
    assert torch.equal(graph(x_of(9), *tiles[:4]), operators.linear(x_of(9), *tiles))


def test_a_group_index_that_says_nothing_costs_nothing() -> None:
    """GPTQ checkpoints carry one always. Left in, each product would gather x."""
    usual = torch.arange(192, dtype=torch.int32) // 64
    assert operators.neighbours(usual, 64)
    assert not operators.neighbours(usual.flip(0), 64)
    assert operators.neighbours(torch.zeros(192, dtype=torch.int32), -1)
    plain = operators.tiles_of(stored())
    told = operators.tiles_of(stored()._replace(g_idx=usual))
    assert told.perm.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(told[:3], plain[:3], strict=True))


def test_scattered_groups_are_put_together_and_taken_apart_again() -> None:
    layer = stored(act_order=True)
    tiles = operators.tiles_of(layer)
    assert layer.g_idx is not None
    assert torch.equal(layer.g_idx[tiles.perm], torch.arange(192, dtype=torch.int32) // 64)
    assert same(operators.expand(*tiles), operators.dequantize(*layer))
    wanted = x_of().double() @ operators.dequantize(*layer).double().T
    for operator in (operators.gemv, operators.gemm, operators.linear):
        assert torch.allclose(operator(x_of(), *tiles).double(), wanted, rtol=0.01, atol=0.01)


# --- the way to the kernels -------------------------------------------------------------------------------------------


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA implementations on the host library; the names of the functions of native.py that they call."""
    called: list[str] = []
    host = library.host()

    def call(function: Callable[..., Any], where: Tensor, *arguments: Any) -> Any:
        assert where.device.type == "cpu"
        called.append(function.__name__)
        return function(host, *arguments, 0)

    monkeypatch.setattr(operators, "_native", call)
    monkeypatch.setattr(dispatch, "limits", lambda device: dispatch.Limits(4, 32))
    return called


@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [(1, "gemv"), (4, "gemv"), (5, "gemm"), (32, "gemm"), (33, "expand"), (100, "expand")],
)
def test_linear_takes_the_kernel_of_the_table(on_host: list[str], tokens: int, kernel: str) -> None:
    tiles = operators.tiles_of(stored(act_order=True))
    x = x_of(tokens).view(tokens, 1, 192)
    result = operators._linear_cuda(x, *tiles)
    assert on_host == [kernel]
    assert result.shape == (tokens, 1, 40)
    assert torch.allclose(result.float(), operators.linear(x, *tiles).float(), rtol=0.01, atol=0.02)


def test_the_other_operators_on_a_gpu_are_the_kernels_too(on_host: list[str]) -> None:
    layer = stored(act_order=True)
    tiles = operators.tiles_of(layer)
    for made, wanted in zip(operators._prepare_cuda(*layer), tiles[:4], strict=True):
        assert torch.equal(made, wanted)
    assert same(operators._dequantize_cuda(*layer), operators.dequantize(*layer))
    assert same(operators._expand_cuda(*tiles), operators.expand(*tiles))
    for name in ("gemv", "gemm"):
        result = getattr(operators, f"_{name}_cuda")(x_of(), *tiles)
        assert torch.allclose(result.float(), getattr(operators, name)(x_of(), *tiles).float(), rtol=0.01, atol=0.01)
    assert on_host == ["prepare", "dequantize", "expand", "gemv", "gemm"]


def test_a_kernel_s_refusal_is_an_error_with_its_words() -> None:
    """Past our own checks: the library looks again, and it was given three bits of its own."""
    tiles = operators.tiles_of(stored())
    with pytest.raises(RunError, match="a kernel refused: .*bits"):
        native.expand(library.host(), tiles._replace(bits=3), 0)
    with pytest.raises(RunError, match="a kernel refused: .*tokens"):
        native.gemv(library.host(), x_of(9), tiles, 0)


# --- what is refused --------------------------------------------------------------------------------------------------


BAD_STORED: list[tuple[dict[str, Any], str]] = [
    ({"layout": "exl2"}, "layout exl2. Allowed: awq, gptq, gptq_v2"),
    ({"bits": 3}, "bits 3. Allowed: 4, 8"),
    ({"group_size": 100}, "group_size 100 with 192 inputs. Allowed: a multiple of 32"),
    ({"group_size": 0}, "group_size 0"),
    ({"group_size": 48}, "group_size 48"),
    ({"group_size": 128}, "group_size 128 with 192 inputs"),
    ({"group_size": 32}, r"scales of shape \(3, 40\). Allowed: \(6, 40\)"),
    ({"qweight": torch.zeros(24, 40)}, "qweight in float32. Allowed: int32"),
    ({"qweight": torch.zeros(24, dtype=torch.int32)}, "2 dimensions"),
    ({"qweight": torch.zeros(0, 40, dtype=torch.int32)}, "none empty"),
    ({"scales": torch.zeros(3, 40)}, "scales' type float32. Allowed: float16, bfloat16"),
    ({"qzeros": torch.zeros(3, 6, dtype=torch.int32)}, r"qzeros of shape \(3, 6\). Allowed: \(3, 5\)"),
    ({"qzeros": torch.zeros(3, 5, dtype=torch.int32, device="meta")}, "qzeros on meta, qweight on cpu"),
    ({"g_idx": torch.zeros(191, dtype=torch.int32)}, r"g_idx of shape \(191,\). Allowed: \(192,\)"),
    ({"g_idx": torch.zeros(192, dtype=torch.int64)}, "g_idx in int64"),
    ({"g_idx": torch.zeros(192, dtype=torch.int32)}, "groups are not all of one size. Allowed: 64 inputs in each of 3"),
    ({"g_idx": torch.arange(192, dtype=torch.int32) // 64 + 1}, "groups are not all of one size"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_STORED, ids=[message[:25] for _, message in BAD_STORED])
def test_a_stored_layer_with_a_fault_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):  # the CPU's own: torch has words of its own for two devices
        operators._prepare_cpu(*stored()._replace(**changed))


def test_awq_knows_neither_other_bits_nor_a_group_index() -> None:
    with pytest.raises(InputError, match="bits 8. Allowed: 4"):
        operators.prepare(*stored(layout="awq")._replace(bits=8))
    with pytest.raises(InputError, match="a g_idx in the AWQ layout"):
        operators.prepare(*stored(layout="awq")._replace(g_idx=torch.arange(192, dtype=torch.int32) // 64))


def test_two_and_three_bits_are_for_dequantize_alone() -> None:
    layer = stored_of(random_layer(32, 64, 32, layout="gptq", bits=3))
    assert operators.dequantize(*layer).shape == (32, 64)
    with pytest.raises(InputError, match="bits 3. Allowed: 4, 8"):
        operators.prepare(*layer)


BAD_TILES: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3}, "bits 3. Allowed: 4, 8"),
    ({"bits": 8}, r"tiles of shape \(3, 3, 1, 32, 16\). Allowed: \(3, 3, 2, 32, 16\)"),
    ({"k": 256}, r"Allowed: \(3, 4, 1, 32, 16\)"),
    ({"n": 64}, r"Allowed: \(4, 3, 1, 32, 16\)"),
    ({"n": 0}, "n 0, k 192, group_size 64"),
    ({"group_size": 128}, "n 40, k 192, group_size 128"),
    ({"group_size": -1}, r"scales of shape \(3, 3, 16\). Allowed: \(3, 1, 16\)"),
    ({"zeros": torch.zeros(3, 3, 16, dtype=torch.uint8)}, "zeros in uint8. Allowed: int16"),
    ({"perm": torch.zeros(5, dtype=torch.int32)}, r"perm of shape \(5,\). Allowed: \(192,\)"),
    ({"tiles": torch.zeros(3, 3, 1, 32, 16, dtype=torch.uint8).transpose(0, 1)}, "tiles with gaps"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_TILES, ids=[message[:25] for _, message in BAD_TILES])
def test_tiles_of_another_size_are_refused(changed: dict[str, Any], message: str) -> None:
    tiles = operators.tiles_of(stored())._replace(**changed)
    for operator in (operators.gemv, operators.gemm, operators.linear):
        with pytest.raises(InputError, match=message):
            operator(x_of(), *tiles)
    with pytest.raises(InputError, match=message):
        operators.expand(*tiles)


@pytest.mark.parametrize("operator", [operators.gemv, operators.gemm, operators.linear])
def test_activations_that_do_not_fit_are_refused(operator: Callable[..., Tensor]) -> None:
    tiles = operators.tiles_of(stored())
    with pytest.raises(InputError, match=r"x of shape \(3, 191\). Allowed: \[..., 192\]"):
        operator(x_of()[:, :191], *tiles)
    with pytest.raises(InputError, match="x in float16 for scales in bfloat16"):
        operator(x_of(dtype=torch.float16), *tiles)


def test_each_product_takes_so_many_tokens_and_no_more() -> None:
    tiles = operators.tiles_of(stored())
    for operator, most in ((operators.gemv, 8), (operators.gemm, 64)):
        assert operator(x_of(most), *tiles).shape == (most, 40)
        with pytest.raises(InputError, match=f"{most + 1} tokens. Allowed: at most {most}. Call `linear`"):
            operator(x_of(most + 1), *tiles)
    assert operators.linear(x_of(65), *tiles).shape == (65, 40)


def test_engines_need_no_more_than_torch() -> None:
    """vLLM's environment has none of this project's dependencies but torch."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport quantize.kernels.operators\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'quantize', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fallback_is_what_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing asks for a library there."""
    monkeypatch.setattr(library, "load", lambda: pytest.fail("asked for the CUDA library"))
    tiles = operators.tiles_of(stored())
    assert torch.equal(operators.gemv(x_of(), *tiles), fallback.gemv(x_of(), tiles))
    assert isinstance(tiles, Tiles)
