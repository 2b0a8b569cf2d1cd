"""bench calibrate: hand-worked figures, factors found back, bands that hold, the committed runs as real oracles."""

from __future__ import annotations

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from harness.architecture import Architecture
from harness.errors import InputError
from harness.predict import calibrate, calibration, cards, points, processor, profile, shapes
from harness.predict.calibrate import Observation, fit, jacobian, spread, variances
from harness.predict.cards import Card
from harness.predict.points import after
from harness.predict.profile import QUANTITIES, Estimate, Floats, Profile
from harness.predict.roofline import Coefficients, Factors
from harness.predict.subject import PRIOR_CARD, PRIOR_PROCESSOR, Server, Subject, cell_of, subject
from harness.records import Cell, Scenario, SweepPoint
from harness.report.run import Run, load_run
from harness.slo import Slo

RESULTS = Path(__file__).parents[2] / "results"
NAN = math.nan
USUAL = Factors()
CELL = Cell("bf16", 1)

CPU = Card(
    id="cpu", name="two typical cores", generation="cpu", memory_gib=16.0, bandwidth_gb_s=8.0, fp16_tflops=0.4,
    bf16_tflops=0.4, source="a test",
)  # fmt: skip
SHAPE = Architecture(
    model_type="llama", layers=2, hidden=128, intermediate=256, heads=2, kv_heads=1, head_dim=64, vocabulary=1000,
    tied=False,
    max_positions=2048,
)  # fmt: skip


# --- steps of a processor ---------------------------------------------------------------------------------------------


def steps(kernel: str, factors: Factors = USUAL) -> processor.ProcessorSteps:
    return processor.ProcessorSteps(CPU, SHAPE, processor.KERNELS[kernel], factors)


def test_a_linear_layer_by_hand() -> None:
    """128 x 256 weights, 10 tokens. 16 bit: 65,536 bytes / 8e9 = 8.192 µs; 2·10·32,768 = 655,360 operations / 4e11 =
    1.6384 µs. INT4: 16,384 bytes, and for 1 group of each of 256 outputs a scale (2) and a zero point (0.5), 640 bytes:
    17,024 / 8e9 = 2.128 µs; unpacking 32,768 / 4e9 = 8.192 µs; 655,360 / 3e11 = 2.18453 µs."""
    assert steps("cpu-16bit").linear(128, 256, 10) == pytest.approx(8.192e-6 + 1.6384e-6)
    assert steps("cpu-int4").linear(128, 256, 10) == pytest.approx(2.128e-6 + 8.192e-6 + 2.18453e-6, rel=1e-5)


def test_a_decode_step_by_hand() -> None:
    """4 sequences. q, k and v: 128 x 256; out 128 x 128; gate and up 128 x 512; down 256 x 128: 147,456 weights a
    layer. Reading 294,912 / 8e9 = 36.864 µs, multiplying 8·147,456 / 4e11 = 2.94912 µs, twice: 79.62624 µs. Head:
    (256,000 + 64,000) / 8e9 = 40 µs, and 8·128,000 / 4e11 = 2.56 µs. Host: 400 + 4·110 + 2·130 = 1,100 µs.
    Each cached token: 2 layers · 2 · 64 · 2 bytes = 512 bytes / 8e9 = 64 ns."""
    base, slope = steps("cpu-16bit").decode(4)
    assert base == pytest.approx((79.62624 + 40 + 2.56 + 1100) * 1e-6)
    assert slope == pytest.approx(64e-9)


def test_prompts_pay_for_their_pairs() -> None:
    """100 tokens, 5,050 pairs: 4·5,050·128·2 = 5,171,200 operations at 0.16e12 are 32.32 µs beside the step.

    A decode beside one token of a prompt that goes on costs two decodes less what sampling the second one costs: 110 µs
    of host, 16,000 bytes of logits (2 µs), 256,000 operations of the head (0.64 µs); 1,000 cached tokens are 64 µs."""
    given = steps("cpu-16bit")
    without = given.mixed(0, 0, 100, 0, 1)
    assert given.mixed(0, 0, 100, 5050, 1) - without == pytest.approx(32.32e-6)
    assert given.mixed(1, 1000, 1, 0, 0) == pytest.approx(given.decode(2)[0] - 112.64e-6 + 64e-6)


@pytest.mark.parametrize(
    ("factors", "slower"),
    [
        (Factors(bandwidth=2.0), False),
        (Factors(tensor=2.0), False),
        (Factors(host=2.0), True),
        (Factors(quantized=2.0), False),
        (Factors(unpacking=2.0), False),
    ],
)
def test_each_factor_has_its_direction(factors: Factors, slower: bool) -> None:
    usual, changed = steps("cpu-int4").decode(8)[0], steps("cpu-int4", factors).decode(8)[0]
    assert changed > usual if slower else changed < usual


def test_a_machine_becomes_a_card() -> None:
    """4 cores, of which vLLM keeps one for its server: 3 · 8 GB/s, 3 · 0.4 TFLOPS."""
    found = processor.card_of({"cpu": "Some  <CPU>", "cpu_cores": 4, "memory_gib": 15.5})
    assert (found.id, found.generation, found.sms) == ("some-cpu-4-cores", "cpu", None)
    assert found.bandwidth_gb_s == pytest.approx(24.0)
    assert found.bf16_tflops == pytest.approx(1.2)
    for bad in ({}, {"cpu_cores": 0, "memory_gib": 1.0}, {"cpu_cores": 2, "memory_gib": None}):
        with pytest.raises(InputError, match="cpu_cores"):
            processor.card_of(bad)


def test_eight_bits_on_a_processor_are_refused() -> None:
    assert processor.kernel_on(CPU, "gptq") == "cpu-int4"
    with pytest.raises(InputError, match="16 and 4 bit"):
        processor.kernel_on(CPU, "w8a8")


# --- the fit ----------------------------------------------------------------------------------------------------------


def seen(tok_s: float, own: float = 0.0, conc: int = 1) -> Observation:
    return Observation(Cell("bf16", conc), np.array([tok_s, NAN, NAN, NAN]), np.array([own, 0, 0, 0]))


def line(logs: Floats, cell: Cell) -> Floats:
    """f(θ) = θ for tok/s, and for others what nobody measured."""
    return np.array([logs[0], -logs[0], NAN, -logs[0]])


def test_one_factor_by_hand() -> None:
    """One figure, 0.2 above f(0), of spread 0.07; prior 0.1. θ = 0.2·(1/0.0049) / (1/0.0049 + 1/0.01) = 0.134228.
    Left over 0.065772, χ² = 0.882845. The factor took 204.0816/304.0816 = 0.671141 of the figure, so ν = 20.328859
    and s² = 20.882845/20.328859 = 1.027251. Σ = 1/(204.0816/1.027251 + 100) = 0.0033483."""
    found = fit(line, [seen(0.2)], {"bandwidth": 0.1})
    assert found.logs[0] == pytest.approx(0.134228, rel=1e-4)
    assert found.degrees == pytest.approx(20.328859, rel=1e-5)
    assert found.scale**2 == pytest.approx(1.027251, rel=1e-4)
    assert found.covariance[0][0] == pytest.approx(0.0033483, rel=1e-3)
    assert found.factor("bandwidth") == pytest.approx(math.exp(0.134228), rel=1e-4)
    assert found.factor("quantized") == 1.0


def test_a_noisy_row_weighs_less() -> None:
    """Rows of 0.3 and 0 with own variances 0 and 3·0.07²: weights 4 : 1, so 0.24 without a prior to speak of."""
    found = fit(line, [seen(0.3), seen(0.0, own=3 * 0.07**2)], {"bandwidth": 100.0})
    assert found.logs[0] == pytest.approx(0.24, rel=1e-4)


def test_the_figures_of_a_cell_share_their_noise() -> None:
    """Correlation of tok/s and p95: -0.95·0.85 = -0.8075, so covariance -0.8075·0.07·0.10 = -0.0056525."""
    assert spread()[0, 1] == pytest.approx(-0.0056525)
    assert np.diag(spread()) == pytest.approx(np.array([0.07, 0.10, 0.12, 0.08]) ** 2)
    # All figures slow at once are one fact: they leave the factor less sure than if they were four.
    cell = Observation(CELL, np.array([-0.1, 0.1, NAN, 0.1]), np.zeros(4))
    together = fit(line, [cell], {"bandwidth": 10.0}).covariance[0][0]
    assert together > 1 / (1 / 0.07**2 + 1 / 0.10**2 + 1 / 0.08**2) * 1.5


def test_an_interval_becomes_a_variance() -> None:
    """ln(1.2/0.8) / 3.92 = 0.103435."""
    row = SweepPoint("r", "bf16", 1, tok_s=1.0, tok_s_lo=0.8, tok_s_hi=1.2, p95_ms=100.0)
    item = calibrate.observed(row)
    assert math.sqrt(item.own_variance[0]) == pytest.approx(0.103435, rel=1e-4)
    assert item.own_variance[1] == 0
    assert item.logs[1] == pytest.approx(math.log(100))
    assert np.isnan(item.logs[2])


def test_a_band_by_hand() -> None:
    """J = 2 for tok/s, Σ = 0.01, s = 1: 4·0.01 + 0.0049 = 0.0449."""
    estimate = Estimate(names=("host",), logs=(0.0,), covariance=((0.01,),), scale=1.0, degrees=30.0)
    assert variances(np.array([[2.0], [0], [0], [0]]), estimate)[:2] == pytest.approx([0.0449, 0.01])


def test_an_error_is_a_share_of_what_was_measured() -> None:
    """Predicted 80 of 100: 20 %."""
    assert calibrate.Figure(80.0, 70.0, 90.0, 100.0).error == pytest.approx(0.2)
    assert calibrate.Figure(80.0, 70.0, 90.0).error is None


def analytic(logs: Floats, cell: Cell) -> Floats:
    """A card without a scheduler: step = max-free sum of bytes, operations and host, n users, and a prompt of 100."""
    bandwidth, tensor, host = np.exp(logs)
    step = 4e-3 / bandwidth + cell.conc * 1e-4 / tensor + (2e-3 + cell.conc * 2e-5) * host
    prompt = 4e-3 / bandwidth + 100e-4 / tensor + 5e-3 * host
    return np.log([cell.conc / step, 100 * step + prompt, prompt, step])


def test_bands_hold_what_they_say() -> None:
    """200 cards drawn from the prior, three noisy cells each, two others predicted: of 1,600 new measurements with the
    same noise 95 % should lie in their bands."""
    rng, held, total = np.random.default_rng(8), 0, 0
    sigmas = np.array(list(PRIOR_CARD.values()))
    noise = np.linalg.cholesky(spread())
    for _ in range(200):
        truth = rng.normal(0, sigmas)
        cells = [Cell("bf16", conc) for conc in (1, 8, 64)]
        measured = [Observation(c, analytic(truth, c) + noise @ rng.normal(size=4), np.zeros(4)) for c in cells]
        estimate = fit(analytic, measured, PRIOR_CARD)
        logs = np.array(estimate.logs)
        for cell in (Cell("bf16", 3), Cell("bf16", 128)):
            half = calibrate.half_widths(jacobian(analytic, logs, cell), estimate)
            new = analytic(truth, cell) + noise @ rng.normal(size=4)
            held += int(np.sum(np.abs(new - analytic(logs, cell)) <= half))
            total += 4
    assert 0.90 <= held / total <= 0.99


def test_factors_lie_within_their_own_error() -> None:
    """Of 200 cards the factors, each by its own standard deviation, are off by 1 on root mean square."""
    rng, deviations = np.random.default_rng(5), []
    sigmas, noise = np.array(list(PRIOR_CARD.values())), np.linalg.cholesky(spread())
    for _ in range(200):
        truth = rng.normal(0, sigmas)
        cells = [Cell("bf16", conc) for conc in (1, 8, 64)]
        measured = [Observation(c, analytic(truth, c) + noise @ rng.normal(size=4), np.zeros(4)) for c in cells]
        estimate = fit(analytic, measured, PRIOR_CARD)
        deviations.append([(x - t) / estimate.sd(n) for x, t, n in zip(estimate.logs, truth, PRIOR_CARD, strict=True)])
    assert np.sqrt(np.mean(np.square(deviations), axis=0)) == pytest.approx([1.0, 1.0, 1.0], abs=0.2)


# --- a card that is simulated -----------------------------------------------------------------------------------------


def simulated_run(logs: Floats, **changes: object) -> Run:
    """A run of an L4 whose factors are known, as if it had been measured."""
    scenario = Scenario("chat", requests=60, min_window_s=0.1)
    architecture = shapes.shape("qwen2.5-1.5b").architecture
    server = Server(cards.card("l4"), architecture, scenario, Coefficients(), {"bf16": 5000, "awq": 6000})
    rows = []
    for precision in ("bf16", "awq"):
        for conc in (1, 4, 16, 64):
            values = np.exp(server.predicted(logs, Cell(precision, conc)))
            row = SweepPoint("sim", precision, conc, verdict="valid", gpu="NVIDIA L4", model="qwen2.5-1.5b",
                             kv_cache_tokens=16 * server.kv_blocks[precision], scenario="chat")  # fmt: skip
            rows.append(replace(row, **dict(zip(QUANTITIES, values.tolist(), strict=True))))
    table = {"name": "chat", "requests": 60, "min_window_s": 0.1, "later_key": 1}
    settings = {"model": "qwen2.5-1.5b", "concurrencies": [1, 4, 16, 64]}
    run = Run("sim", rows, Slo(3.0), table, settings, {"started_at": "2026-11-22T01:02:03"})
    return replace(run, **changes)  # type: ignore[arg-type]


TRUTH = np.array([-0.2, 0.15, 0.5])


@pytest.fixture(scope="module")
def known() -> Subject:
    return subject(simulated_run(TRUTH), known=Coefficients())


def test_the_factors_of_a_simulated_card_are_found(known: Subject) -> None:
    """No noise: what the figures tell of comes back, and the other cells come out."""
    found = calibrate.calibrate(known, points.choose(known, "bf16:1,awq:16,bf16:64"))
    assert found.card.id == "l4"
    for name, log, truth in zip(PRIOR_CARD, found.estimate.logs, TRUTH, strict=True):
        assert abs(log - truth) < 1.96 * found.estimate.sd(name)
    assert found.estimate.logs[0] == pytest.approx(-0.2, abs=0.05)
    assert found.day == "2026-11-22"
    errors = calibrate.medians(calibrate.held_out(known, found))
    assert max(errors.values()) < 0.05
    before = replace(found.estimate, logs=(0.0, 0.0, 0.0))
    uncalibrated = calibrate.medians(calibrate.held_out(known, replace(found, estimate=before)))
    assert uncalibrated["tok_s"] > 0.1


def test_the_host_is_slow_before_the_scheduler_too(known: Subject) -> None:
    """8 ms from the client to the scheduler, on a host that takes twice as long; 5,000 blocks of 16, as logged."""
    limits, _ = known.server.engine("bf16", {"bandwidth": 1.0, "tensor": 1.0, "host": 2.0})
    assert limits.request_s == pytest.approx(16e-3)
    assert (limits.kv_blocks, limits.block_size, limits.max_num_batched_tokens) == (5000, 16, 2048)


def test_what_cannot_be_fitted_is_left_out(known: Subject) -> None:
    rows = known.run.points
    other = [replace(rows[0], verdict="invalid"), replace(rows[1], model="llama-3-8b"), *rows[2:]]
    what = subject(replace(known.run, points=other), known=Coefficients())
    assert len(what.levels) == 6
    assert what.notes == ("1 of another model or scenario are left out", "1 invalid row is not fitted to")
    with pytest.raises(InputError, match="bf16:1: sim has no such point"):
        points.choose(what, "bf16:1,awq:4,awq:16")


def test_suspect_rows_are_used_with_a_note(known: Subject) -> None:
    rows = [replace(row, verdict="suspect", verdict_reasons=("drifting",)) for row in known.run.points]
    what = subject(replace(known.run, points=rows), known=Coefficients())
    found = calibrate.calibrate(what, points.choose(what))
    assert found.notes[0] == "bf16-c1-r1 is suspect (drifting)"
    assert len(found.notes) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {"model": "qwen2.5-1.5b"}, "scenario": {"name": "c", "turns": 3}}, "cannot be predicted"),
        ({"scenario": {"name": "t", "arrivals": "trace"}}, "a trace has one load"),
        ({"settings": {"model": "no-such"}}, "neither a known shape"),
    ],
)
def test_runs_that_cannot_be_calibrated(known: Subject, changes: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        subject(replace(known.run, **changes), known=Coefficients())  # type: ignore[arg-type]


def test_a_card_must_be_named(known: Subject) -> None:
    rows = [replace(row, gpu=None) for row in known.run.points]
    with pytest.raises(InputError, match="does not say on which card"):
        subject(replace(known.run, points=rows), known=Coefficients())
    assert subject(replace(known.run, points=rows), "t4", known=Coefficients()).server.card.id == "t4"
    with pytest.raises(InputError, match="was predicted"):
        subject(replace(known.run, points=[replace(row, source="predicted") for row in rows]), "l4")


# --- which points -----------------------------------------------------------------------------------------------------


def chosen(what: Subject, **options: object) -> list[tuple[str, int]]:
    return [(row.precision, row.conc) for row in points.choose(what, **options)]  # type: ignore[arg-type]


def test_points_are_spread(known: Subject) -> None:
    """Loads 1 to 64: three lie at 1, 8 and 64; awq has 4 and 16, equally far from 8 in logs, and the first is taken."""
    assert chosen(known) == [("bf16", 1), ("awq", 4), ("bf16", 64)]
    assert chosen(known, points=4) == [("bf16", 1), ("awq", 4), ("bf16", 16), ("awq", 64)]
    assert chosen(known, use=" awq:16,bf16:1,awq:64") == [("awq", 16), ("bf16", 1), ("awq", 64)]


def test_no_point_is_taken_twice(known: Subject) -> None:
    """Of 1, 1000, 1001 and 1002 users all four: 10 is nearest to 1, which is taken."""
    levels = tuple(replace(known.levels[0], conc=conc) for conc in (1, 1000, 1001, 1002))
    assert sorted(chosen(replace(known, levels=levels), points=4)) == [("bf16", n) for n in (1, 1000, 1001, 1002)]


def test_valid_points_come_before_suspect_ones(known: Subject) -> None:
    levels = tuple(replace(row, verdict="suspect") if row.conc == 64 else row for row in known.levels)
    assert chosen(replace(known, levels=levels)) == [("bf16", 1), ("awq", 4), ("bf16", 16)]


def test_too_few_points(known: Subject) -> None:
    few = replace(known, levels=known.levels[:2])
    with pytest.raises(InputError, match="2 usable points"):
        points.choose(few)
    with pytest.raises(InputError, match="2 points"):
        points.choose(known, "bf16:1,awq:1,bf16:1")
    with pytest.raises(InputError, match="--points 7"):
        points.choose(known, points=7)
    with pytest.raises(InputError, match="2 points for 3 factors"):
        calibrate.calibrate(known, few.levels)


def test_the_next_point_by_hand() -> None:
    """One factor, Σ = 1, s = 1; a cell with slope 0.07 for tok/s alone tells 0.07·(V⁻¹)₀₀·0.07 of it, and Σ' = 1 / (1 +
    that). Two factors: the others depend on the second, so the cell that tells of the second is next."""
    own = np.array([[0.07], [0], [0], [0]])
    inverse = np.linalg.inv(spread())[0, 0]
    assert after(own, np.array([[1.0]]), 1.0)[0, 0] == pytest.approx(1 / (1 + 0.0049 * inverse))
    assert after(own, np.array([[1.0]]), 2.0)[0, 0] == pytest.approx(1 / (1 + 0.0049 * inverse / 4))
    first, second = np.zeros((4, 2)), np.zeros((4, 2))
    first[:, 0], second[:, 1] = 1.0, 1.0
    assert points.narrowing([first, second, 2 * second, second], np.eye(2), 1.0) == 2
    assert points.mean_variance([first, second], np.diag([1.0, 3.0])) == pytest.approx(2.0)


def test_the_next_point_is_a_command(known: Subject) -> None:
    found = calibrate.calibrate(known, points.choose(known))
    best = points.next_point(known, found)
    assert best.band_then < best.band
    assert (best.cell.precision, float(best.cell.conc)) not in {(cell.precision, cell.load) for cell in found.cells}
    start = (
        "bench calibrate sim --use bf16:1,awq:4,bf16:64," if best.is_measured else "bench sweep --model qwen2.5-1.5b"
    )
    assert best.command.startswith(start)
    assert str(best.cell.conc) in best.command


def test_an_open_loop_has_rates(known: Subject) -> None:
    """Two requests a second at most: candidates down to 2/128 of one, and a command that says --rate."""
    scenario = replace(known.server.scenario, arrivals="poisson", warmup_s=1.0)
    rates = (0.5, 1.0, 2.0)
    rows = [replace(known.levels[0], conc=0, rate_rps=rate, arrivals="poisson") for rate in rates]
    server = replace(known.server, scenario=scenario)
    levels = [
        replace(row, **dict(zip(QUANTITIES, np.exp(server.predicted(TRUTH, cell_of(row))).tolist(), strict=True)))
        for row in rows
    ]
    what = replace(known, server=server, levels=tuple(levels))
    found = calibrate.calibrate(what, points.choose(what, "bf16:0.5,bf16:1,bf16:2"))
    assert [cell.load for cell in found.cells] == [0.5, 1.0, 2.0]
    best = points.next_point(what, found)
    assert best.cell.conc == 0
    assert best.cell.rate_rps is not None
    assert 2 / 128 <= best.cell.rate_rps < 2
    assert f"--arrivals poisson --rate {best.cell.rate_rps:.4g} --scenario chat" in best.command


# --- real runs of vLLM ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[Subject, Profile]:
    what = subject(load_run(RESULTS / "demo-until-p95-500ms"))
    return what, calibrate.calibrate(what, points.choose(what))


def test_three_points_tell_the_other_thirty(real: tuple[Subject, Profile]) -> None:
    """33 cells of vLLM on a processor. Seen: tok/s 5.7 %, p95 5.6 %, and 115 of 120 figures within their bands."""
    what, found = real
    assert [(cell.precision, cell.load) for cell in found.cells] == [("bf16", 1), ("awq", 8), ("gptq", 64)]
    rest = calibrate.held_out(what, found)
    errors = calibrate.medians(rest)
    assert len(rest) == 30
    assert errors["tok_s"] < 0.08
    assert errors["p95_ms"] < 0.08
    assert errors["ttft_p50_ms"] < 0.15
    held = [figure.lo <= (figure.measured or 0) <= figure.hi for row in rest for figure in row.figures.values()]
    assert 0.90 <= np.mean(held) <= 0.99


def test_a_model_that_computes(tmp_path: Path) -> None:
    """Qwen2.5-0.5B's shape on another processor. Seen: tok/s 4.3 %, p95 2.7 % of the five other cells."""
    console = Console(record=True, width=170, file=io.StringIO())
    found = calibration.run(console, RESULTS / "qwen2.5-0.5b-shape", out=tmp_path / "own.toml")
    what = subject(load_run(RESULTS / "qwen2.5-0.5b-shape"))
    errors = calibrate.medians(calibrate.held_out(what, found))
    assert errors["tok_s"] < 0.08
    assert errors["p95_ms"] < 0.08
    text = console.export_text()
    assert "fitted to bf16:1, awq:8, bf16:32 of qwen2.5-0.5b-shape" in text
    assert "Next: awq-c128 is not measured yet" in text
    assert "bench sweep --model shape:qwen2.5-0.5b --precisions awq --conc 128" in text
    assert profile.read(tmp_path / "own.toml") == found


def test_the_next_point_is_asked_of_an_engine_of_the_same_size(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "qwen2.5-0.5b-shape", tmp_path / "run")
    given = (tmp_path / "run" / "run.toml").read_text(encoding="utf-8")
    wider = given.replace("gpu_memory_utilization = 0.9", "gpu_memory_utilization = 0.9\nkv_cache_gib = 4.5")
    (tmp_path / "run" / "run.toml").write_text(wider, encoding="utf-8")
    what = subject(load_run(tmp_path / "run"))
    found = calibrate.calibrate(what, points.choose(what, None, 3))
    assert points.next_point(what, found).command.endswith("--kv-cache-gib 4.5")


# --- the file ---------------------------------------------------------------------------------------------------------


def own_profile() -> Profile:
    estimate = Estimate(names=tuple(PRIOR_PROCESSOR), logs=(0.1, 0.2, 0.3, 0.4, 0.5), scale=0.9, degrees=21.0,
                        covariance=tuple(map(tuple, np.diag([0.01, 0.04, 0.09, 0.16, 0.25]).tolist())))  # fmt: skip
    cell = profile.Fitted(precision='a"wq', load=2.5, verdict="valid", left={"tok_s": -0.02})
    return Profile(card=CPU, run_id="r", model="m\n[x]", scenario="s", day="", estimate=estimate, cells=(cell,) * 3,
                   notes=('says "no"',))  # fmt: skip


def test_a_profile_reads_back(tmp_path: Path) -> None:
    given = own_profile()
    profile.write(given, tmp_path / "p.toml")
    found = profile.read(tmp_path / "p.toml")
    assert found == given
    assert found.estimate.factors == Factors(*(math.exp(log) for log in (0.1, 0.2, 0.3, 0.4, 0.5)))
    assert found.estimate.sd("quantized") == pytest.approx(0.4)
    assert found.estimate.spread("host") == pytest.approx(math.exp(1.96 * 0.3))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("\n[estimate]\n", "\n[other]\n", r"\[estimate\] not there"),
        ("degrees = 21.0", "degrees = -1.0", r"\[estimate\]: degrees"),
        ("logs = [0.1, ", "logs = [", "do not fit each other"),
        ('names = ["bandwidth"', 'names = ["speed"', "do not fit each other"),
        ("logs = [0.1", "logs = [nan", "figures that are none"),
        ("[[0.01", "[[-0.01", "figures that are none"),
        ("memory_gib = 16.0", "memory_gib = 0.0", r"\[card\]: memory_gib"),
        ("[card]", "[card]\nspeed = 1", "unknown key 'speed'"),
        ('run_id = "r"', "", r"\[profile\]: run_id"),
        ("[profile]", "[profile", "Expected"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "p.toml"
    profile.write(own_profile(), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=told):
        profile.read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        profile.read(tmp_path / "none.toml")


@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b"])
def test_three_points_predict_runs_that_nobody_had_seen(shape: str) -> None:
    """Real vLLM 0.32 on a CPU of two cores, random weights, ten cells a run (tests/data/cpu_runs), measured after all
    of this was written: medians of 0.8 to 6.4 % for tok/s and 1.6 to 6.7 % for p95. The issue asked for 15 %."""
    what = subject(load_run(Path(__file__).parents[1] / "data" / "cpu_runs" / shape))
    found = calibrate.calibrate(what, points.choose(what))
    assert len(found.cells) == 3
    rest = calibrate.held_out(what, found)
    assert len(rest) == 7
    errors = calibrate.medians(rest)
    assert errors["tok_s"] < 0.09 and errors["p95_ms"] < 0.09
    figures = [figure for row in rest for figure in row.figures.values() if figure.measured is not None]
    assert sum(figure.lo <= figure.measured <= figure.hi for figure in figures) >= 0.9 * len(figures)  # type: ignore[operator]
