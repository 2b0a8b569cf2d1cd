"""When requests of an open loop arrive: seeded times that depend on nothing that the server does.

    constant   every 1/rate
    poisson    gaps of an exponential distribution: many users who know nothing of each other
    gamma      gaps of a gamma distribution with shape `burstiness` and mean 1/rate, as vLLM's --burstiness:
               1 is poisson, below 1 requests come in bursts, far above 1 it is nearly constant
    trace      as recorded, stretched or squeezed to the rate that is asked for

All but the trace go on for ever. Times are the same for each precision, and for a cell that is measured again.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from pathlib import Path

from harness.errors import InputError
from harness.files import readable
from harness.records import Cell, Scenario

_COLUMNS = {
    "timestamp": ("timestamp",),
    "input_length": ("input_length", "input_tokens", "contexttokens", "request tokens"),
    "output_length": ("output_length", "output_tokens", "generatedtokens", "response tokens"),
}
"""Columns by our name, and what published traces call them (Azure LLM inference, BurstGPT), in small letters."""
RAMP_S_PER_USER, LONGEST_RAMP_S = 0.02, 5.0
"""Users begin this far apart on average: a thundering herd of prefills is not what users look like."""
MOST_ROWS = 1_000_000
"""A cell lasts minutes; a trace of months is cut to the hours that are meant."""
LARGEST_BYTES = 2**30
_MOST_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of an open loop: when it comes, counted from the start of the load, and a trace's lengths."""

    offset_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None


def arrivals(scenario: Scenario, cell: Cell, trace: Sequence[Arrival] = ()) -> Iterator[Arrival]:
    """The arrivals of an open-loop cell in order, `cell.rate_rps` a second on average."""
    rate = cell.rate_rps
    if rate is None or scenario.arrivals == "closed":
        raise ValueError(f"cell {cell.key} is no open loop")
    if scenario.arrivals == "trace":
        return _replayed(trace, rate, lengths=lengths_from_trace(scenario))
    if scenario.arrivals == "constant":
        return (Arrival(number / rate) for number in count())
    rng = random.Random(f"arrivals/{scenario.seed}/{rate}/{cell.repeat}")
    return _random(scenario.burstiness if scenario.arrivals == "gamma" else 1.0, rate, rng)


def pace(scenario: Scenario, cell: Cell, user: int) -> Iterator[float]:
    """Of a closed loop: when this user begins, s after the load does; then its pause before each further question."""
    rng = random.Random(f"pace/{scenario.seed}/{cell.conc}/{cell.repeat}/{user}")
    yield rng.uniform(0, min(LONGEST_RAMP_S, RAMP_S_PER_USER * cell.conc))
    while True:
        yield rng.expovariate(1 / scenario.think_s) if scenario.think_s else 0.0


def lengths_from_trace(scenario: Scenario) -> bool:
    """Whether a trace also says how long requests are: if lengths are `empirical` and no dataset brings others."""
    return scenario.trace is not None and scenario.length_distribution == "empirical" and scenario.dataset is None


def _random(shape: float, rate: float, rng: random.Random) -> Iterator[Arrival]:
    """Gaps of gamma(shape, scale) with the mean shape * scale = 1/rate; shape 1 is the exponential distribution."""
    offset_s = 0.0
    while True:
        offset_s += rng.gammavariate(shape, 1 / (shape * rate))
        yield Arrival(offset_s)


def _replayed(trace: Sequence[Arrival], rate: float, *, lengths: bool) -> Iterator[Arrival]:
    stretch = mean_rate(trace) / rate
    for arrival in trace:
        offset_s = (arrival.offset_s - trace[0].offset_s) * stretch
        yield Arrival(offset_s, arrival.input_tokens, arrival.output_tokens) if lengths else Arrival(offset_s)


def mean_rate(trace: Sequence[Arrival]) -> float:
    """Requests a second of a trace: its gaps / the time from its first to its last arrival."""
    return (len(trace) - 1) / (trace[-1].offset_s - trace[0].offset_s)


# --- reading a trace --------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """A trace from a CSV file with timestamp (seconds, or an ISO date-time), input_length and output_length.

    Offsets count from its first row. Requests that failed (no output) stay: they arrived. Raises InputError naming
    file, line and column.
    """
    try:
        state = readable(path, LARGEST_BYTES)
        return _read_trace(path, (state.st_mtime_ns, state.st_size))
    except OSError as error:
        raise InputError(f"trace {path.name}: cannot be read ({error.strerror})", remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"trace {path.name}: is not UTF-8 text ({error.reason})", allowed="a CSV file") from error


@lru_cache(maxsize=2)
def _read_trace(path: Path, state: tuple[int, int]) -> tuple[Arrival, ...]:
    """Kept, because context, rate and load all ask for it; a file in another `state` (time, size) is read anew."""
    trace: list[Arrival] = []
    read_time: Callable[[str], float] | None = None
    start_s = before_s = 0.0
    for line, (time, input_length, output_length) in _rows(path):
        where = f"trace {path.name} line {line}"
        if read_time is None:
            read_time = _seconds if _is_number(time) else _instant
            start_s = before_s = _value(read_time, time, f"{where}: timestamp")
        time_s = _value(read_time, time, f"{where}: timestamp")
        if time_s < before_s:
            raise InputError(
                f"{where}: timestamp {time} is before the one above it",
                allowed="rows in the order of their times",
                remedy="sort the file by timestamp",
            )
        before_s = time_s
        input_tokens = _value(_tokens, input_length, f"{where}: input_length")
        output_tokens = _value(_tokens, output_length, f"{where}: output_length")
        trace.append(Arrival(time_s - start_s, int(input_tokens), int(output_tokens)))
        if len(trace) > MOST_ROWS:
            raise InputError(
                f"trace {path.name}: more than {MOST_ROWS:,} rows",
                remedy="cut out what you mean to replay (a cell lasts minutes)",
            )
    if not trace or trace[-1].offset_s == 0:
        raise InputError(f"trace {path.name}: has no two rows at different times, so it has no rate")
    return tuple(trace)


def _rows(path: Path) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(line, cells of our three columns) of each row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            time, input_length, output_length = _places(path, next(reader, []))
            for row in reader:
                if row and len(row) <= max(time, input_length, output_length):
                    raise InputError(
                        f"trace {path.name} line {reader.line_num}: {len(row)} cells, too few for its columns"
                    )
                if row:
                    yield reader.line_num, (row[time], row[input_length], row[output_length])
        except csv.Error as error:
            raise InputError(f"trace {path.name} line {reader.line_num}: {error}", allowed="a CSV file") from error


def _places(path: Path, header: Sequence[str]) -> list[int]:
    """Where our columns are."""
    names = [name.strip().lower() for name in header]
    places = []
    for column, known in _COLUMNS.items():
        found = [names.index(name) for name in known if name in names]
        if not found:
            raise InputError(
                f"trace {path.name} line 1: no column {column} among {', '.join(header)[:200] or 'nothing'}",
                allowed=" or ".join(known),
            )
        places.append(found[0])
    return places


def _value(read: Callable[[str], float], text: str, what: str) -> float:
    try:
        return read(text.strip())
    except (ValueError, OverflowError):
        raise InputError(f"{what} cannot be {text!r}", allowed=_ALLOWED[read]) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError
    return seconds


def _instant(text: str) -> float:
    """Seconds since the epoch; without a time zone it counts as UTC."""
    instant = datetime.fromisoformat(text)
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def _tokens(text: str) -> float:
    """A whole number, although some tables write 12.0."""
    number = float(text)
    if not number.is_integer() or not 0 <= number <= _MOST_TOKENS:
        raise ValueError
    return number


_ALLOWED: dict[Callable[[str], float], str] = {
    _seconds: "seconds, as in the first row",
    _instant: "a date-time as 2023-11-16 18:15:46.68, as in the first row",
    _tokens: f"a whole number, 0 to {_MOST_TOKENS:,}",
}
