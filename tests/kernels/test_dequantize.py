"""kb_dequantize: every layout against reference.py bit for bit, and against code that is not ours."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from harness.engines.environment import EngineEnv
from quantize.kernels import reference
from quantize.kernels.reference import Array, Layer
from tests.kernels.layers import LAYOUTS, TYPES, Kernels, random_layer, same

SIZES = {
    2: [(16, 32, -1), (48, 224, 32), (208, 256, 64), (80, 48, -1)],
    3: [(32, 32, 32), (96, 224, 32), (224, 384, 128), (32, 96, -1)],
    4: [(8, 8, -1), (24, 72, -1), (40, 224, 32), (264, 192, 64), (32, 256, 128), (1056, 136, -1)],
    8: [(8, 8, -1), (24, 72, -1), (40, 224, 32), (264, 192, 64), (32, 256, 128)],
}
WIDTHS = [(layout, bits) for layout in LAYOUTS for bits in ((4,) if layout == "awq" else (2, 3, 4, 8))]


def layers() -> Iterator[Layer]:
    for (layout, bits), dtype, zeros in product(WIDTHS, TYPES, (True, False)):
        for n, k, size in SIZES[bits]:
            yield random_layer(n, k, size, layout=layout, bits=bits, dtype=dtype, zeros=zeros)


def name(layer: Layer) -> str:
    zeros = "" if layer.qzeros is not None else "-symmetric"
    return f"{layer.layout}-{layer.bits}-{layer.n}x{layer.k}-{layer.group_size}-{layer.dtype}{zeros}"


@pytest.mark.parametrize("layer", list(layers()), ids=name)
def test_weights_are_the_reference_s(kernels: Kernels, layer: Layer) -> None:
    assert same(kernels.dequantize(layer), reference.dequantize(layer), layer.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_any_group_index_is_followed(kernels: Kernels, layout: str, bits: int, dtype: str) -> None:
    # Groups of any number of inputs, in any order; and the symmetric case, whose zero points no array has.
    for zeros in (True, False):
        layer = random_layer(96, 224, 32, layout=layout, bits=bits, dtype=dtype, zeros=zeros)
        layer = replace(layer, g_idx=np.random.default_rng(bits).integers(0, 7, 224).astype(np.int32))
        assert same(kernels.dequantize(layer), reference.dequantize(layer), dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order_and_neighbours_agree_where_they_say_the_same(kernels: Kernels, bits: int) -> None:
    layer = random_layer(96, 224, 32, bits=bits)
    told = replace(layer, g_idx=np.arange(224, dtype=np.int32) // 32)
    assert np.array_equal(kernels.dequantize(told), kernels.dequantize(layer))


@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_input_whose_group_does_not_exist_is_nan_alone(kernels: Kernels, bits: int, bad: int) -> None:
    layer = random_layer(96, 224, 32, bits=bits, act_order=True)
    assert layer.g_idx is not None
    wanted = reference.value(kernels.dequantize(layer), layer.dtype)
    layer.g_idx[[0, 101, 223]] = bad
    made = reference.value(kernels.dequantize(layer), layer.dtype)
    assert np.isnan(made[:, [0, 101, 223]]).all()
    others = np.delete(np.arange(224), [0, 101, 223])
    assert np.array_equal(made[:, others], wanted[:, others])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("layout", "field"), [("gptq_v2", 0), ("gptq", 15)])
def test_each_scale_times_each_step_is_rounded_once(kernels: Kernels, layout: str, field: int, dtype: str) -> None:
    """All 65536 scales by the steps 0..15 (z = 0) and -16..-1 (z = 16): subnormals, overflow, infinity and NaN too.

    The judge is numpy's float16, and for bfloat16 torch's: a float32 holds the product exactly, and is rounded once.
    """
    torch = pytest.importorskip("torch")
    # 32 groups of 32 inputs by 2048 outputs; within a group q is 0..15, twice.
    words = np.tile(np.array([[0x76543210], [0xFEDCBA98]], dtype=np.uint32), (64, 2048)).view(np.int32)
    zeros = np.full((32, 256), field * 0x11111111, dtype=np.uint32).view(np.int32)
    scales = np.arange(65536, dtype=np.uint16).reshape(32, 2048)
    made = kernels.dequantize(Layer(words, zeros, scales, None, layout, 4, dtype))
    steps = (np.arange(1024) % 16 - (16 if field else 0)).astype(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = (steps * scales.view(np.float16).astype(np.float32).T.repeat(32, axis=1)).astype(np.float16)
        bits = wanted.view(np.uint16)
    else:
        exact = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16).float().T.repeat_interleave(32, dim=1)
        bits = (exact * torch.from_numpy(steps)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert same(made, bits, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("layout", "bits"), WIDTHS)
def test_packing_py_s_layouts_mean_what_it_unpacks(kernels: Kernels, layout: str, bits: int, dtype: str) -> None:
    """quantize/packing.py, whose layouts were held against other tools, packs integers and zero points it chose."""
    torch = pytest.importorskip("torch")
    from quantize.packing import pack, pack_awq, pack_gptq
    from quantize.scheme import Quantized

    n, k, size = 96, 224, 32
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    least = 1 if layout == "gptq" else 0  # v1: stored.cuh says why 0 is apart
    zeros = torch.randint(least, 1 << bits, (n, k // size), generator=generator, dtype=torch.uint8)
    kind = torch.float16 if dtype == "float16" else torch.bfloat16
    scales = torch.randn(n, k // size, generator=generator).to(kind)
    quantized = Quantized(q, scales, zeros)
    if layout == "awq":
        qweight, qzeros, stored, g_idx = *pack_awq(quantized), None
    else:
        qweight, qzeros, stored, g_idx = pack_gptq(quantized, bits)
        if layout == "gptq_v2" or bits == 3:  # 3 bits of v1 likewise: a field's 1 does not borrow from the next word
            qzeros = pack(zeros.T - least, bits)
    layer = Layer(
        qweight.contiguous().numpy(), qzeros.contiguous().numpy(), stored.view(torch.int16).numpy().view(np.uint16),
        None if g_idx is None else g_idx.numpy(), layout, bits, dtype,
    )  # fmt: skip
    steps = q.float() - zeros.repeat_interleave(size, dim=1).float()
    wanted = (steps * scales.float().repeat_interleave(size, dim=1)).to(kind)
    assert np.array_equal(kernels.dequantize(layer), wanted.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packs_rows_as_gptq_does(kernels: Kernels, bits: int) -> None:
    """Its weight_packed is GPTQ's qweight turned round, of integers less 2^(bits-1): the symmetric zero point."""
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    signed = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (96, 224), generator=generator, dtype=torch.int8)
    packed = helpers.pack_to_int32(signed, bits).T.contiguous().numpy()
    ones = np.full((1, 96), 0x3C00, dtype=np.uint16)
    made = kernels.dequantize(Layer(packed, None, ones, None, "gptq", bits, "float16"))
    assert np.array_equal(reference.value(made, "float16"), signed.numpy())


# In vLLM's environment: its own packers, for the layouts that its own kernels read.
_VLLM_PACKS = """
import sys, numpy, torch
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, pack_cols
generator = torch.Generator().manual_seed(0)
n, k, size, made = 96, 224, 32, {}
for bits in (4, 8):
    q = torch.randint(0, 1 << bits, (k, n), generator=generator, dtype=torch.int32)
    z = torch.randint(1, 1 << bits, (k // size, n), generator=generator, dtype=torch.int32)
    made |= {f"q{bits}": q, f"z{bits}": z, f"gptq{bits}": gptq_pack(q, bits, k, n)}
    made |= {f"gptq_z{bits}": pack_cols(z - 1, bits, k // size, n)}
q, z = made["q4"], made["z4"]
made |= {"awq4": awq_pack(q, 4, k, n), "awq_z4": awq_pack(z, 4, k // size, n)}
numpy.savez(sys.argv[1], **{name: value.numpy() for name, value in made.items()})
"""


@pytest.mark.engine
@pytest.mark.parametrize(("layout", "bits"), [("awq", 4), ("gptq", 4), ("gptq", 8)])
def test_vllm_s_own_packers(kernels: Kernels, engine_env: EngineEnv, tmp_path: Path, layout: str, bits: int) -> None:
    file = tmp_path / "packed.npz"
    subprocess.run([engine_env.python, "-c", _VLLM_PACKS, str(file)], check=True, capture_output=True)
    packed = np.load(file)
    scales = reference.nearest(np.random.default_rng(0).normal(size=(7, 96)), "float16")

    def words(key: str) -> Array:
        return np.ascontiguousarray(packed[key]).view(np.int32)

    layer = Layer(words(f"{layout}{bits}"), words(f"{layout}_z{bits}"), scales, None, layout, bits, "float16")
    steps = packed[f"q{bits}"] - packed[f"z{bits}"].repeat(32, axis=0)
    wanted = steps.astype(np.float32) * scales.view(np.float16).astype(np.float32).repeat(32, axis=0)
    assert np.array_equal(kernels.dequantize(layer).T, wanted.astype(np.float16).view(np.uint16))


def test_nothing_is_read_or_written_outside_the_buffers(sanitized: Callable[..., None]) -> None:
    sanitized(__file__, "-k", "reference or group")
