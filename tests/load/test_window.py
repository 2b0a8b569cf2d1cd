"""When measuring begins and ends, played through by hand with records of our own making: times in seconds."""

from __future__ import annotations

from dataclasses import replace

from harness.load.window import Window
from harness.records import Cell, RequestRecord, Scenario

SCENARIO = Scenario("test", requests=4, min_window_s=1.0)


def s(seconds: float) -> int:
    return int(seconds * 1e9)


def request(user: int, begun: float, ended: float, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        "test", user, 0, "warmup", s(begun), sent_ns=s(begun), first_token_ns=s(begun + 0.01), last_token_ns=s(ended),
        end_ns=s(ended), completion_tokens=2, error=error,
    )  # fmt: skip


TWO_USERS = Cell("x", 2)


def window(scenario: Scenario = SCENARIO, cell: Cell = TWO_USERS, trace_s: float | None = None) -> Window:
    return Window(scenario, cell, trace_s=trace_s)


def take(of: Window, user: int, begun: float, ended: float, error: str | None = None) -> str:
    phase = of.take(request(user, begun, ended, error), s(ended)).phase
    of.tick(s(ended))
    return phase


def test_it_opens_when_the_last_user_is_warm_and_what_began_before_is_warm_up() -> None:
    of = window()
    assert take(of, 0, 0.0, 0.2) == "warmup"
    assert take(of, 0, 0.2, 0.5) == "warmup", "the same user twice does not make the other one warm"
    assert of.open_ns is None
    assert take(of, 1, 0.1, 0.9) == "warmup"
    assert of.open_ns == s(0.9)
    assert take(of, 0, 0.5, 1.0) == "warmup", "begun before the window opened"
    assert take(of, 1, 0.9, 1.2) == "measured"


def test_it_closes_after_enough_requests_and_its_least_time_and_holds_the_load() -> None:
    of = window()
    take(of, 0, 0.0, 0.1)
    take(of, 1, 0.0, 0.1)
    for number in range(6):  # three for each user, which is more than the scenario's four
        assert take(of, number % 2, 0.2 + number / 10, 0.3 + number / 10) == "measured"
    assert of.close_ns is None, "six have ended, but 0.8 s are less than the least time"
    of.tick(s(1.2))
    assert of.close_ns == s(1.2)
    assert take(of, 0, 1.1, 3.0) == "measured", "begun inside, ended long after: the slow are not dropped"
    assert take(of, 1, 1.3, 1.4) == "held"
    assert take(of, 1, 1.1, 3.0, "cut") == "held", "what we cut ourselves is no failure of the server"


def test_a_window_that_is_never_filled_ends_at_its_longest_time() -> None:
    of = window(replace(SCENARIO, requests=1000, max_window_s=5.0))
    take(of, 0, 0.0, 0.1)
    take(of, 1, 0.0, 0.1)
    of.tick(s(5.0))
    assert of.close_ns is None
    of.tick(s(5.2))
    assert of.close_ns == s(5.2)


def test_it_goes_on_until_p95_is_known_well_enough() -> None:
    """Latencies that alternate between 1 and 2 s have a p95 of 2 s that each resample finds; a ramp does not."""
    asked = replace(SCENARIO, requests=100, precision=0.05)
    steady, ramp = window(asked), window(asked)
    for of, latency in ((steady, lambda n: 1.0 + n % 2), (ramp, lambda n: 1.0 + n / 10)):
        take(of, 0, 0.0, 0.1)
        take(of, 1, 0.0, 0.1)
        for number in range(100):
            take(of, number % 2, 1.0 + number, 1.0 + number + latency(number))
    assert steady.close_ns is not None
    assert ramp.close_ns is None


def test_a_server_that_fails_everything_ends_the_cell() -> None:
    of = window()
    for number in range(25):
        take(of, number % 2, number / 10, number / 10 + 0.05, "http_500")
    assert of.gave_up is None
    take(of, 0, 2.5, 2.6, "http_500")
    assert of.gave_up is not None and "26 requests in a row" in of.gave_up and "http_500" in of.gave_up


def test_one_success_in_between_is_another_row_of_failures() -> None:
    of = window()
    for number in range(100):
        take(of, number % 2, number / 10, number / 10 + 0.05, None if number % 20 == 0 else "http_500")
    assert of.gave_up is None


def test_an_open_loop_warms_up_by_the_clock() -> None:
    of = window(replace(SCENARIO, arrivals="poisson", warmup_s=2.0, requests=3, min_window_s=0.0), Cell("x", 0, 1, 5.0))
    assert take(of, 0, 0.1, 0.2) == "warmup"
    of.tick(s(1.9))
    assert of.open_ns is None
    of.tick(s(2.0))
    assert of.open_ns == s(2.0)
    assert [take(of, user, 2.1, 2.2) for user in (1, 2, 3)] == ["measured"] * 3
    assert of.close_ns == s(2.2)


def test_a_trace_is_replayed_to_its_end() -> None:
    of = window(replace(SCENARIO, arrivals="trace", requests=1), Cell("x", 0, 1, 5.0), trace_s=10.0)
    of.tick(s(1.0))
    assert of.open_ns == s(1.0), "a tenth of the trace is warm-up"
    for number in range(20):
        take(of, number, 1.1 + number, 1.2 + number)
    assert of.close_ns is None
    of.exhausted(s(30))
    assert of.close_ns == s(30)
