"""kb_gemv on the emulated GPU: every size, type and token count against float64, and what is refused.

Where a layer is exact (products.py), the result must be the true value rounded once, bit for bit.
"""

from itertools import product

import numpy as np
import pytest

from quantize.kernels import reference
from tests.kernels import products
from tests.kernels.layers import LAYOUTS, TYPES, Kernels, Refused, address, random_layer, tiles_struct
from tests.kernels.products import SIZES, exact_layer, exact_x, groups_of, machine, multiply, rough_x, true_weights

KINDS = list(product((4, 8), TYPES))


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_every_size_group_and_token_count(kernels: Kernels, bits: int, dtype: str) -> None:
    for n, k in SIZES:
        for i, size in enumerate(groups_of(k)):
            tiles = reference.prepare(exact_layer(n, k, size, bits, dtype))
            weights = true_weights(tiles)
            for tokens in range(1 + i % 2, 9, 2) if n * k > 20000 else range(1, 9):
                x = exact_x(tokens, k, dtype)
                wanted = reference.nearest(reference.value(x, dtype) @ weights.T, dtype)
                got = multiply(kernels, "gemv", tiles, x)
                assert (got == wanted).all(), (n, k, size, tokens, np.argwhere(got != wanted)[:5])


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_splits_of_the_inputs_add_up(kernels: Kernels, bits: int, dtype: str) -> None:
    """Two rows of chunks on eight processors leave room for four splits, and 194 chunks allow three of 64 or more."""
    tiles = reference.prepare(exact_layer(24, 12416, 128, bits, dtype))
    x = exact_x(3, tiles.k, dtype)
    with machine(kernels, processors=8):
        assert products.workspace_bytes(kernels, "gemv", tiles, 3) == 3 * 3 * 24 * 4
        got = multiply(kernels, "gemv", tiles, x)
    assert (got == reference.nearest(reference.value(x, dtype) @ true_weights(tiles).T, dtype)).all()


@pytest.mark.parametrize(("bits", "dtype", "size"), [(*kind, last) for kind in KINDS for last in (32, 128, -1)])
def test_rough_values_stay_within_what_float32_sums_may_lose(
    kernels: Kernels, bits: int, dtype: str, size: int
) -> None:
    tiles = reference.prepare(random_layer(40, 384, size, bits=bits, dtype=dtype))
    x = rough_x(5, tiles.k, dtype)
    low, high = products.bounds(x, true_weights(tiles), dtype)
    got = reference.value(multiply(kernels, "gemv", tiles, x), dtype)
    assert (low <= got).all() and (got <= high).all()


def test_the_bound_is_narrow() -> None:
    """It leaves at most a few neighbours of the true value: a kernel that loses a single weight is outside."""
    tiles = reference.prepare(random_layer(40, 384, -1))
    x, weights = rough_x(5, tiles.k, "float16"), true_weights(tiles)
    low, high = products.bounds(x, weights, "float16")
    without = weights.copy()
    without[:, 200] = 0
    changed = reference.value(reference.nearest(reference.value(x, "float16") @ without.T, "float16"), "float16")
    assert ((changed < low) | (changed > high)).mean() > 0.9


@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
@pytest.mark.parametrize(("layout", "act_order"), [*((layout, False) for layout in LAYOUTS), ("gptq", True)])
def test_from_the_checkpoint_to_the_product(kernels: Kernels, layout: str, act_order: bool, kernel: str) -> None:
    """kb_prepare, then the product, against the dequantized layer of reference.py with inputs in the model's order."""
    layer = exact_layer(48, 256, 64, 4, "float16", layout=layout, act_order=act_order)
    perm = None if layer.g_idx is None else reference.act_order(layer.g_idx)
    x = exact_x(7, layer.k, "float16")
    got = multiply(
        kernels, kernel, kernels.prepare(layer, perm), x if perm is None else np.ascontiguousarray(x[:, perm])
    )
    exact = reference.product(x, reference.dequantize(layer), "float16")
    assert (got == reference.nearest(exact, "float16")).all()


@pytest.mark.parametrize(("kernel", "tokens"), [("gemv", 1), ("gemv", 8), ("gemm", 1), ("gemm", 20)])
def test_the_order_of_threads_changes_no_bit(kernels: Kernels, kernel: str, tokens: int) -> None:
    """Rough values, several splits: any sum in another order would show, and so would a missing barrier."""
    tiles = reference.prepare(random_layer(72, 8256 if kernel == "gemv" else 1344, 32))
    x = rough_x(tokens, tiles.k, "float16")
    with machine(kernels, processors=32):
        assert products.workspace_bytes(kernels, kernel, tiles, tokens) > 0
        first = multiply(kernels, kernel, tiles, x)
        for order in (1, 2, 3):
            kernels.library.kb_simt_set(order, 32, 90)
            assert (multiply(kernels, kernel, tiles, x) == first).all()


def test_a_nan_stays_with_its_token_and_a_nan_scale_with_its_output(kernels: Kernels) -> None:
    for kernel in ("gemv", "gemm"):
        tiles = reference.prepare(exact_layer(24, 160, 32, 4, "float16"))
        tiles.scales[1, 2, 3] = 0x7E00  # output 19
        x = exact_x(4, tiles.k, "float16")
        x[2, 159] = 0x7E00
        nan = np.isnan(reference.value(multiply(kernels, kernel, tiles, x), "float16"))
        expected = np.zeros((4, 24), dtype=bool)
        expected[2, :] = expected[:, 19] = True
        assert (nan == expected).all()


TOKENS, WORKSPACE, ALIGNMENT, NULL, SIZE, DEVICE = 7, 8, 2, 1, 3, 9  # kneebench.h


@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
def test_what_is_refused(kernels: Kernels, kernel: str) -> None:
    """Each with its code and a message that says what was given and what is allowed; y stays as it was."""
    tiles = reference.prepare(exact_layer(16, 12288, -1, 4, "float16"))
    most = products.MOST[kernel]
    x, y = exact_x(most + 1, tiles.k, "float16"), np.full((most + 1, 24), 0x5A5A, dtype=np.uint16)
    workspace = np.zeros(1 << 20, dtype=np.uint8)

    def refusal(layer: object = None, **changed: object) -> tuple[int, str]:
        given = {
            "x": address(x),
            "y": address(y),
            "tokens": 1,
            "workspace": address(workspace),
            "bytes": workspace.size,
        }
        with pytest.raises(Refused) as caught:
            kernels.call(f"kb_{kernel}", layer or tiles_struct(tiles), *(given | changed).values(), None)
        return caught.value.code, str(caught.value)

    with machine(kernels, processors=8):
        needed = products.workspace_bytes(kernels, kernel, tiles, 1)
        assert needed > 0
        assert refusal(tokens=0) == (TOKENS, f"0 tokens: 1 to {most} are allowed")
        assert refusal(tokens=most + 1) == (TOKENS, f"{most + 1} tokens: 1 to {most} are allowed")
        assert refusal(bytes=needed - 1) == (WORKSPACE, f"the workspace has {needed - 1} bytes: {needed} are needed")
        assert refusal(workspace=None)[0] == NULL
        assert refusal(workspace=workspace.ctypes.data + 8)[0] == ALIGNMENT
        assert refusal(x=x.ctypes.data + 2) == (ALIGNMENT, "x begins 2 bytes after a multiple of 16: 0 are allowed")
        assert refusal(y=y.ctypes.data + 2)[0] == ALIGNMENT
        assert refusal(x=None) == (NULL, "x is NULL: an array is needed")
        assert refusal(tiles_struct(tiles, k=12284, group_size=12284))[0] == SIZE
        assert refusal(tiles_struct(tiles, k=1 << 21, group_size=1 << 21))[0] == SIZE
    with machine(kernels, processors=0):
        assert refusal()[0] == DEVICE
    with machine(kernels, architecture=75, processors=1):
        if kernel == "gemm":
            assert refusal() == (DEVICE, "compute capability 7.5: gemm needs 8.0")
        else:
            kernels.call("kb_gemv", tiles_struct(tiles), address(x), address(y), 1, None, 0, None)
            y[:] = 0x5A5A
    assert (y == 0x5A5A).all()


def test_workspace_is_refused_with_the_code_negated(kernels: Kernels) -> None:
    library = kernels.library
    tiles = reference.prepare(exact_layer(16, 64, -1, 4, "float16"))
    assert library.kb_workspace(tiles_struct(tiles), 8, 0) == 0
    assert library.kb_workspace(tiles_struct(tiles), 9, 0) == -TOKENS
    assert library.kb_workspace(tiles_struct(tiles), 64, 1) == 0
    assert library.kb_workspace(tiles_struct(tiles), 65, 1) == -TOKENS
    assert library.kb_workspace(tiles_struct(tiles, n=12), 1, 0) == -SIZE
    assert library.kb_workspace(tiles_struct(tiles), 1, 2) < 0
