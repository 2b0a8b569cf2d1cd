"""Where the time of a decode step goes, and what another precision changes: hand-worked, beside pandas and scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.analysis.compare import Estimate
from harness.analysis.timeline import (
    gap,
    kind_changes,
    kind_times,
    linear_ratio,
    name_changes,
    notable,
    prefill_ratio,
    profile,
    step_ratio,
)
from harness.records import KernelRow


def made(
    steps: Sequence[Mapping[tuple[str, str], float]], gaps: Sequence[float], precision: str = "bf16"
) -> list[KernelRow]:
    """Rows of steps, the first being the prefill: (kind, name) -> µs of one launch; `gaps` µs in which nothing runs."""
    found, begin = [], 0.0
    for index, (busy, idle) in enumerate(zip(steps, gaps, strict=True)):
        step_us = sum(busy.values()) + idle
        for (kind, name), us in [*busy.items(), (("host gap", ""), idle)]:
            phase = "decode" if index else "prefill"
            launches = 0 if kind == "host gap" else 1
            found.append(KernelRow(precision, index, phase, begin, step_us, kind, name, launches, us))
        begin += step_us
    return found


MM, NORM = ("gemm", "mm"), ("elementwise", "norm")


def test_medians_and_quartiles_of_the_steps_without_the_last_by_hand() -> None:
    """Four decode steps of 1, 2, 3 and 99 ms of GEMM with 1 ms of gap; the last (99) is left out, since nothing tells
    when the next began. Kept: 1, 2, 3: median 2, quartiles 1.5 and 2.5. Steps take 2, 3, 4 ms, median 3: share 2/3.
    The prefill took 10 ms, 9 of them GEMM."""
    rows = made([{MM: 9000}, {MM: 1000}, {MM: 2000}, {MM: 3000}, {MM: 99000}], [1000] * 5)
    one = profile(rows)
    assert one.step_ms == 3
    assert one.decode_steps == 4
    assert (one.prefill_ms, dict(one.prefill_kinds)) == (10, {"gemm": 9, "host gap": 1})
    gemm, idle = kind_times(one)
    assert (gemm.kind, gemm.ms, gemm.q25, gemm.q75) == ("gemm", 2, 1.5, 2.5)
    assert gemm.share == pytest.approx(2 / 3)
    assert (idle.kind, idle.ms, idle.share) == ("host gap", 1, pytest.approx(1 / 3))
    assert list(one.launches) == [1, 1, 1]


def test_a_lone_decode_step_is_kept_and_a_prefill_alone_has_no_step() -> None:
    assert profile(made([{MM: 1000}, {MM: 500}], [0, 0])).step_ms == 0.5
    alone = profile(made([{MM: 1000}], [0]))
    assert alone.step_ms is None
    assert kind_times(alone) == []
    assert gap(alone) is None
    assert step_ratio(alone, alone) == Estimate()


def test_rows_of_two_precisions_are_no_profile() -> None:
    rows = made([{MM: 1}], [0])
    with pytest.raises(ValueError, match="one precision"):
        profile([*rows, *made([{MM: 1}], [0], "awq")])
    with pytest.raises(ValueError, match="one precision"):
        profile([])


def test_what_did_not_run_in_a_step_counts_as_nothing_there() -> None:
    """A kernel in one step of three has the series 6, 0, 0 and the median 0: medians over all steps, not over those in
    which it ran."""
    one = profile(made([{MM: 1}, {MM: 1, NORM: 6000}, {MM: 1}, {MM: 1}, {MM: 1}], [0] * 5))
    assert list(one.kinds["elementwise"]) == [6, 0, 0]
    assert {line.kind: line.ms for line in kind_times(one)}["elementwise"] == 0


@pytest.mark.parametrize(
    ("busy", "idle", "verdict"),
    [(400, 600, "yes"), (900, 100, "no"), (700, 300, "in part"), (801, 199, "no"), (499, 501, "yes")],
)
def test_launch_bound_by_the_share_of_the_step_in_which_nothing_runs(busy: float, idle: float, verdict: str) -> None:
    """Limits: a half and a fifth. 30 equal steps have an interval of no width."""
    found = gap(profile(made([{MM: busy}] * 31, [idle] * 31)))
    assert found is not None
    assert found.verdict == verdict
    assert found.share.value == pytest.approx(idle / 1000)
    assert found.share.lo == found.share.hi == pytest.approx(idle / 1000)


@pytest.mark.parametrize(("one", "two"), [(0.1, 0.3), (0.4, 0.6), (0.1, 0.9)])
def test_an_interval_that_holds_a_limit_is_undecided(one: float, two: float) -> None:
    """Gaps of 10 % and 30 % in turn: the median of a resample is either, so the interval holds the limit at 20 %. So
    with 40 % and 60 % and the limit at a half, and with both limits."""
    idle = [1000 * (one if at % 2 else two) for at in range(42)]
    found = gap(profile(made([{MM: 1000 - us} for us in idle], idle)))
    assert found is not None
    assert found.verdict == "undecided"
    assert (found.share.lo, found.share.hi) == (pytest.approx(one), pytest.approx(two))


def test_few_steps_have_no_interval_and_the_share_itself_decides() -> None:
    found = gap(profile(made([{MM: 300}] * 5, [700] * 5)))
    assert found is not None
    assert (found.share.lo, found.share.hi, found.verdict) == (None, None, "yes")


def _noisy(seed: int, level: float, steps: int = 401, name: tuple[str, str] = MM) -> list[KernelRow]:
    chance = np.random.default_rng(seed)
    precision = "bf16" if seed == 1 else "awq"
    return made(
        [{name: level * 1000 * (1 + 0.05 * chance.standard_normal()), NORM: 100} for _ in range(steps + 1)],
        [50.0] * (steps + 1),
        precision,
    )


def test_differences_and_ratios_agree_with_scipys_bootstrap() -> None:
    """400 independent steps of about 4 and 1 ms, paired. Blocks of 7 of independent values resample as single ones do,
    so the ends are those of scipy's paired percentile bootstrap, up to the noise of 1,000 draws (a tenth of the
    width)."""
    base, other = profile(_noisy(1, 4)), profile(_noisy(2, 1))
    one, two = base.kinds["gemm"], other.kinds["gemm"]

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(b, axis=axis) - np.median(a, axis=axis)

    theirs = stats.bootstrap(
        (one, two), difference, paired=True, method="percentile", n_resamples=4000, vectorized=True, rng=0
    ).confidence_interval
    ours = next(change for change in kind_changes(base, other) if change.kind == "gemm")
    width = theirs.high - theirs.low
    assert ours.difference.value == pytest.approx(np.median(two) - np.median(one))
    assert ours.difference.lo == pytest.approx(theirs.low, abs=0.25 * width)
    assert ours.difference.hi == pytest.approx(theirs.high, abs=0.25 * width)
    assert ours.direction == "shrank"
    back = next(change for change in kind_changes(other, base) if change.kind == "gemm")
    assert back.direction == "grew"
    assert back.difference.value == pytest.approx(3, abs=0.05)

    ratio = step_ratio(base, other)
    expected = np.median(base.steps_ms) / np.median(other.steps_ms)
    assert ratio.value == pytest.approx(expected)
    assert expected > 3
    assert ratio.lo is not None
    assert ratio.hi is not None
    assert ratio.lo < expected < ratio.hi


def test_vanished_and_new_are_facts_and_equal_steps_are_undecided() -> None:
    base, other = profile(_noisy(1, 4, 40)), profile(_noisy(2, 1, 40, ("fused", "marlin")))
    found = {change.kind: change for change in kind_changes(base, other)}
    assert found["gemm"].direction == "vanished"
    assert found["gemm"].other_ms == 0
    assert found["fused"].direction == "new"
    assert found["elementwise"].direction == "undecided"
    assert [change.kind for change in kind_changes(base, other)][:2] == ["gemm", "fused"]
    assert {(change.kind, change.name) for change in name_changes(base, other)} == {MM, ("fused", "marlin"), NORM}
    assert linear_ratio(base, other).value == pytest.approx(
        np.median(base.kinds["gemm"]) / np.median(other.kinds["fused"])
    )


def test_notable_are_sure_changes_of_two_percent_of_a_step() -> None:
    """A step of 10 ms: 0.3 ms less of norms is 3 %, and notable; 0.1 ms less of a copy is 1 %, and is not."""
    copy = ("copy", "memcpy")
    base = profile(made([{MM: 9200, NORM: 500, copy: 300}] * 32, [0] * 32))
    other = profile(made([{MM: 9200, NORM: 200, copy: 200}] * 32, [0] * 32, "awq"))
    assert [change.kind for change in notable(base, other)] == ["elementwise"]


def test_steps_are_paired_by_number_as_far_as_both_go() -> None:
    """Steps grow alike in both, by 1 ms a step: each pair differs by 1 ms exactly, so the interval has no width. The
    longer generation's surplus counts for nothing."""
    grown = [{MM: 1000.0 * (at + 1)} for at in range(60)]
    less = [{MM: 1000.0 * at + 1} for at in range(30)]
    base, other = profile(made(grown, [0] * 60)), profile(made(less, [0] * 30, "awq"))
    change = kind_changes(base, other)[0]
    assert change.difference.value == pytest.approx(-0.999)
    assert (change.difference.lo, change.difference.hi) == (pytest.approx(-0.999), pytest.approx(-0.999))


def test_prefills_have_a_ratio_and_no_interval() -> None:
    """30 ms against 20 ms: 1.5 times as fast."""
    base, other = profile(made([{MM: 30000}], [0])), profile(made([{MM: 19000}], [1000], "awq"))
    assert prefill_ratio(base, other) == pytest.approx(1.5)


def test_medians_by_kind_and_name_agree_with_pandas() -> None:
    """The same table, grouped by pandas: busy time a step summed by kind, steps without a kind as 0, the last step
    dropped, medians."""
    chance = np.random.default_rng(3)
    names = [("gemm", "a"), ("gemm", "b"), ("attention", "flash"), ("elementwise", "norm")]
    steps = [{name: float(chance.uniform(1, 900)) for name in names if chance.random() < 0.9} for _ in range(30)]
    rows = made(steps, list(chance.uniform(10, 90, 30)))
    one = profile(rows)
    frame = pd.DataFrame([{"step": r.step, "phase": r.phase, "kind": r.kind, "name": r.name, "us": r.busy_us,
                           "step_us": r.step_us} for r in rows])  # fmt: skip
    decode = frame[(frame.phase == "decode") & (frame.step != frame.step.max())]
    by_kind = decode.pivot_table(index="step", columns="kind", values="us", aggfunc="sum", fill_value=0) / 1e3
    assert {line.kind: line.ms for line in kind_times(one)} == pytest.approx(by_kind.median().to_dict())
    by_name = decode.pivot_table(index="step", columns=["kind", "name"], values="us", aggfunc="sum", fill_value=0) / 1e3
    for key, series in one.names.items():
        assert list(series) == pytest.approx(list(by_name[key]))
    assert one.step_ms == pytest.approx(decode.groupby("step").step_us.first().median() / 1e3)


def test_the_unclassified_share_is_of_busy_time_prefill_included() -> None:
    """Prefill: 6 ms known, 2 unknown. One decode step: 1 known, 1 unknown, 5 of gap. Unknown 3 of 10 busy ms."""
    other = ("other", "mystery")
    one = profile(made([{MM: 6000, other: 2000}, {MM: 1000, other: 1000}], [0, 5000]))
    assert one.unclassified == pytest.approx(0.3)
    assert profile(made([{}], [5])).unclassified is None
