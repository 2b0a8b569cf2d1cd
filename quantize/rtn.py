"""Round to nearest: each weight to the closest point of its group's grid. No data, and the baseline for all others.

    what = (clamp(round(w / s) + z) - z) s

With `--search mse` the group's range is narrowed by the factor of least squared error (`scheme.search`).
"""

from torch import Tensor

from quantize.scheme import Grid, Quantized, Scheme, grid, quantize, search


def nearest(weight: Tensor, scheme: Scheme, how: str) -> Quantized:
    """`weight` [out, in] rounded to the grid of its range, or (`mse`) of its least squared error."""
    return quantize(weight, scheme) if how == "minmax" else search(weight, scheme)[0]


def find_grid(weight: Tensor, scheme: Scheme, how: str, gram: Tensor) -> Grid:
    """The grid of `weight` [out, in], whose inputs have the Gram matrix `gram`.

    `minmax`: of each group's least and greatest; `mse`: of the weights' least squared error; `output`: of the outputs'.
    """
    if how == "minmax":
        return grid(weight, scheme)
    _, scales, zeros = search(weight, scheme, gram if how == "output" else None)[0]
    return Grid(scales, zeros)
