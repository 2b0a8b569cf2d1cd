"""Which linear layers of a quantized block hurt, measured while both forms of the block run.

The original computes y = W x + c. The checkpoint holds What, the rounding of W' = diag(1/r) W diag(s) (`unfold` finds
the factors; without folds they are 1), and computes yhat = What Q(xhat) + chat: xhat comes from the quantized model's
own run, and Q rounds activations where the scheme does. Over all tokens, in decibels:

    weight SQNR    10 log10(||W'||^2 / ||What - W'||^2)                         how fine the integers are
    own error      10 log10(||What Q(xhat) - W' xhat||^2 / ||W' xhat||^2)       what THIS layer's rounding does
    output error   10 log10(||r (yhat - chat) - W x||^2 / ||W x||^2)            with what all before it did

Own error says which layer to give more bits: it is what would be left if all before it were right. Output error says
how wrong the layer's outputs are by now. Biases are left out, because a large one would make any error look small.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import linear
from quantize.scheme import Scheme, fake_quantize_tokens
from quantize.unfold import Factors, factors
from quantize.walk import Step, forward, hidden, put


@dataclass(frozen=True)
class LayerFidelity:
    """One linear layer; the module's text has the formulas. Where it is not quantized bits are 16 and group_size None;
    group_size -1 is one group a row. A figure is infinite where there is no error at all."""

    block: int
    layer: str
    scheme: str
    bits: int
    group_size: int | None
    activation_bits: int
    weights: int
    weight_sqnr_db: float
    own_error_db: float
    output_error_db: float


def quantize_inputs(module: nn.Module, bits: int) -> Any:
    """Let `module` see its inputs rounded per token to `bits`; `remove()` of what is returned ends it."""
    return module.register_forward_pre_hook(lambda _, inputs: (fake_quantize_tokens(inputs[0], bits), *inputs[1:]))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass
class _Sums:
    """Squared lengths over the tokens so far: of what a layer should put out, and of what is wrong with it."""

    own_signal: float = 0.0
    own_noise: float = 0.0
    signal: float = 0.0
    noise: float = 0.0


@torch.no_grad()
def compare_blocks(
    before: Step, after: Step, scheme_of: Callable[[str], Scheme | None], activation_bits: int | None = None
) -> tuple[list[LayerFidelity], float]:
    """The linear layers of a block, and the SQNR of its outputs in dB; moves both walks' hidden states through it.

    before, after: the same block of the original and of the checkpoint; scheme_of: by a module's full name;
    activation_bits: in place of those of the schemes.
    """
    assert before.flow is not None
    schemes = {name: scheme_of(f"{after.prefix}{name}") for name in before.family.linears}
    bits = {name: (activation_bits or s.activation_bits) if s else None for name, s in schemes.items()}
    folds = factors(before, after)
    sums = {name: _Sums() for name in schemes}
    signal = noise = 0.0
    for batch, mask in enumerate(before.flow.real):
        real = mask.to(before.device)
        with _keeping(before.block, list(schemes), real) as outputs:
            h = _through(before, batch)
        with _measuring(before.block, after.block, outputs, folds, bits, real, sums):
            h_q = _through(after, batch)
        signal += _squares(h[real])
        noise += _squares((h - h_q)[real])
    found = []
    for name, scheme in schemes.items():
        ideal, each = folds[name].fold(linear(before.block, name).weight), sums[name]
        error = _squares(ideal - linear(after.block, name).weight)
        if not error and bits[name] is None:
            each.own_noise = 0.0  # what there was is float32's own rounding
        found.append(
            LayerFidelity(
                block=before.index,
                layer=name,
                scheme=_described(scheme, bits[name]),
                bits=scheme.bits if scheme else 16,
                group_size=scheme.group_size if scheme else None,
                activation_bits=bits[name] or 16,
                weights=ideal.numel(),
                weight_sqnr_db=decibels(_squares(ideal), error),
                own_error_db=-decibels(each.own_signal, each.own_noise),
                output_error_db=-decibels(each.signal, each.noise),
            )
        )
    return found, decibels(signal, noise)


def _described(scheme: Scheme | None, activation_bits: int | None) -> str:
    if scheme is None:
        return "16 bit"
    return str(Scheme(scheme.bits, scheme.group_size, scheme.symmetric, activation_bits))


def _through(step: Step, batch: int) -> Tensor:
    """Move one batch through the block; its outputs."""
    outputs = forward(step, hidden(step, batch), batch)
    put(step, batch, outputs)
    return outputs


@contextmanager
def _keeping(block: nn.Module, names: list[str], real: Tensor) -> Iterator[dict[str, Tensor]]:
    """What each linear layer puts out while the body runs, at the real places and without bias: [tokens, out]."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            module = linear(block, name)

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name, module: nn.Linear = module) -> None:
                outputs[name] = _plain(module, output, real)

            hooks.callback(module.register_forward_hook(keep).remove)
        yield outputs


@contextmanager
def _measuring(
    original: nn.Module,
    quantized: nn.Module,
    outputs: dict[str, Tensor],
    folds: Mapping[str, Factors],
    bits: Mapping[str, int | None],
    real: Tensor,
    sums: Mapping[str, _Sums],
) -> Iterator[None]:
    """Add to `sums` as each linear layer of `quantized` runs, and forget its part of `outputs`, the original's."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, each in sums.items():

            def keep(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = given[0][real]

            def measure(_: nn.Module, __: Any, output: Tensor, name: str = name, each: _Sums = each) -> None:
                got, fold, wanted = _plain(linear(quantized, name), output, real), folds[name], outputs.pop(name)
                ideal = inputs.pop(name) @ fold.fold(linear(original, name).weight).T
                each.own_signal += _squares(ideal)
                each.own_noise += _squares(got - ideal)
                each.signal += _squares(wanted)
                each.noise += _squares(got * fold.rows - wanted)

            module = linear(quantized, name)
            hooks.callback(module.register_forward_pre_hook(keep).remove)
            if (width := bits[name]) is not None:
                hooks.callback(quantize_inputs(module, width).remove)
            hooks.callback(module.register_forward_hook(measure).remove)
        yield


def _plain(module: nn.Linear, output: Tensor, real: Tensor) -> Tensor:
    """The outputs [sequences, length, out] of a linear layer without its bias, at the real places: [tokens, out]."""
    bias = module.bias
    return output[real] if bias is None else output[real] - bias


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
