"""Round to nearest: each weight to the closest point of its group's grid. No data, and the baseline for all others."""

from torch import nn

from quantize.blocks import LINEARS, linear
from quantize.scheme import Quantized, Scheme, quantize


def quantize_block(block: nn.Module, scheme: Scheme) -> dict[str, Quantized]:
    """Each linear layer of `block` on the grid of `scheme`, by name. The block itself is left as it is."""
    return {name: quantize(linear(block, name).weight, scheme) for name in LINEARS}
