"""What a calibration is about: the card, the model and the scenario of a measured run, and its usable levels."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from harness.analysis.levels import levels
from harness.architecture import Architecture
from harness.engines.arguments import read
from harness.engines.vllm_command import CPU_KV_CACHE_GIB
from harness.errors import InputError
from harness.predict import cards, coefficients, memory, processor, shapes
from harness.predict.cards import Card
from harness.predict.cell import check_scenario, engine, figures
from harness.predict.limits import Limits, StepTime
from harness.predict.loads import cell_load
from harness.predict.profile import FACTORS, QUANTITIES, Floats
from harness.predict.roofline import Coefficients, Factors
from harness.predict.scheduler import simulate
from harness.predict.shapes import Shape
from harness.records import Cell, Scenario, SweepPoint
from harness.report.run import Run
from harness.scenario import context_served
from harness.variants import setting_of

PRIOR_CARD = {"bandwidth": 0.25, "tensor": 0.25, "host": 0.7}
"""σ of each log. A card is in the catalogue, its machine is not."""
PRIOR_PROCESSOR = dict.fromkeys(FACTORS, 1.5) | {"unpacking": 0.5}
"""Of a processor next to nothing is known: a factor of 19 up or down is still within 95 %."""
MIN_POINTS, MAX_POINTS = 3, 6


@dataclass(frozen=True, slots=True)
class Server:
    """A model on a card under a scenario, whose cells can be predicted for any factors."""

    card: Card
    architecture: Architecture
    scenario: Scenario
    coefficients: Coefficients
    kv_blocks: Mapping[str, int]
    """By precision: measured where the engine said it, else computed (memory.py)."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """None: the engine's own for the card."""

    @property
    def prior(self) -> Mapping[str, float]:
        return PRIOR_PROCESSOR if self.card.generation == "cpu" else PRIOR_CARD

    def predicted(self, logs: Floats, cell: Cell) -> Floats:
        """Logs of QUANTITIES of a cell; NaN where it has too few requests for one. logs: θ, in the order of `prior`."""
        limits, steps = self.engine(cell.precision, dict(zip(self.prior, np.exp(logs), strict=True)))
        wanted = cell_load(self.scenario, cell)
        found = figures(self.scenario, wanted, simulate(wanted, limits, steps))
        return np.log([found.get(name) or np.nan for name in QUANTITIES])

    def engine(self, precision: str, factors: Mapping[str, float]) -> tuple[Limits, StepTime]:
        """What the scheduler is given. A precision without a kernel on this card is an InputError."""
        _, limits, steps = engine(
            self.card,
            self.architecture,
            precision,
            self.coefficients,
            Factors(**factors),
            kv_blocks=self.kv_blocks[precision],
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )
        return limits, steps


@dataclass(frozen=True, slots=True)
class Subject:
    """A measured run, read for calibrating."""

    run: Run
    shape: Shape
    server: Server
    levels: tuple[SweepPoint, ...]
    """What can be fitted to: repeats merged, none of them invalid, all of one model and scenario."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def subject(run: Run, gpu: str | None = None, model: str | None = None, known: Coefficients | None = None) -> Subject:
    """Find the card, the model and the usable levels of a run.

    gpu, model: instead of what the run names. known: coefficients of cards [those that ship]. Raises InputError for a
    predicted run, a card or a model that is not known, a scenario that virtual time does not know.
    """
    if run.predicted:
        raise InputError(f"{run.name} was predicted, and nothing of it measured", remedy="calibrate by a measured run")
    if said := _not_known(run.points):
        raise InputError(
            f"{run.name} was served with {said}, which virtual time does not know",
            allowed="one set of engine arguments: --max-num-seqs, --gpu-memory-utilization, --max-model-len",
            remedy="sweep without --vary and --engine-arg, then calibrate by that",
        )
    scenario = _scenario(run)
    shape = shapes.shape(model or str(run.settings.get("model") or run.common("model") or ""))
    kept, notes = _of_one_kind(run)
    usable = tuple(levels(kept))
    invalid = sum(point.verdict == "invalid" for point in kept)
    if invalid:
        notes.append(f"{invalid} invalid {'row is' if invalid == 1 else 'rows are'} not fitted to")
    card = _card(run, gpu)
    found = known or (Coefficients() if card.generation == "cpu" else coefficients.fitted())
    seqs = run.settings.get("max_num_seqs")
    server = Server(card, shape.architecture, scenario, found, {}, seqs if isinstance(seqs, int) else 256)
    blocks = {precision: _kv_blocks(run, server, precision, usable) for precision in _precisions(usable)}
    return Subject(run, shape, replace(server, kv_blocks=blocks), usable, tuple(notes))


def _scenario(run: Run) -> Scenario:
    """Of run.toml; keys of another version are passed over, as report/run.py does."""
    known = {item.name for item in fields(Scenario)}
    scenario = Scenario(**{"name": run.scenario_name} | {k: v for k, v in run.scenario.items() if k in known})
    check_scenario(scenario)
    if scenario.arrivals == "trace":
        raise InputError(
            f"{run.name}: a trace has one load, and a calibration needs {MIN_POINTS}",
            allowed="closed, constant, poisson or gamma arrivals",
            remedy="sweep with --conc 1,8,32",
        )
    return scenario


def _of_one_kind(run: Run) -> tuple[list[SweepPoint], list[str]]:
    """Rows of the run's own model and scenario, and a note of the others."""
    model, scenario = run.common("model"), run.common("scenario")
    kept = [row for row in run.points if row.model in (model, None) and row.scenario in (scenario, None)]
    others = len(run.points) - len(kept)
    return kept, [f"{others} of another model or scenario are left out"] if others else []


def _not_known(rows: Sequence[SweepPoint]) -> str | None:
    """The first engine argument that the figures hang on and a Server does not have; None: there is none."""
    known = {"--max-num-seqs", "--gpu-memory-utilization", "--max-model-len"}
    for row in rows:
        if setting_of(row.precision):
            return row.precision
        for flag, _ in read(shlex.split(row.engine_args or "")):
            if flag not in known:
                return flag
    return None


def _card(run: Run, gpu: str | None) -> Card:
    name = gpu or run.common("gpu") or run.environment.get("gpu")
    if name:
        return cards.card(str(name))
    if run.device == "host":
        return processor.card_of(run.environment)
    raise InputError(f"{run.name} does not say on which card it ran", remedy="say it: --gpu rtx-4080")


def _precisions(rows: Sequence[SweepPoint]) -> list[str]:
    return list(dict.fromkeys(row.precision for row in rows))


def _kv_blocks(run: Run, server: Server, precision: str, rows: Sequence[SweepPoint]) -> int:
    """As the engine logged it, else as memory.py computes it."""
    size = memory.default_block_size(server.card)
    logged = next((row.kv_cache_tokens for row in rows if row.precision == precision and row.kv_cache_tokens), None)
    if logged:
        return logged // size
    given = run.settings.get("kv_cache_gib")
    seqs, utilization = server.max_num_seqs, run.settings.get("gpu_memory_utilization")
    return memory.memory(
        server.card,
        server.architecture,
        precision,
        gpu_memory_utilization=utilization if isinstance(utilization, float) else 0.9,
        max_num_seqs=seqs,
        max_num_batched_tokens=memory.default_batch(server.card)[1],
        max_model_len=context_served(server.scenario),
        block_size=size,
        kv_cache_gib=given or (CPU_KV_CACHE_GIB if server.card.generation == "cpu" else None),
    ).kv_blocks


def cell_of(level: SweepPoint) -> Cell:
    return Cell(level.precision, level.conc, level.repeat, level.rate_rps)
