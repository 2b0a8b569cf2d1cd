"""What the counters said over a cell: a real page, written samples, and engines whose last word comes late."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.engines import EngineCounters, EngineInfo, Target
from harness.telemetry import watch
from harness.telemetry.prometheus import read_counters
from harness.telemetry.watch import EngineWatch, Seen, counters_seen

RECORDED = (Path(__file__).parent.parent / "data" / "vllm_metrics.txt").read_text(encoding="utf-8")


def counts(generation: int | None, prompt: int | None = None) -> EngineCounters:
    return EngineCounters(generation_tokens_total=generation, prompt_tokens_total=prompt)


def test_growth_between_two_real_pages() -> None:
    """The recorded page, and the same one with 5 requests of 30 tokens read and 100 made since."""
    later = re.sub(r"^(vllm:prompt_tokens_total\{.*\}) 18\.0$", r"\1 168.0", RECORDED, flags=re.MULTILINE)
    later = re.sub(r"^(vllm:generation_tokens_total\{.*\}) 134\.0$", r"\1 634.0", later, flags=re.MULTILINE)
    seen = counters_seen([read_counters(RECORDED), read_counters(later)])
    assert (seen.prompt_tokens, seen.generation_tokens) == (150, 500)
    assert (seen.preemptions, seen.running_peak, seen.prefix_hit_share) == (0, 0, None)


def test_peaks_and_growth() -> None:
    samples = [
        EngineCounters(1, 0, 0.1, 4, 100, 10, 1000, 50),
        EngineCounters(8, 3, 0.9, 4, 150, 10, 1300, 90),
        EngineCounters(2, 0, 0.2, 6, 300, 60, 1700, 350),
    ]
    assert counters_seen(samples) == Seen(
        running_peak=8,
        waiting_peak=3,
        kv_usage_peak=0.9,
        preemptions=2,
        prefix_hit_share=0.25,
        prompt_tokens=700,
        generation_tokens=300,
    )


@pytest.mark.parametrize(
    ("samples", "grown"),
    [
        ([counts(5, 5), counts(None), counts(25, 25)], 20),  # a scrape between failed
        ([counts(None), counts(5, 5), counts(25, 25)], None),  # what was before is not known
        ([counts(5, 5), counts(25, 25), counts(None)], None),
        ([counts(500, 500), counts(3, 3), counts(600, 600)], None),  # restarted on the way
        ([counts(5, 5)], None),
        ([], None),
    ],
    ids=["hole", "no begin", "no end", "restarted", "one", "none"],
)
def test_half_a_count_is_none(samples: list[EngineCounters], grown: int | None) -> None:
    seen = counters_seen(samples)
    assert (seen.generation_tokens, seen.prompt_tokens) == (grown, grown)


class Counting:
    """An engine whose count follows a script, one value a scrape, and then stays. No other figures."""

    target = Target("http://127.0.0.1:1", "m")
    info = EngineInfo(engine="scripted")

    def __init__(self, values: Iterator[int | None]) -> None:
        self._values, self._now = values, counts(None)
        self.scrapes = 0

    def counters(self) -> EngineCounters:
        self.scrapes += 1
        self._now = next((counts(value) for value in self._values), self._now)
        return self._now

    def memory_gib(self) -> float | None:
        return None

    def check(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD_S", 600.0)
    monkeypatch.setattr(watch, "SETTLE_S", 0.001)


@pytest.mark.parametrize(
    ("values", "grown", "scrapes"),
    [
        ([100, 400], 300, 3),  # at rest: begin, end, and once more to see that it rests
        ([100, 400, 450, 470, 470, 999], 370, 5),  # still growing, then at rest: not one scrape more
        ([100, 400, None], None, 3),  # it went away meanwhile
        ([None, None], None, 2),  # no counters: nothing to wait for
    ],
    ids=["rests", "grows on", "goes away", "has none"],
)
def test_the_end_waits_for_the_last_word(values: list[int | None], grown: int | None, scrapes: int) -> None:
    engine = Counting(iter(values))
    with EngineWatch(engine) as watching:
        pass
    assert (watching.seen().generation_tokens, engine.scrapes) == (grown, scrapes)


def test_a_shared_server_that_never_rests_is_left_after_a_while() -> None:
    engine = Counting(itertools.count(100, 10))
    with EngineWatch(engine) as watching:
        pass
    assert engine.scrapes == 2 + watch.SETTLE_SCRAPES
    assert watching.seen().generation_tokens == 10 * (engine.scrapes - 1)


def test_ctrl_c_does_not_wait() -> None:
    engine = Counting(itertools.count(100, 10))
    with pytest.raises(KeyboardInterrupt), EngineWatch(engine):
        raise KeyboardInterrupt
    assert engine.scrapes == 2
