"""Integers to int32 words and back, one function pair for each checkpoint layout.

All three write the same stream of bits: value i of a row takes bits i*b .. i*b + b - 1, lowest first, counted through
the row's words, and a value of 3 bits may begin in one word and end in the next. They differ in what a row is:

    layout               weights: a row is        zero points: a row is      order, and what is stored
    AWQ "gemm"           one input, all outputs   one group, all outputs     interleaved, see below; 4 bits
    GPTQ v1              one output, all inputs   one group, all outputs     z - 1
    compressed-tensors   one output, all inputs   one group, all outputs     as they are

    AWQ      qweight [in, out/8]        qzeros [groups, out/8]                  scales [groups, out]
    GPTQ     qweight [in*b/32, out]     qzeros [groups, out*b/32]               scales [groups, out]   g_idx [in]
    c.-t.    weight_packed [out, in*b/32]   weight_zero_point [out*b/32, groups]    weight_scale [out, groups]

AWQ takes each eight neighbouring outputs in the order 0 2 4 6 1 3 5 7 (lowest nibble first), so that a GPU kernel turns
a word into four half2 registers with four shifts. GPTQ v1 subtracts 1 from the zero points, word by word, which
borrows from the neighbour where a zero point is 0; adding it back word by word undoes that in every case.

Sources of the layouts: AutoAWQ's gemm packing; AutoGPTQ's and GPTQModel's linear layers; compressed-tensors 0.20. Its
0.17 let no value of 3 bits cross words (their pull request 732 changed that in June 2026), and such files are refused.
The tests hold each layout against a reader that is not ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import SchemeError
from quantize.scheme import Quantized

WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies in nibble 0 (lowest), 1, 2, ...
_AWQ_BITS = 4


class AwqTensors(NamedTuple):
    """One linear layer as stored. qweight: int32 [in, out/8]; qzeros: int32 [groups, out/8]; scales: [groups, out]."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


class GptqTensors(NamedTuple):
    """As in the table above; g_idx, int32 [in], has the group of each input, and may be missing in others' files."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None


class CtPacked(NamedTuple):
    """As in the table above; no zero points if symmetric; weight_shape is int64 [2]: out, in."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor


class CtInt8(NamedTuple):
    """weight: int8 [out, in]; weight_scale: [out, groups]; weight_zero_point: int8 [out, groups] or None."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None


def pack_awq(quantized: Quantized) -> AwqTensors:
    """Lay a quantized matrix out as AutoAWQ does.

    Raises SchemeError for values beyond 4 bits, and for outputs that do not fill whole words.
    """
    q, scales, zeros = quantized
    return AwqTensors(_pack_awq(q.T), _pack_awq(zeros.T), scales.T.contiguous())


def unpack_awq(tensors: AwqTensors) -> Quantized:
    """The inverse of `pack_awq`, exactly."""
    return Quantized(
        _unpack_awq(tensors.qweight).T.contiguous(),
        tensors.scales.T.contiguous(),
        _unpack_awq(tensors.qzeros).T.contiguous(),
    )


def pack_gptq(quantized: Quantized, bits: int) -> GptqTensors:
    """Lay a quantized matrix out as GPTQ v1 does.

    Raises SchemeError where inputs or outputs do not fill whole words.
    """
    q, scales, zeros = quantized
    (outputs, inputs), groups = q.shape, scales.shape[1]
    _check_words("inputs", inputs, bits, "GPTQ")
    _check_words("outputs", outputs, bits, "GPTQ")
    return GptqTensors(
        pack(q, bits).T.contiguous(),
        pack(zeros.T, bits) - _ones(outputs, bits, q.device),
        scales.T.contiguous(),
        _group_index(inputs, groups, q.device),
    )


def unpack_gptq(tensors: GptqTensors, bits: int, version: int = 1) -> Quantized:
    """The inverse of `pack_gptq`, exactly. In `version` 2 (GPTQModel) zero points are stored as they are.

    Raises SchemeError where g_idx scatters a group's inputs (desc_act without static groups).
    """
    inputs = tensors.qweight.shape[0] * WORD // bits
    groups, outputs = tensors.scales.shape
    index = tensors.g_idx
    if index is not None and not torch.equal(index.to(torch.int32), _group_index(inputs, groups, index.device)):
        raise SchemeError(
            "a GPTQ layer whose g_idx scatters the inputs of a group",
            "groups of neighbours (desc_act false, or true with static groups)",
            "Quantize the model again: vLLM 0.32 refuses such a checkpoint too",
        )
    words = tensors.qzeros if version == 2 else tensors.qzeros + _ones(outputs, bits, tensors.qzeros.device)
    return Quantized(
        unpack(tensors.qweight.T, bits, inputs),
        tensors.scales.T.contiguous(),
        unpack(words, bits, outputs).T.contiguous(),
    )


def pack_ct(quantized: Quantized, bits: int, symmetric: bool) -> CtPacked:
    """Lay a quantized matrix out as compressed-tensors' pack-quantized does. The last word of a row may not be full."""
    q, scales, zeros = quantized
    if symmetric:
        _check_middle(zeros, bits)
    stored = None if symmetric else pack(zeros.T, bits).T.contiguous()
    return CtPacked(pack(q, bits), scales.contiguous(), stored, torch.tensor(q.shape))


def unpack_ct(tensors: CtPacked, bits: int) -> Quantized:
    """The inverse of `pack_ct`, exactly. Raises SchemeError for a stream of another width (see the module's text)."""
    outputs, inputs = tensors.weight_shape.tolist()
    if tensors.weight_packed.shape[1] != (words := -(-inputs * bits // WORD)):
        raise SchemeError(
            f"{tensors.weight_packed.shape[1]} words for {inputs} values of {bits} bits",
            f"{words}, without gaps, as compressed-tensors 0.20 packs",
            "Save the checkpoint again with a newer compressed-tensors",
        )
    scales, stored = tensors.weight_scale, tensors.weight_zero_point
    zeros = _middle(scales, bits) if stored is None else unpack(stored.T, bits, outputs).T.contiguous()
    return Quantized(unpack(tensors.weight_packed, bits, inputs), scales.contiguous(), zeros)


def pack_int8(quantized: Quantized) -> CtInt8:
    """Symmetric 8-bit integers as compressed-tensors' int-quantized stores them: q - 128."""
    q, scales, zeros = quantized
    _check_middle(zeros, 8)
    return CtInt8((q.to(torch.int16) - 128).to(torch.int8), scales.contiguous(), None)


def unpack_int8(tensors: CtInt8, bits: int = 8) -> Quantized:
    """The inverse of `pack_int8`, exactly. Other tools store fewer bits and zero points this way too."""

    def unsigned(values: Tensor) -> Tensor:
        return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)

    weight, scales, stored = tensors
    return Quantized(
        unsigned(weight), scales.contiguous(), _middle(scales, bits) if stored is None else unsigned(stored)
    )


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] of `bits`-bit values -> int32 [rows, ceil(n bits / 32)]. Raises SchemeError for larger values."""
    rows, count = values.shape
    if values.numel() and int(values.max()) >> bits:
        raise SchemeError(f"integers above {(1 << bits) - 1}", f"{bits}-bit values", "This is a bug: report it")
    words = -(-count * bits // WORD)
    blocks = -(-count // WORD)  # 32 values fill `bits` words, whatever bits is
    values = torch.nn.functional.pad(values, (0, blocks * WORD - count)).view(rows, blocks, WORD)
    stream = values.new_zeros(rows, blocks, bits, dtype=torch.int32)
    for i in range(WORD):
        word, offset = divmod(i * bits, WORD)
        value = values[..., i].to(torch.int32)
        stream[..., word] |= value << offset
        if offset + bits > WORD:
            stream[..., word + 1] |= value >> (WORD - offset)
    return stream.view(rows, -1)[:, :words].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, ceil(count bits / 32)] -> uint8 [rows, count]. Raises SchemeError for words of another type."""
    if words.dtype != torch.int32:
        raise SchemeError(f"packed integers stored as {words.dtype}", "int32 words", "Another tool's layout: not read")
    rows, width = words.shape
    blocks = -(-count // WORD)
    stream = torch.nn.functional.pad(words, (0, blocks * bits - width)).view(rows, blocks, bits)
    values = torch.empty(rows, blocks, WORD, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, offset = divmod(i * bits, WORD)
        value = stream[..., word] >> offset  # drags the sign along: masked away below, or here where more bits follow
        if (low := WORD - offset) < bits:
            value = (value & ((1 << low) - 1)) | (stream[..., word + 1] << low)
        values[..., i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return values.view(rows, -1)[:, :count].contiguous()


def _pack_awq(values: Tensor) -> Tensor:
    """uint8 [rows, out] of 4-bit values -> int32 [rows, out/8]."""
    rows, outputs = values.shape
    _check_words("outputs", outputs, _AWQ_BITS, "AWQ")
    if values.numel() and int(values.max()) > 15:
        raise SchemeError("integers above 15", "4-bit values", "The AWQ layout needs --bits 4")
    return pack(values.reshape(rows, -1, 8)[..., list(_AWQ_ORDER)].reshape(rows, outputs), _AWQ_BITS)


def _unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, out/8] -> uint8 [rows, out]."""
    rows, width = words.shape
    nibbles = unpack(words, _AWQ_BITS, 8 * width).view(rows, width, 8)
    outputs = torch.empty_like(nibbles)
    outputs[..., list(_AWQ_ORDER)] = nibbles
    return outputs.view(rows, -1)


def _ones(count: int, bits: int, device: torch.device) -> Tensor:
    """The words of `count` ones, [1, count*bits/32]."""
    return pack(torch.ones(1, count, dtype=torch.uint8, device=device), bits)


def _group_index(inputs: int, groups: int, device: torch.device) -> Tensor:
    """The group of each input: int32 [in]."""
    return torch.arange(inputs, dtype=torch.int32, device=device) // (inputs // groups)


def _middle(scales: Tensor, bits: int) -> Tensor:
    """The zero points of symmetric integers, which no file stores: uint8, as `scales`."""
    return torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)


def _check_middle(zeros: Tensor, bits: int) -> None:
    if not torch.equal(zeros, _middle(zeros, bits)):
        raise SchemeError(
            "zero points in a symmetric scheme", f"{1 << (bits - 1)} everywhere", "This is a bug: report it"
        )


def _check_words(what: str, count: int, bits: int, layout: str) -> None:
    if count * bits % WORD:
        raise SchemeError(
            f"a weight with {count} {what}",
            f"a multiple of {WORD // bits if WORD % bits == 0 else WORD}, which share int32 words",
            f"This layer cannot be stored in the {layout} layout",
        )
