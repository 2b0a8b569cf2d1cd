"""What the rows of `bench recover` say, in words. Everything here is a function of the rows.

A point is one method at one number of bits, over its seeds. Two points differ where their mean KLs are further apart
than two standard deviations of a difference of two runs,

    |m - n| > 2 sqrt(sd_m^2 + sd_n^2)

where methods without a seed have sd = 0. Otherwise no difference is shown, and nothing is claimed. One seed has no
standard deviation; its differences are told as they are, with a line that says so.

    choice      of the points whose KL is within `WITHIN` times the least, the one that takes the least time
    closes      1 - m / n of the KL that another leaves; 0.61 is told as 61 %

KL below `NOISE` is told as that: it is float32's own.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantize.recover_rows import Row
from quantize.training import METHODS as TRAINED

WITHIN = 2.0
NOISE = 1e-7


@dataclass(frozen=True)
class Point:
    """The means over `seeds` runs; kl_sd is their standard deviation, None of one run.

    seconds: what the runs took, and where they found their start in the cache, what making it took another run; tokens:
    seen in calibration and training, None where neither is known; peak_mib: the largest.
    """

    method: str
    bits: int
    seeds: int
    seconds: float
    tokens: float | None
    peak_mib: float
    kl_nats: float
    kl_sd: float | None
    perplexity: float
    agreement: float

    @property
    def name(self) -> str:
        """As texts call it."""
        return self.method.upper()

    @property
    def trained(self) -> bool:
        """Whether it is one of the two that train."""
        return self.method in TRAINED

    @property
    def kl(self) -> float:
        """KL, no less than what is noise: what ratios and logarithms are taken of."""
        return max(self.kl_nats, NOISE)


def points(rows: Iterable[Row]) -> list[Point]:
    """The points of all rows with a KL, in the order in which they come; failed runs are left out."""
    rows = [row for row in rows if row.kl_nats is not None]
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.bits, row.method), []).append(row)
    found = []
    for (bits, method), runs in groups.items():
        starts = [row.start_seconds or 0.0 for row in rows if row.bits == bits]
        kl = [float(row.kl_nats or 0.0) for row in runs]
        found.append(
            Point(
                method=method,
                bits=bits,
                seeds=len(runs),
                seconds=statistics.fmean(_seconds(row, max(starts)) for row in runs),
                tokens=_mean_tokens(runs),
                peak_mib=max(row.peak_mib or 0.0 for row in runs),
                kl_nats=statistics.fmean(kl),
                kl_sd=statistics.stdev(kl) if len(kl) > 1 else None,
                perplexity=statistics.fmean(row.perplexity_quantized or math.nan for row in runs),
                agreement=statistics.fmean(row.top1_agreement or 0.0 for row in runs),
            )
        )
    return found


def _seconds(row: Row, start: float) -> float:
    """Of a run and of its start, though that was made by another."""
    return (row.seconds or 0.0) + (start if row.start_seconds == 0 else 0.0)


def _mean_tokens(runs: Sequence[Row]) -> float | None:
    seen = [(row.calibration_tokens, row.training_tokens) for row in runs]
    if all(calibration is None and training is None for calibration, training in seen):
        return None
    return statistics.fmean((calibration or 0) + (training or 0) for calibration, training in seen)


def by_bits(found: Iterable[Point]) -> dict[int, list[Point]]:
    """Points by their number of bits, the most bits first, the quickest first in each."""
    groups: dict[int, list[Point]] = {}
    for point in sorted(found, key=lambda point: (-point.bits, point.seconds)):
        groups.setdefault(point.bits, []).append(point)
    return groups


def differ(one: Point, other: Point) -> bool:
    """Whether the rows show that the KLs are not the same."""
    return abs(one.kl - other.kl) > 2 * math.hypot(one.kl_sd or 0.0, other.kl_sd or 0.0)


def best(of: Iterable[Point]) -> Point:
    """The least KL; of equals the quickest."""
    return min(of, key=lambda point: (point.kl, point.seconds))


def choice(of: Sequence[Point]) -> Point:
    """The quickest within `WITHIN` times the least KL; of points with one number of bits."""
    limit = WITHIN * best(of).kl
    return min((point for point in of if point.kl <= limit), key=lambda point: (point.seconds, point.kl))


# --- sentences --------------------------------------------------------------------------------------------------------


def words(rows: Sequence[Row]) -> list[str]:
    """A paragraph for each number of bits (what to take, what calibration brings, what training brings), and what is
    to be known of all."""
    found = points(rows)
    said = [" ".join(_paragraph(bits, group)) for bits, group in by_bits(found).items()]
    if any(point.trained and point.seeds == 1 for point in found):
        said.append("Trained methods ran with one seed: how far another seed would land is not known.")
    waited = [row.name for row in rows if row.cpu_seconds is not None and row.cpu_seconds < (row.seconds or 0.0) / 2]
    if waited:
        said.append(
            f"For more than half of their seconds {_listed(waited)} did not compute, but waited for something (a busy "
            "machine, a disk, a GPU): of that their seconds tell more than of the method."
        )
    return said


def _paragraph(bits: int, group: Sequence[Point]) -> list[str]:
    said = [_choice(bits, group)]
    ptq = [point for point in group if not point.trained]
    trained = [point for point in group if point.trained]
    nearest = [point for point in ptq if point.method == "rtn"]
    calibrated = [point for point in ptq if point.method != "rtn"]
    if nearest and calibrated:
        said.append(beside(best(calibrated), nearest[0]))
    if ptq:
        said += [beside(point, best(ptq)) for point in trained]
    if len(trained) == 2:
        said.append(_between(*trained))
    return said


def _choice(bits: int, group: Sequence[Point]) -> str:
    chosen, least = choice(group), best(group)
    if len(group) == 1:
        return f"At {bits} bits only {chosen.name} was run ({_facts(chosen)})."
    alike = [point.name for point in group if point is not least and not differ(point, least)]
    tail = f"; that {least.name} is better than {_listed(alike, 'or')} is not shown" if alike else ""
    if chosen is least:
        rest = f"has the least KL, and nothing quicker is within {WITHIN:g}x of it"
    else:
        rest = f"is the quickest within {WITHIN:g}x of the best, {least.name} ({_facts(least)})"
    return f"At {bits} bits {chosen.name} ({_facts(chosen)}) {rest}{tail}."


def beside(point: Point, reference: Point) -> str:
    """What `point` brings beside `reference`, both at one number of bits, and what it costs."""
    if not differ(point, reference):
        return f"No difference is shown between {point.name} and {reference.name} ({_both(point, reference)})."
    cost = f"for {_times(point.seconds / reference.seconds)} the time ({_time(point.seconds)})"
    if point.kl > reference.kl:
        verdict = "Training made it worse: " if point.trained else ""
        return (
            f"{verdict}{point.name} leaves {_times(point.kl / reference.kl)} the KL of {reference.name} "
            f"({_both(point, reference)}), {cost}."
        )
    return (
        f"{point.name} closes {_percent(1 - point.kl / reference.kl)} of the KL that {reference.name} leaves "
        f"({_both(reference, point, ' to ')}), {cost}."
    )


def _between(one: Point, other: Point) -> str:
    """The two trained methods beside one another."""
    lower, upper = sorted((one, other), key=lambda point: point.kl)
    if not differ(lower, upper):
        return f"No difference is shown between {lower.name} and {upper.name}."
    return (
        f"{lower.name} leaves {_times(lower.kl / upper.kl)} the KL of {upper.name} "
        f"in {_times(lower.seconds / upper.seconds)} its time."
    )


def verdicts(found: Sequence[Point]) -> list[str]:
    """When each method is worth it: where it is chosen, where it is only the best, where another beats it outright."""
    groups = by_bits(found)
    lines = []
    for method in dict.fromkeys(point.method for point in found):
        said: dict[str, list[int]] = {}
        for bits, group in groups.items():
            for point in group:
                if point.method == method:
                    said.setdefault(_standing(point, group), []).append(bits)
        told = "; ".join(f"at {_listed(bits)} bits {standing}" for standing, bits in said.items())
        lines.append(f"**{method.upper()}**: {told}.")
    return lines


def _standing(point: Point, group: Sequence[Point]) -> str:
    chosen = choice(group)
    if len(group) == 1:
        return "nothing was run beside it"
    if point is chosen:
        rule = f"the choice, the quickest within {WITHIN:g}x of the best"
        if not (quicker := [other for other in group if other.seconds < point.seconds]):
            return rule
        other = best(quicker)
        return (
            f"{rule} ({other.name} leaves {_times(other.kl / point.kl)} its KL in "
            f"{_times(other.seconds / point.seconds)} its time)"
        )
    beaten = [
        other for other in group if other.seconds <= point.seconds and other.kl < point.kl and differ(other, point)
    ]
    if beaten:
        return f"not worth it: {best(beaten).name} is quicker and better"
    if not differ(point, chosen):
        return f"not told apart from {chosen.name}, which takes {_times(chosen.seconds / point.seconds)} its time"
    if point.seconds < chosen.seconds:
        return f"quicker than {chosen.name}, with {_times(point.kl / chosen.kl)} its KL"
    less = _percent(1 - point.kl / chosen.kl)
    return (
        f"worth it where {less} less KL than {chosen.name}'s is worth {_times(point.seconds / chosen.seconds)} its time"
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _facts(point: Point) -> str:
    return f"{_time(point.seconds)}, KL {shown_kl(point)}"


def _both(one: Point, other: Point, joint: str = " and ") -> str:
    return f"KL {shown_kl(one)}{joint}{shown_kl(other)}"


def shown_kl(point: Point) -> str:
    """As texts and tables have it."""
    if point.kl_nats < NOISE:
        return f"below {NOISE:g}"
    return f"{point.kl_nats:.3g}" + ("" if point.kl_sd is None else f" ± {point.kl_sd:.2g}")


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _times(ratio: float) -> str:
    """To two digits: 27.6 is 28x, 0.0432 is 0.043x."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _percent(share: float) -> str:
    """Whole ones; what rounds to all or nothing is not told as that."""
    if 0 < share < 0.01:
        return "less than 1 %"
    if 0.99 < share < 1:
        return "more than 99 %"
    return f"{share:.0%}".replace("%", " %")


def _listed(items: Iterable[object], joint: str = "and") -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} {joint} {last}" if first else last
