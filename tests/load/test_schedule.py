"""Arrival times: the distributions are those of scipy, the trace's are worked out by hand, bad traces are named."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from scipy import stats

from harness.errors import InputError
from harness.load.schedule import Arrival, arrivals, mean_rate, read_trace
from harness.records import Arrivals, Cell, Scenario

N = 5000


def gaps(kind: Arrivals, rate: float, seed: int, burstiness: float = 1.0) -> list[float]:
    scenario = Scenario("test", arrivals=kind, seed=seed, burstiness=burstiness)
    times = [0.0, *(item.offset_s for item in islice(arrivals(scenario, Cell("bf16", 0, rate_rps=rate)), N))]
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize(("rate", "seed"), [(0.5, 1), (20.0, 2), (300.0, 3)])
def test_poisson_gaps_are_exponential(rate: float, seed: int) -> None:
    found = gaps("poisson", rate, seed)
    assert stats.kstest(found, stats.expon(scale=1 / rate).cdf).pvalue > 0.01
    assert stats.kstest(found, stats.expon(scale=1.1 / rate).cdf).pvalue < 0.001, "the test sees a rate 10 % off"
    assert stats.kstest(found, stats.gamma(0.8, scale=1 / (0.8 * rate)).cdf).pvalue < 0.001


@pytest.mark.parametrize(("shape", "rate", "seed"), [(0.25, 5.0, 1), (0.5, 0.7, 2), (4.0, 40.0, 3)])
def test_gamma_gaps_have_the_shape_and_the_mean_of_vllms_burstiness(shape: float, rate: float, seed: int) -> None:
    """vllm bench serve: theta = 1 / (request_rate * burstiness), gaps = numpy gamma(shape=burstiness, scale=theta)."""
    found = gaps("gamma", rate, seed, shape)
    assert stats.kstest(found, stats.gamma(shape, scale=1 / (rate * shape)).cdf).pvalue > 0.01
    assert stats.kstest(found, stats.expon(scale=1 / rate).cdf).pvalue < 0.001
    # The mean of N gaps has the standard deviation 1 / (rate * sqrt(shape * N)).
    assert sum(found) / N == pytest.approx(1 / rate, abs=4 / (rate * (shape * N) ** 0.5))


def test_constant_arrivals_are_exact_and_do_not_drift() -> None:
    scenario = Scenario("test", arrivals="constant")
    found = [item.offset_s for item in islice(arrivals(scenario, Cell("bf16", 0, rate_rps=10.0)), 100_001)]
    assert found[:4] == [0.0, 0.1, 0.2, 0.3]
    assert found[100_000] == 10_000.0


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
def test_precisions_and_attempts_get_the_same_times_and_other_cells_others(kind: Arrivals) -> None:
    scenario = Scenario("test", arrivals=kind, burstiness=0.5)

    def times(cell: Cell, scenario: Scenario = scenario) -> list[float]:
        return [item.offset_s for item in islice(arrivals(scenario, cell), 50)]

    cell = Cell("bf16", 0, 1, 2.0)
    assert times(cell) == times(replace(cell, precision="awq")) == times(replace(cell, attempt=2))
    others = [times(replace(cell, repeat=2)), times(cell, replace(scenario, seed=2))]
    assert times(cell) not in others


TRACE = (Arrival(0.0, 100, 10), Arrival(1.0, 200, 20), Arrival(4.0, 300, 30))
"""Two gaps in 4 s: 0.5 a second."""


def test_a_trace_is_scaled_to_the_rate_and_ends() -> None:
    """At 2 a second, four times the recorded rate, everything comes after a quarter of its time."""
    assert mean_rate(TRACE) == 0.5
    scenario = Scenario("test", arrivals="trace", trace="t.csv", length_distribution="empirical")
    assert list(arrivals(scenario, Cell("bf16", 0, rate_rps=2.0), TRACE)) == [
        Arrival(0.0, 100, 10),
        Arrival(0.25, 200, 20),
        Arrival(1.0, 300, 30),
    ]
    part = tuple(replace(item, offset_s=item.offset_s + 7) for item in TRACE)
    assert [item.offset_s for item in arrivals(scenario, Cell("x", 0, rate_rps=0.5), part)] == [0.0, 1.0, 4.0]


@pytest.mark.parametrize("change", [{"length_distribution": "uniform"}, {"dataset": "d.json"}])
def test_a_trace_brings_lengths_only_where_nothing_else_does(change: dict[str, str]) -> None:
    scenario = Scenario("test", arrivals="trace", trace="t.csv", length_distribution="empirical")
    found = list(arrivals(replace(scenario, **change), Cell("bf16", 0, rate_rps=0.5), TRACE))  # type: ignore[arg-type]
    assert found == [Arrival(0.0), Arrival(1.0), Arrival(4.0)]


def test_a_closed_cell_has_no_arrivals() -> None:
    with pytest.raises(ValueError, match="bf16-c4-r1"):
        arrivals(Scenario("test", arrivals="poisson"), Cell("bf16", 4))
    with pytest.raises(ValueError, match="open loop"):
        arrivals(Scenario("test"), Cell("bf16", 0, rate_rps=1.0))


@pytest.mark.parametrize(
    "text",
    [
        "timestamp,input_length,output_length\n5,100,10\n6,200,20\n\n9,300,30\n",
        # Azure's, with seven digits of a second
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,100,10\n"
        "2023-11-16 18:15:47.6805900,200,20\n2023-11-16 18:15:50.6805900,300,30\n",
        "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,100,10\n"
        "2024-05-10 00:00:01.5+00:00,200,20\n2024-05-10 02:00:04.5+02:00,300,30\n",
        # BurstGPT's
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.0,GPT-4,100,10,110,API log\n6.0,ChatGPT,200.0,20,220,API log\n9.0,GPT-4,300,30,330,API log\n",
    ],
    ids=["ours", "azure-2023", "azure-2024", "burstgpt"],
)
def test_published_traces_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    found = read_trace(path)
    assert [round(item.offset_s, 6) for item in found] == [0.0, 1.0, 4.0]
    assert [(item.input_tokens, item.output_tokens) for item in found] == [(100, 10), (200, 20), (300, 30)]


HEADER = b"timestamp,input_length,output_length\n"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "line 1: no column timestamp"),
        (b"timestamp,input_length\n1,2\n", "line 1: no column output_length"),
        (HEADER, "no two rows"),
        (HEADER + b"1,10,10\n1,10,10\n", "no two rows"),
        (HEADER + b"1,10,10\n2,10\n", "line 3: 2 cells"),
        (HEADER + b"2,10,10\n1,10,10\n", "line 3: timestamp 1 is before"),
        (HEADER + b"1,10,10\nnoon,10,10\n", "line 3: timestamp cannot be 'noon'"),
        (HEADER + b"2023-11-16 18:15:46,10,10\n12,10,10\n", "line 3: timestamp cannot be '12'"),
        (HEADER + b"1,10,10\n2,-1,10\n", "line 3: input_length cannot be '-1'"),
        (HEADER + b"1,10,10\n2,10,1.5\n", "line 3: output_length cannot be '1.5'"),
        (HEADER + b"1,10,10\n2,10,inf\n", "line 3: output_length cannot be 'inf'"),
        (HEADER + b"nan,10,10\n2,10,10\n", "line 2: timestamp cannot be 'nan'"),
        (b"\xff\xfe\x00\x81", "is not UTF-8"),
        (HEADER + b"1,10,10\n" + b"2," + b"1" * 200_000 + b",3\n", "line 3: field larger"),
    ],
)
def test_a_bad_trace_is_named_with_line_and_column(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert "mine.csv" in str(caught.value) and named in str(caught.value)


def test_a_trace_that_is_not_there_and_one_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with pytest.raises(InputError, match=r"mine\.csv: cannot be read"):
        read_trace(path)
    path.write_bytes(HEADER + b"1,10,10\n2,10,10\n")
    assert len(read_trace(path)) == 2
    path.write_bytes(HEADER + b"1,10,10\n2,10,10\n3,10,10\n")
    assert len(read_trace(path)) == 3
