"""What is timed: our kernels, the product in 16 bit, and others' kernels where they are installed.

A method takes a layer and gives the function that multiplies by it, or raises what kept it from doing so, which the
page then says. Nothing is trusted: each method's result is held against float64 before its time counts.

    ours                                 operators.py, on a GPU the kernels, on a CPU the torch functions
    torch                                the 16-bit product; its own product with 4-bit weights, which torchao's
                                         layers call too (packed as "tile_packed_to_4d")
    vLLM: Marlin, Machete, AWQ           the calls that vLLM 0.32's layers make, without its layers
    gemlite                              Triton, W_nbits = 4
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from quantize.kernels import operators
from quantize.kernels.bench_layers import Layer
from quantize.kernels.tensors import width

Product = Callable[[Tensor], Tensor]
"""x [tokens, k] -> [tokens, n]."""


@dataclass(frozen=True)
class Method:
    """make: what multiplies by a layer; most: tokens that it takes, None for any number; bits: of the weights that it
    reads, None for the layer's own."""

    name: str
    make: Callable[[Layer], Product]
    most: int | None = None
    bits: int | None = None


class Unfit(Exception):
    """A method that cannot do this layer, and why."""


def methods(device: torch.device, bits: int, others: bool = True) -> list[Method]:
    """Those that may be measured on `device` with weights of `bits`; without `others`, ours and the 16-bit product."""
    on_gpu = device.type == "cuda"
    ours = "" if on_gpu else "fallback "
    # A GPU before compute capability 8.0 has no gemm; that it then refuses is its row on the page.
    found = [
        Method(f"{ours}gemv", _ours(operators.gemv), operators.GEMV_TOKENS),
        Method(f"{ours}gemm", _ours(operators.gemm), operators.GEMM_TOKENS),
        Method(f"{ours}expand", _expanded),
        Method(f"{ours}linear", _ours(operators.linear)),
        Method("16 bit", _dense, bits=16),
    ]
    if others and bits == 4:
        found.append(Method("torch int4", _torch_gpu if on_gpu else _torch_cpu))
        if on_gpu:
            found += [
                Method("vLLM Marlin", _marlin),
                Method("vLLM Machete", _machete),
                Method("vLLM AWQ", _awq),
                Method("gemlite", _gemlite),
            ]
    return found


# --- ours, and 16 bit -------------------------------------------------------------------------------------------------


def _ours(operator: Callable[..., Tensor]) -> Callable[[Layer], Product]:
    def make(layer: Layer) -> Product:
        prepared = operators.tiles_of(layer.stored)
        return lambda x: operator(x, *prepared)

    return make


def _expanded(layer: Layer) -> Product:
    prepared = operators.tiles_of(layer.stored)
    return lambda x: dense(x, operators.expand(*prepared))


def _dense(layer: Layer) -> Product:
    weights = layer.weights(layer.scales.dtype)
    return lambda x: dense(x, weights)


# --- torch's own ------------------------------------------------------------------------------------------------------


def _scales_and_zeros(layer: Layer) -> Tensor:
    """[groups, n, 2]: its weight is (q - 8) s + z, so that z = (8 - zero point) s, rounded to the type of s."""
    zeros = ((8 - layer.zeros.float()) * layer.scales.float()).to(layer.scales.dtype)
    return torch.stack((layer.scales, zeros), dim=-1).transpose(0, 1).contiguous()


def _torch_gpu(layer: Layer) -> Product:
    if layer.scales.dtype != torch.bfloat16:
        raise Unfit("torch's int4 product on a GPU takes bfloat16 alone")
    pairs = (layer.q[:, ::2] << 4) | layer.q[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    return _torch(torch.ops.aten._weight_int4pack_mm, packed, layer)


def _torch_cpu(layer: Layer) -> Product:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.q.to(torch.int32), 1)
    return _torch(torch.ops.aten._weight_int4pack_mm_for_cpu, packed, layer)


def _torch(product: Callable[..., Tensor], packed: Tensor, layer: Layer) -> Product:
    size, pairs = width(layer.group_size, layer.k), _scales_and_zeros(layer)
    return lambda x: product(x, packed, size, pairs)


# --- vLLM's -----------------------------------------------------------------------------------------------------------


def _marlin(layer: Layer) -> Product:
    vllm, scalar_types = _module("vllm._custom_ops"), _module("vllm.scalar_type").scalar_types
    marlin = _module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    n, k = layer.n, layer.k
    words = vllm.gptq_marlin_repack(layer.gptq_words, size_k=k, size_n=n, num_bits=4)
    scales = marlin.marlin_permute_scales(layer.stored.scales, size_k=k, size_n=n, group_size=layer.group_size)
    groups = layer.zeros.T.to(torch.int32).contiguous()
    zeros = marlin.marlin_zero_points(groups, size_k=len(groups), size_n=n, num_bits=4)
    workspace = marlin.marlin_make_workspace_new(layer.q.device, marlin.MARLIN_MAX_BLOCKS_PER_SM)
    return lambda x: marlin.apply_gptq_marlin_linear(
        x, words, scales, zeros, workspace, scalar_types.uint4, output_size_per_partition=n,
        input_size_per_partition=k, input_global_scale=None,
    )  # fmt: skip


def _machete(layer: Layer) -> Product:
    vllm, scalar_types = _module("vllm._custom_ops"), _module("vllm.scalar_type").scalar_types
    if torch.cuda.get_device_capability(layer.q.device) != (9, 0):
        raise Unfit("Machete is for compute capability 9.0")
    kind, scales = scalar_types.uint4, layer.stored.scales
    words = layer.gptq_words.t().contiguous().t()  # by columns
    words = vllm.machete_prepack_B(words, a_type=scales.dtype, b_type=kind, group_scales_type=scales.dtype)
    zeros = (-layer.zeros.T.float() * scales.float()).to(scales.dtype).contiguous()
    size = width(layer.group_size, layer.k)
    return lambda x: vllm.machete_mm(
        a=x, b_q=words, b_type=kind, b_group_scales=scales, b_group_zeros=zeros, b_group_size=size
    )


def _awq(layer: Layer) -> Product:
    vllm, stored = _module("vllm._custom_ops"), layer.stored
    return lambda x: vllm.awq_gemm(x, stored.qweight, stored.scales, stored.qzeros, 8)


# --- others -----------------------------------------------------------------------------------------------------------


def _gemlite(layer: Layer) -> Product:
    gemlite = _module("gemlite.core")
    kind = gemlite.TORCH_TO_DTYPE[layer.scales.dtype]
    found = gemlite.GemLiteLinearTriton(
        W_nbits=4,
        group_size=width(layer.group_size, layer.k),
        in_features=layer.k,
        out_features=layer.n,
        input_dtype=kind,
        output_dtype=kind,
    )
    zeros = layer.zeros.to(layer.scales.dtype)
    found.pack(layer.q, layer.scales.reshape(-1, 1), zeros.reshape(-1, 1), None)
    return lambda x: found.forward(x)


def _module(name: str) -> Any:
    """A module that need not be there, and that nobody declares."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unfit(f"{error.name} is not installed") from None
