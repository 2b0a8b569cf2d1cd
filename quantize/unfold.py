"""Which factors were folded into a checkpoint's weights, so that they can be compared with the original's.

AWQ and SmoothQuant fold scales (see `blocks`): the layer that a checkpoint rounds is not W but

    W' = diag(1/r) W diag(s)        s [in]: of its own site; r [out]: of the site that its output feeds

and the checkpoint holds Q(W') alone. The error of rounding is Q(W') - W', so s and r have to be found again:

- Before a site stands a norm: s = norm / norm', the quotient of the two weights (plus the family's offset), exactly.
- Before it stands a linear layer (v before o, up before down), itself rounded. The factor is fitted in two
  ways, and the one is taken with which the layer after puts out less that is not the original's, for the same inputs:

  weights    a_j = <W_.j, Q_.j> / <W_.j, W_.j> about s_j, b_j = <U_j., P_j.> / <U_j., U_j.> about 1 / s_j, with W, Q the
             layer after in both models, and U, P the rows of the one before; ln s_j is the mean of ln a_j and -ln b_j,
             each weighed by the inverse of its variance. Best where each weight was rounded on its own.
  outputs    s_j = <y_j, y_j> / <y_j, yhat_j> over the tokens of one batch, y_j and yhat_j the outputs of U and P for
             the same inputs. GPTQ moves errors from column to column: at 2 bits its weights no longer resemble the
             original's, and its outputs do.

  Where the better one explains less than a tenth of the difference, rounding explains it as well, and s = 1.

Seen on a trained model of 2.7 M parameters, against the weight SQNRs that quantize.json has from the folded weights
themselves: within 0.2 dB, for AWQ at 4 bits as for AWQ with GPTQ at 2, and equal for all methods without such a fold.
What is left of the factor's error lands in the layer after: with AWQ and GPTQ at 2 bits down_proj's own error comes
out 1 to 3 dB too large. Nothing here asks which tool made the checkpoint.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Site, linear
from quantize.walk import Step, forward, hidden

_EXPLAINED = 0.1

_Seen = Mapping[str, tuple[Tensor, Tensor]]
"""Inputs and outputs (without bias) of linear layers by name, [tokens, in] and [tokens, out]."""


@dataclass(frozen=True)
class Factors:
    """Of one linear layer. columns: s, float32 [in]; rows: r, float32 [out]."""

    columns: Tensor
    rows: Tensor

    def fold(self, weight: Tensor) -> Tensor:
        """W' of W [out, in]."""
        return weight * self.columns / self.rows[:, None]


@torch.no_grad()
def factors(before: Step, after: Step) -> Mapping[str, Factors]:
    """The factors of each linear layer, by name, between a block of the original and the same one of a checkpoint."""
    family, found = before.family, dict[str, Factors]()
    fed = [site for site in family.sites if site.before is not None and _is_linear(before.block, site.before)]
    seen = _probe(after, [name for site in fed for name in (str(site.before), site.linears[0])])
    for site in family.sites:
        first = linear(before.block, site.linears[0])
        if site.before is None:
            columns = first.weight.new_ones(first.in_features)
        elif site in fed:
            known = found[site.before]  # sites come in the order of computing, so it is there
            columns, rows = _between(before, after, site, known.columns, seen)
            known.rows[-len(rows) :] = rows
        else:
            norms = before.block.get_submodule(site.before), after.block.get_submodule(site.before)
            columns = _of_norm(*norms, family.offset)
        for each in site.linears:
            found[each] = Factors(columns, columns.new_ones(linear(before.block, each).out_features))
    return found


def _is_linear(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name), nn.Linear)


def _of_norm(original: nn.Module, quantized: nn.Module, offset: float) -> Tensor:
    before, after = (norm.get_parameter("weight").float() + offset for norm in (original, quantized))
    return torch.where((before == 0) | (after == 0), torch.ones_like(before), before / after)


def _probe(step: Step, names: list[str]) -> _Seen:
    """What the layers called `names` see and say in the first batch, whose places are the most."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    assert step.flow is not None
    real = step.flow.real[0].to(step.device)
    with ExitStack() as hooks:
        for name in names:
            module = linear(step.block, name)

            def note(_: nn.Module, x: Any, y: Tensor, name: str = name, module: nn.Linear = module) -> None:
                seen[name] = x[0][real], (y if module.bias is None else y - module.bias)[real]

            hooks.callback(module.register_forward_hook(note).remove)
        forward(step, hidden(step, 0), 0)
    return seen


def _between(before: Step, after: Step, site: Site, known: Tensor, seen: _Seen) -> tuple[Tensor, Tensor]:
    """s over the inputs of `site`, and r over the last rows of the layer before it; `known` are that one's columns."""
    heads, previous = before.heads, str(site.before)
    w, q = (linear(step.block, site.linears[0]).weight for step in (before, after))
    share = heads.query // heads.key_value if site.rows == "v" else 1
    count = w.shape[1] // share
    u, p = (linear(step.block, previous).weight[-count:] for step in (before, after))
    u = u * known

    def spread(values: Tensor) -> Tensor:  # grouped-query attention: several columns read one row of v
        if share == 1:
            return values
        return values.view(heads.key_value, 1, heads.size).expand(-1, share, -1).reshape(-1)

    def gather(values: Tensor) -> Tensor:
        return values if share == 1 else values.view(heads.key_value, share, heads.size).sum(dim=1).reshape(-1)

    a, a_weight = _slope([gather(each.sum(dim=0)) for each in (w * q, w * w, q * q)], len(w) * share)
    b, b_weight = _slope([each.sum(dim=1) for each in (u * p, u * u, p * p)], u.shape[1])
    x, got = seen[previous]
    y = x @ u.T
    inner, output = seen[site.linears[0]]
    none = torch.ones_like(b)
    fits = (
        torch.exp((a_weight * a.log() - b_weight * b.log()) / (a_weight + b_weight)),
        y.square().sum(dim=0) / (y * got[:, -count:]).sum(dim=0),
    )

    def unexplained(s: Tensor) -> float:
        return float((output - inner @ (w * spread(s)).T).square().sum(dtype=torch.float64))

    best = min((torch.where(torch.isfinite(s) & (s > 0), s, none) for s in fits), key=unexplained)
    if not unexplained(best) < (1 - _EXPLAINED) * unexplained(none):
        best = none
    return spread(best), best


def _slope(sums: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Least-squares slopes through the origin, and the inverse of ln slope's variance; sums of `count` xy, xx, yy."""
    xy, xx, yy = sums
    slope = xy / xx
    residual = (yy - slope * xy).clamp(min=1e-12 * yy)  # float32's own rounding, so that no weight is infinite
    weight = slope * xy * (count - 1) / residual
    lost = ~(slope > 0) | ~torch.isfinite(weight)  # a column that was rounded to zeros says nothing
    return torch.where(lost, torch.ones_like(slope), slope), torch.where(lost, torch.zeros_like(weight), weight)
