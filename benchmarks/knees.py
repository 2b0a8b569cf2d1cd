"""How well knees are found: intervals against exact truths, and the views of saturation; the tables of docs/knees.md.

python benchmarks/knees.py [TRIALS]          about half an hour on one core with 1,000 trials
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import knee_trials
import networks
import numpy as np
from kneed import KneeLocator

from harness.analysis import metrics, percentiles
from harness.analysis.usl import find_saturation
from harness.records import Knee, Saturation, SweepPoint

CLOSE = (12, 13, 15, 16, 18, 20, 22, 24, 27, 30, 33, 36)
CONDITIONS: dict[str, knee_trials.Disturb | None] = {
    "as simulated": None,
    "sessions differ by 5 %": knee_trials.session_noise(0.05),
    "by 10 %": knee_trials.session_noise(0.10),
    "by 20 %": knee_trials.session_noise(0.20),
    "two levels missing": knee_trials.missing(2),
    "three levels": knee_trials.missing(4),
    "one 2–4 × slower": knee_trials.outlier(2, 4),
    "one 2–4 × faster": knee_trials.outlier(1 / 4, 1 / 2),
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def coverage(studies: dict[str, knee_trials.Study]) -> None:
    """Share of the trials whose interval holds the true crossing."""
    rows = [
        [
            family,
            *(
                percent(knee_trials.covered(knee_trials.knees(study, change), study.truth))
                for change in CONDITIONS.values()
            ),
        ]
        for family, study in studies.items()
    ]
    table(["% covered", *CONDITIONS], rows)


def estimates(studies: dict[str, knee_trials.Study]) -> None:
    """The interpolated crossing beside the truth, and the interval that takes the interpolation for granted."""
    rows = []
    for family, study in studies.items():
        found = knee_trials.knees(study)
        off = [math.log(knee.cross / true) for knee, true in zip(found, study.truth, strict=True) if knee.cross]
        noise = [
            (knee.boot_lo or 0.0) <= true <= (knee.boot_hi or math.inf)
            for knee, true in zip(found, study.truth, strict=True)
        ]
        widths = [math.log(knee.cross_hi / knee.cross_lo) for knee in found if knee.cross_lo and knee.cross_hi]
        narrow = [math.log(knee.boot_hi / knee.boot_lo) for knee in found if knee.boot_lo and knee.boot_hi]
        figures = (np.median(off), np.median(np.abs(off)), np.quantile(np.abs(off), 0.9))
        rows.append(
            [
                family,
                *(f"{100 * math.expm1(figure):+.0f} %" for figure in figures[:1]),
                *(f"{100 * math.expm1(figure):.0f} %" for figure in figures[1:]),
                f"{math.exp(np.median(widths)):.1f} ×",
                percent(knee_trials.covered(found, study.truth)),
                f"{math.exp(np.median(narrow)):.1f} ×",
                percent(float(np.mean(noise))),
            ]
        )
    header = ["", "median error", "median size", "90 % within", "bracket", "% covered", "by noise alone", "% covered"]
    table(header, rows)


def searches(trials: int) -> None:
    """`bench sweep --until`, which chooses its loads by what it has seen: share covered, and the bracket's width."""
    rows = []
    for family in (*knee_trials.FAMILIES, *knee_trials.LONG):
        study, cells = knee_trials.draw(family, trials, 12, grid=tuple(range(1, networks.LARGEST + 1))), []
        for precision in (0.1, 0.2):
            for noise in (None, knee_trials.session_noise(0.05)):
                found = knee_trials.searched(study, precision, noise)
                widths = [knee.cross_hi / knee.cross_lo for knee in found if knee.cross_lo and knee.cross_hi]
                cells.append(f"{percent(knee_trials.covered(found, study.truth))} ({np.median(widths):.1f} ×)")
        rows.append([family, *cells])
    table(["% covered (bracket)", "precision 10 %", "sessions 5 % apart", "precision 20 %", "sessions 5 % apart"], rows)


def none_there(trials: int) -> None:
    """Curves without a knee: how many show none."""
    rows = []
    for shape in ("flat", "rising"):
        study = knee_trials.draw_below(shape, trials, 4)
        cells = []
        for change in CONDITIONS.values():
            found = knee_trials.knees(study, change)
            bounded = np.mean([knee.cross_hi is None for knee in found])
            cells.append(
                f"{percent(float(bounded))} / {percent(float(np.mean([knee.beyond_range for knee in found])))}"
            )
        rows.append([shape, *cells])
    table(["% open / no knee", *CONDITIONS], rows)


def levels(trials: int) -> None:
    """Intervals of p95 itself: the share that holds the exact p95, by ranks and autocorrelation and by blocks."""
    rng, rows = np.random.default_rng(6), []
    cases: list[tuple[str, networks.Network, int]] = [
        ("batch, 4 users", networks.batch(0.1, 3.0), 4),
        ("batch, 16 users", networks.batch(0.1, 3.0), 16),
        ("batch, 64 users", networks.batch(0.1, 3.0), 64),
        ("8 servers, 16 users", networks.fcfs(8, 1.0), 16),
        ("8 servers, 32 users", networks.fcfs(8, 1.0), 32),
        ("8 servers, 64 users", networks.fcfs(8, 1.0), 64),
        ("1 server, 4 users", networks.fcfs(1, 10.0), 4),
        ("1 server, 16 users", networks.fcfs(1, 10.0), 16),
        ("1 server, 64 users", networks.fcfs(1, 10.0), 64),
    ]
    for name, network, users in cases:
        truth = networks.response_percentile(network, users)
        seen = networks.simulate([network] * trials, users, max(knee_trials.REQUESTS, 3 * users), rng).e2e_s
        ours = [percentiles.interval(row, 95) or (0.0, 0.0) for row in seen]
        blocks = [metrics.block_bootstrap(row, lambda x: np.percentile(x, 95, axis=1)) or (0.0, 0.0) for row in seen]
        times = [percentiles.autocorrelation_time(np.log(row)) for row in seen]
        cells = [f"{np.median(times):.1f}"]
        for found in (ours, blocks):
            cells.append(percent(float(np.mean([low <= truth <= high for low, high in found]))))
            cells.append(f"{100 * np.median([(high - low) / 2 / truth for low, high in found]):.0f} %")
        rows.append([name, *cells])
    table(["", "τ", "% covered", "± ", "% by blocks", "± "], rows)


def views(studies: dict[str, knee_trials.Study], noise: float) -> None:
    """Kneedle, the law and the bound against the saturation point of the network, and the law's peak."""
    rows = []
    for family, study in studies.items():
        found, others = saturations(study, noise)
        truth = [networks.saturation(network) for network in study.networks]
        peaks = {id(network): peak(network) for network in study.networks}
        top = [peaks[id(network)] for network in study.networks]
        rows.append(
            [
                family,
                error([view.kneedle for view in found], truth),
                error(others, truth),
                error([view.usl_saturation for view in found], truth),
                held(found, truth, "usl_saturation"),
                error([view.bound for view in found], truth),
                held(found, truth, "bound"),
                percent(float(np.mean([view.usl_peak is not None for view in found]))),
                error([view.usl_peak for view in found], top),
            ]
        )
    header = ["median (90 %) error", "Kneedle", "Kneedle over ln N", "USL saturation", "% covered"]
    table([*header, "bound", "% covered", "% with a peak", "its error"], rows)


def saturations(study: knee_trials.Study, noise: float) -> tuple[list[Saturation], list[float | None]]:
    """The views of each trial, and what Kneedle says over ln N; sessions differ by `noise`."""
    rng, knee = np.random.default_rng(7), Knee("made", "p95 ≤ 3 s", tested_lo=1.0, tested_hi=64.0, cross_lo=1.0)
    found, others = [], []
    for figures in knee_trials.req_s(study):
        figures = figures * np.exp(rng.normal(0, noise, (len(figures), 1)))
        view = find_saturation(throughputs(study.grid, figures), knee)
        found.append(view)
        other = KneeLocator(np.log(study.grid), figures[:, 0], curve="concave", direction="increasing").knee
        others.append(None if other is None or view.shape != "bends" else float(np.exp(other)))
    return found, others


def agreements(studies: dict[str, knee_trials.Study]) -> None:
    """What is said of the SLO's crossing and saturation together, and how often the order of the two is right."""
    rows = []
    for family, study in studies.items():
        said, right = Counter[str](), 0
        for knee, figures, network, true in zip(
            knee_trials.knees(study), knee_trials.req_s(study), study.networks, study.truth, strict=True
        ):
            verdict = find_saturation(throughputs(study.grid, figures), knee).agreement or "none"
            first = "latency" if true < networks.saturation(network) else "throughput"
            said[verdict] += 1
            right += verdict == first
        ordered = said["latency"] + said["throughput"]
        cells = [percent(said[name] / len(study.truth)) for name in ("agree", "latency", "throughput", "mixed", "none")]
        rows.append([family, *cells, f"{right} of {ordered}"])
    table(["% said", "agree", "latency", "throughput", "mixed", "nothing", "order right"], rows)


def throughputs(grid: Sequence[int], figures: networks.Floats) -> list[SweepPoint]:
    return [
        SweepPoint("made", "bf16", users, verdict="valid", tok_s=value, tok_s_lo=low, tok_s_hi=high)
        for users, (value, low, high) in zip(grid, figures.tolist(), strict=True)
    ]


def peak(network: networks.Network) -> float | None:
    """Users of the most throughput, if that is within the grid and more than what follows."""
    curve = np.array([networks.throughput(network, users) for users in range(1, networks.LARGEST + 1)])
    at = int(curve.argmax())
    return float(at + 1) if curve[-1] < 0.999 * curve[at] else None


def error(found: Sequence[float | None], truth: Sequence[float | None]) -> str:
    """Median error as a share, and what 90 % are within; of the trials that have a figure and a truth."""
    off = [math.log(value / true) for value, true in zip(found, truth, strict=True) if value and true]
    if len(off) < 20:
        return f"({len(off)} trials)"
    return f"{100 * math.expm1(np.median(off)):+.0f} % ({100 * math.expm1(np.quantile(np.abs(off), 0.9)):.0f} %)"


def held(found: Sequence[Saturation], truth: Sequence[float], name: str) -> str:
    inside = [
        (getattr(view, f"{name}_lo") or 0.0) <= true <= (getattr(view, f"{name}_hi") or math.inf)
        for view, true in zip(found, truth, strict=True)
        if getattr(view, name) is not None
    ]
    return percent(float(np.mean(inside))) if inside else ""


def no_saturation(trials: int) -> None:
    """Lines without a knee: how often Kneedle and the law's peak find one."""
    rng, rows = np.random.default_rng(8), []
    knee = Knee("made", "p95 ≤ 3 s", tested_lo=1.0, tested_hi=64.0, cross_lo=1.0)
    lines: dict[str, Callable[[networks.Floats], networks.Floats]] = {
        "flat": lambda users: np.full(len(users), 100.0),
        "straight": lambda users: 5.0 * users,
        "falling slowly": lambda users: 100.0 * users**-0.1,
    }
    for name, line in lines.items():
        for noise in (0.0, 0.05, 0.10):
            kneedles = peaks = bare = 0
            for _ in range(trials):
                users = np.array(knee_trials.GRID, dtype=float)
                value = line(users) * np.exp(rng.normal(0, math.hypot(0.02, noise), len(users)))
                figures = np.stack([value, value * math.exp(-0.04), value * math.exp(0.04)], axis=1)
                view = find_saturation(throughputs(knee_trials.GRID, figures), knee)
                kneedles, peaks = kneedles + (view.kneedle is not None), peaks + (view.usl_peak is not None)
                found = KneeLocator(users, value, curve="concave", direction="increasing").knee
                bare += found is not None
            cells = (kneedles, peaks, bare)
            rows.append([name, f"{noise:.0%}", *(percent(1 - count / trials) for count in cells)])
    table(["", "sessions differ by", "% without a Kneedle knee", "% without a peak", "% by the bare package"], rows)


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"{trials} trials each\n\n## The interval of the crossing\n")
    studies = {family: knee_trials.draw(family, trials, 5) for family in (*knee_trials.FAMILIES, *knee_trials.LONG)}
    coverage(studies)
    print("## Its estimate\n")
    estimates(studies)
    print("## Levels 10 % apart\n")
    close = {
        family: knee_trials.draw(family, trials // 4, 6, grid=CLOSE)
        for family in (*knee_trials.FAMILIES, *knee_trials.LONG)
    }
    coverage(close)
    estimates(close)
    print("## Crossings within 5 % of a tested level\n")
    coverage({family: knee_trials.draw(family, trials, 9, beside=True) for family in knee_trials.FAMILIES})
    print("## After a search\n")
    searches(trials // 4)
    print("## No knee\n")
    none_there(trials)
    print("## Intervals of p95\n")
    levels(trials)
    for noise in (0.0, 0.05):
        print(f"## Saturation, sessions differ by {noise:.0%}\n")
        views({family: study for family, study in studies.items() if family in knee_trials.FAMILIES}, noise)
    print("## Both together\n")
    agreements({family: study for family, study in studies.items() if family in knee_trials.FAMILIES})
    print("## No saturation\n")
    no_saturation(trials)


if __name__ == "__main__":
    main()
