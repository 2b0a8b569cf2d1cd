"""Integers to int32 words and back, one function pair for each checkpoint layout.

AWQ "gemm" (AutoAWQ, read by vLLM and transformers): eight 4-bit values share a word. Values lie along the OUTPUT
dimension and interleaved, so that a GPU kernel turns a word into four half2 registers with four shifts:

    bits        31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    output          7      5      3      1      6      4      2      0     (of each eight neighbours)

The function names the kernel's tensors: qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales [groups, out].
Source of the order: AutoAWQ's gemm packing; the test checks it against compressed-tensors' own AutoAWQ reader.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import SchemeError
from quantize.scheme import Quantized

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies in nibble 0 (lowest), 1, 2, ...
_NIBBLES = 8


class AwqTensors(NamedTuple):
    """One linear layer as stored. qweight: int32 [in, out/8]; qzeros: int32 [groups, out/8]; scales: [groups, out]."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def pack_awq(quantized: Quantized) -> AwqTensors:
    """Lay a quantized matrix out as AutoAWQ does.

    Raises SchemeError for values beyond 4 bits, and for outputs that do not fill whole words.
    """
    q, scales, zeros = quantized
    return AwqTensors(_pack(q.T), _pack(zeros.T), scales.T.contiguous())


def unpack_awq(tensors: AwqTensors) -> Quantized:
    """The inverse of `pack_awq`, exactly."""
    return Quantized(
        _unpack(tensors.qweight).T.contiguous(),
        tensors.scales.T.contiguous(),
        _unpack(tensors.qzeros).T.contiguous(),
    )


def _pack(values: Tensor) -> Tensor:
    """uint8 [rows, out] of 4-bit values -> int32 [rows, out/8]."""
    rows, columns = values.shape
    if columns % _NIBBLES:
        raise SchemeError(
            f"a weight with {columns} outputs",
            f"a multiple of {_NIBBLES}, which share an int32 word",
            "This layer cannot be stored in the AWQ layout",
        )
    if values.numel() and int(values.max()) > 15:
        raise SchemeError("integers above 15", "4-bit values", "The AWQ layout needs --bits 4")
    ordered = values.reshape(rows, columns // _NIBBLES, _NIBBLES)[..., list(_AWQ_ORDER)]
    return (ordered.to(torch.int32) << _shifts(values)).sum(dim=-1, dtype=torch.int32)


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, out/8] -> uint8 [rows, out]. The mask undoes the sign that >> drags along."""
    nibbles = (words[..., None] >> _shifts(words)) & 15
    outputs = torch.empty_like(nibbles, dtype=torch.uint8)
    outputs[..., list(_AWQ_ORDER)] = nibbles.to(torch.uint8)
    return outputs.view(words.shape[0], -1)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)
