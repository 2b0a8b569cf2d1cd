"""`bench sweep --plan`: how many cells, GPU-hours, dollars and hours a sweep would take; nothing is started.

    session        = start of the engine + its cells                                           s
    GPU-hours      = sum over sessions of (session x cards of its engine) / 3600
    $              = sum over sessions of (GPU-hours x usd_per_hour of its card)
    wall time      = sessions in their order, each at the first place that is free: the end of the last    h

Each figure has a basis, and the best one that there is counts:

    measured       the median of what the same cell (model, precision, load, scenario, engine arguments, card) took in
                   earlier runs, and of what their engines took to start
    assumed        cell_s and start_s of --assume
    predicted      virtual time of the predictor, for a card of its catalogue: to the last token, and 2 s around it
    bounds         what the scenario allows: from its shortest window to its longest and a request's longest before and
                   after it; an engine starts between at once and its time limit

Bounds make every sum that they enter a span, from its lower to its upper end. Not counted: quantizing what is missing,
the end of an engine, and a cell that has to be measured again.
"""

from __future__ import annotations

import functools
import heapq
import json
import re
import statistics
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import job, models, settings
from harness.assumptions import Assumptions
from harness.engines.arguments import written
from harness.engines.vllm import START_TIMEOUT_S
from harness.errors import InputError, KneebenchError
from harness.job import SweepRequest
from harness.placing import letters, priced
from harness.records import Cell, Scenario, SweepPoint, read_table
from harness.sweep import Session, Variant
from harness.telemetry.gpu import gpus
from harness.variants import name_of, precision_of, setting_of

AROUND_S = 2.0
"""Of a cell, beside its load: the counters before and after, and the row."""
_DIED = {"engine_died", "gave_up"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, from `lo` to `hi`, and where they are from."""

    lo: float
    hi: float
    basis: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A session, and what it is thought to take."""

    session: Session
    start: Estimate
    cells: tuple[Estimate, ...]
    usd_per_hour: float

    def seconds(self, end: str) -> float:
        """Of the session; `end` is lo or hi."""
        found: float = sum(getattr(one, end) for one in (self.start, *self.cells))
        return found


@dataclass(frozen=True, slots=True)
class Span:
    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a sweep would take. The formulas are the module's."""

    sessions: tuple[Planned, ...]
    places: Mapping[str | None, int]
    """How many engines run at once, by card type; None: of no stated type."""

    @property
    def cells(self) -> int:
        return sum(len(one.cells) for one in self.sessions)

    @property
    def gpu_hours(self) -> Span:
        return self._both(lambda end: sum(_card_hours(one, end) for one in self.sessions))

    @property
    def usd(self) -> Span:
        return self._both(lambda end: sum(_card_hours(one, end) * one.usd_per_hour for one in self.sessions))

    @property
    def wall_s(self) -> Span:
        return self._both(self._last_end)

    def _last_end(self, end: str) -> float:
        """Two places and sessions of 30, 20 and 40 s: 30 and 20 begin, 40 follows 20, and the end is at 60 s."""
        ends = [0.0]
        for card_type, places in self.places.items():
            free = [0.0] * max(1, places)
            for one in self.sessions:
                if one.session.variant.card_type == card_type:
                    ends.append(heapq.heappop(free) + one.seconds(end))
                    heapq.heappush(free, ends[-1])
        return max(ends)

    @staticmethod
    def _both(of: Callable[[str], float]) -> Span:
        return Span(of("lo"), of("hi"))


def _card_hours(one: Planned, end: str) -> float:
    return one.seconds(end) * one.session.variant.cards / 3600


@dataclass(frozen=True, slots=True)
class Seen:
    """What earlier runs took, seconds, with the run that said so."""

    cells: Mapping[Any, list[tuple[float, str]]] = field(default_factory=dict)
    starts: Mapping[tuple[str, str], list[tuple[float, str]]] = field(default_factory=dict)
    """By model and precision."""


def look(request: SweepRequest, assumed: Assumptions | None = None) -> tuple[Outlook, str]:
    """What the sweep that was typed would take, by the runs that lie where it would, and what its hours are of.

    A cluster is asked what nodes it has; where `auto` finds none, that is this machine. Raises InputError as the sweep.
    """
    request = job.checked(request)
    if request.engine == "simulated":
        raise InputError("--plan with --engine simulated, which takes seconds", allowed="--plan of a measurement")
    sessions = job.sessions_of(request)
    cards = gpus()
    places: Mapping[str | None, int] = dict.fromkeys((session.variant.card_type for session in sessions), 1)
    if request.cluster is not None:
        from harness import cluster

        places = cluster.places(request.cluster, [session.variant for session in sessions]) or places
    found = outlook(
        request,
        sessions,
        earlier((request.out or Path("results") / "run").parent),
        places,
        None if request.endpoint or not cards else cards[0].name,
        assumed,
        _prices(request),
    )
    return found, "GPU" if cards or request.card_types else "engine"


def _prices(request: SweepRequest) -> Callable[[str | None], float]:
    def of(card_type: str | None) -> float:
        return (priced(request.scenario, card_type) if request.price_by_card else request.scenario).usd_per_hour

    return of


def outlook(
    request: SweepRequest,
    sessions: Sequence[Session],
    seen: Seen,
    places: Mapping[str | None, int],
    here: str | None = None,
    assumed: Assumptions | None = None,
    usd_per_hour: Callable[[str | None], float] | None = None,
) -> Outlook:
    """What `request`, checked, would take. `here`: the name of the card that it would run on when none is stated."""
    assumed = assumed or Assumptions()
    price = usd_per_hour or (lambda _: request.scenario.usd_per_hour)
    found = []
    for session in sessions:
        card = session.variant.card_type or here
        cells = [_cell(cell, session.variant, request, seen, card, assumed) for cell in session.cells]
        if request.search is not None:
            least = _bounds(request.scenario).lo
            cells = [Estimate(least, request.search.max_minutes * 60 / len(sessions), "budget of the search")]
        start = _start(session.variant, request, seen, assumed)
        found.append(Planned(session, start, tuple(cells), price(session.variant.card_type)))
    return Outlook(tuple(found), places)


def _cell(
    cell: Cell, variant: Variant, request: SweepRequest, seen: Seen, card: str | None, assumed: Assumptions
) -> Estimate:
    told = written(variant.engine_args)
    took = seen.cells.get(_same(_name(request), variant.precision, cell, request.scenario, told, card), [])
    if took:
        return _measured(took)
    if assumed.cell_s is not None:
        return Estimate(assumed.cell_s, assumed.cell_s, "assumed")
    predicted = _predicted(cell, variant, request, card)
    return predicted or _bounds(request.scenario)


def _start(variant: Variant, request: SweepRequest, seen: Seen, assumed: Assumptions) -> Estimate:
    """Of this model in this precision, else of this model in any."""
    if request.endpoint is not None:
        return Estimate(0.0, 0.0, "runs already")
    own = seen.starts.get((_name(request), precision_of(variant.precision)), [])
    took = own or [one for (model, _), some in seen.starts.items() if model == _name(request) for one in some]
    if took:
        return _measured(took)
    if assumed.start_s is not None:
        return Estimate(assumed.start_s, assumed.start_s, "assumed")
    return Estimate(0.0, START_TIMEOUT_S, "bounds")


def _measured(took: Sequence[tuple[float, str]]) -> Estimate:
    """The median; its basis is the latest run by name, which begins with its date."""
    seconds = statistics.median(one for one, _ in took)
    return Estimate(seconds, seconds, f"measured in {max(run for _, run in took)}")


def _predicted(cell: Cell, variant: Variant, request: SweepRequest, card: str | None) -> Estimate | None:
    """None where the predictor knows the card, the model, the precision or the load not."""
    if card is None or variant.engine_args:
        return None
    from harness.predict import cell as cells

    try:
        what, name = _subject(replace(request, repeats=1, gpu=card, vary=(), card_types=()))
        found = what.served[precision_of(variant.precision)]
        _, simulation = cells.predict(request.scenario, cell, found, job.read_arrivals(request.scenario))
    except (KneebenchError, KeyError):
        return None
    seconds = AROUND_S + max((one.last_token_s for one in simulation.served), default=0.0)
    return Estimate(seconds, seconds, f"predicted for {name}")


@functools.cache
def _subject(request: SweepRequest) -> tuple[Any, str]:
    from harness.predict.run import planned

    plan = planned(request)
    return plan, plan.card.name


def _bounds(scenario: Scenario) -> Estimate:
    """A request takes request_timeout_s at most; each warm-up round is one, and so is what is left at the end."""
    warm_up_s = 0.0 if scenario.arrivals == "closed" else scenario.warmup_s
    rounds = scenario.warmup_rounds if scenario.arrivals == "closed" else 0
    longest = warm_up_s + scenario.max_window_s + (rounds + 1) * scenario.request_timeout_s
    return Estimate(AROUND_S + warm_up_s + scenario.min_window_s, AROUND_S + longest, "bounds")


# --- earlier runs -----------------------------------------------------------------------------------------------------


def earlier(directory: Path) -> Seen:
    """What the runs below `directory` took; what cannot be read tells nothing."""
    cells: defaultdict[Any, list[tuple[float, str]]] = defaultdict(list)
    starts: defaultdict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for path in sorted(directory.glob("*/run.toml")):
        try:
            described = tomllib.loads(path.read_text(encoding="utf-8"))
            scenario = settings.record_of(Scenario, {"name": "", **described["scenario"]}, path.name)
            rows = read_table(path.parent / "points.csv", SweepPoint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, KneebenchError):
            continue
        for row in rows:
            if row.duration_s is None or row.source == "predicted" or _DIED & set(row.verdict_reasons):
                continue
            cell = Cell(row.precision, row.conc, row.repeat, row.rate_rps)
            card = _card_of(row.precision) or row.gpu
            same = _same(row.model, row.precision, cell, scenario, row.engine_args, card)
            cells[same].append((row.duration_s, path.parent.name))
        for file in path.parent.glob("engine-*.json"):
            name = re.fullmatch(r"engine-(.+)-r\d+(?:-\d+)?", file.stem)
            seconds = _start_s(file)
            if name and seconds is not None:
                model = str(described.get("run", {}).get("model"))
                starts[model, precision_of(name[1])].append((seconds, path.parent.name))
    return Seen(cells, starts)


def _start_s(file: Path) -> float | None:
    try:
        seconds = json.loads(file.read_text(encoding="utf-8"))["start_s"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(seconds) if isinstance(seconds, int | float) else None


def _same(
    model: str | None, precision: str, cell: Cell, scenario: Scenario, told: str | None, card: str | None
) -> tuple[Any, ...]:
    """What two cells share that take equally long: everything but the repeat, the price and the service level."""
    asked = replace(
        scenario,
        name="",
        description="",
        slo_p95_s=None,
        slo_ttft_s=None,
        slo_tpot_s=None,
        slo_goodput=None,
        usd_per_hour=1.0,
        utilisation=1.0,
        trace=scenario.trace and Path(scenario.trace).name,
        dataset=scenario.dataset and Path(scenario.dataset).name,
    )
    setting = tuple(one for one in setting_of(precision) if one[0] != "card")
    return model, name_of(setting, precision_of(precision)), cell.conc, cell.rate_rps, asked, told, _one_card(card)


def _card_of(precision: str) -> str | None:
    return dict(setting_of(precision)).get("card")


def _one_card(name: str | None) -> str | None:
    """One spelling of a card: its id in the catalogue, else what counts in the name."""
    from harness.predict.cards import card

    if name is None:
        return None
    try:
        return card(name).id
    except KneebenchError:
        return letters(name)


def _name(request: SweepRequest) -> str:
    return request.model if request.endpoint else models.resolve(request.model).name


# --- in words ---------------------------------------------------------------------------------------------------------


def lines(found: Outlook, card: str) -> list[tuple[str, str]]:
    """What the command prints: a word and what there is to say of it. `card`: what an hour is paid for."""
    engines = sum(found.places.values())
    return [
        ("plan", f"{_count(found.cells, 'cell')} in {_count(len(found.sessions), 'server session')}, "
                 f"{engines} at once"),
        (f"{card}-hours", _span(found.gpu_hours, lambda hours: f"{hours:.2f}")),
        ("price", _span(found.usd, lambda usd: f"${usd:,.2f}") + _rates(found)),
        ("wall time", _span(found.wall_s, _duration)),
        *(("cells", f"{number}: {basis}") for basis, number in _bases(found, of_cells=True)),
        *(("starts", f"{number}: {basis}") for basis, number in _bases(found, of_cells=False)),
        ("not in it", "quantizing what is missing, and cells that have to be measured again"),
    ]  # fmt: skip


def _bases(found: Outlook, *, of_cells: bool) -> list[tuple[str, int]]:
    estimates = [one for planned in found.sessions for one in (planned.cells if of_cells else [planned.start])]
    said = []
    for basis, number in Counter(one.basis for one in estimates).most_common():
        of_it = [one for one in estimates if one.basis == basis]
        span = Span(min(one.lo for one in of_it), max(one.hi for one in of_it))
        said.append((f"{_span(span, _duration)} each, {basis}", number))
    return said


def _rates(found: Outlook) -> str:
    rates = sorted({one.usd_per_hour for one in found.sessions})
    return f" at {', '.join(f'${rate:g}' for rate in rates)} an hour"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(of: Span, words: Callable[[float], str]) -> str:
    low, high = words(of.lo), words(of.hi)
    return low if low == high else f"between {low} and {high}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
