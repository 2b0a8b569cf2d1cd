"""The load of a cell in virtual time: its window is that of a measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.load.window import Window
from harness.load.workload import make_ask
from harness.predict.limits import Limits
from harness.predict.loads import cell_load
from harness.predict.scheduler import simulate
from harness.records import Cell, RequestRecord, Scenario

SCENARIO = Scenario("tests", input_tokens=40, output_tokens=12, requests=30, min_window_s=0.5)
LIMITS = Limits(kv_blocks=4000, max_num_seqs=8)


class Steps:
    """A step of 10 ms, and 0.1 ms for each prompt token."""

    def decode(self, sequences: int) -> tuple[float, float]:
        return 0.01, 0.0

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        return 0.01 + 1e-4 * prompt


@given(
    users=st.integers(1, 24),
    requests=st.integers(1, 60),
    rounds=st.integers(1, 3),
    distribution=st.sampled_from(["fixed", "uniform"]),
    least=st.sampled_from([0.0, 0.5, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_window_of_a_closed_loop_is_that_of_a_measurement(
    users: int, requests: int, rounds: int, distribution: str, least: float
) -> None:
    """The records of a simulation, fed to the state machine that measured cells use, open and close it alike."""
    scenario = replace(
        SCENARIO, requests=requests, warmup_rounds=rounds, min_window_s=least, length_distribution=distribution
    )  # type: ignore[arg-type]
    cell = Cell("bf16", users)
    load = cell_load(scenario, cell)
    found = simulate(load, LIMITS, Steps())
    window = Window(scenario, cell)
    for item in found.served:
        now_ns = round(item.last_token_s * 1e9)
        record = RequestRecord(
            cell.key, item.user, item.sequence, "warmup", round(item.arrival_s * 1e9),
            first_token_ns=round(item.first_token_s * 1e9), last_token_ns=now_ns,
        )  # fmt: skip
        assert window.take(record, now_ns).phase == load.phase(item) or item.arrival_s in (load.open_s, load.close_s)
        window.tick(now_ns)
    assert load.open_s is not None and load.close_s is not None
    assert (window.open_ns, window.close_ns) == (round(load.open_s * 1e9), round(load.close_s * 1e9))
    measured = [item for item in found.served if load.phase(item) == "measured"]
    assert len(measured) >= max(requests, 3 * users)
    # The load is held until the last of them has ended, and no longer.
    last = max(item.last_token_s for item in measured)
    assert max(item.arrival_s for item in found.served) <= last
    assert all(item.last_token_s >= last for item in found.served if item.arrival_s == last)


def test_lengths_are_those_that_a_measurement_would_ask_for() -> None:
    from harness.load.workload import Dialect

    cell = Cell("awq", 3)
    load = cell_load(SCENARIO, cell)
    found = simulate(load, LIMITS, Steps())
    for item in found.served[:20]:
        asked = make_ask(SCENARIO, cell, item.user, item.sequence, Dialect(vocabulary=range(100)), "m")
        assert (item.input_tokens, item.output_tokens) == (asked.input_tokens, asked.output_tokens)


def test_an_open_loop_begins_what_it_counts_inside_its_window() -> None:
    scenario = replace(SCENARIO, arrivals="poisson", warmup_s=2.0, requests=50)
    load = cell_load(scenario, Cell("bf16", 0, rate_rps=5.0))
    found = simulate(load, LIMITS, Steps())
    measured = [item for item in found.served if load.phase(item) == "measured"]
    assert len(measured) == 50
    assert min(item.arrival_s for item in measured) >= 2.0
    assert load.close_s == pytest.approx(max(item.arrival_s for item in measured))
    assert any(load.phase(item) == "held" for item in found.served)
