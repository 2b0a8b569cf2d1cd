"""Real vLLM beside torch: the same text, the same checkpoints, two implementations that share no line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import fmean

import pytest

from harness import checkpoints, models
from harness.analysis.failures import failures, outcomes
from harness.analysis.quality import fidelity
from harness.engines.environment import EngineEnv
from harness.quality.directory import Quality, load_quality
from harness.quality.job import Part, QualityRequest, measure
from harness.quality.prompts import PromptSet, load_prompts, to_toml

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
PRECISIONS = ("bf16", "awq", "rtn-2bit")
TASKS = ("demo_answer",) if importlib.util.find_spec("lm_eval") else ()


class Quiet:
    def status(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def directory(engine_env: EngineEnv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    demo = load_prompts("demo")
    few = [
        prompt
        for category in ("factual", "reasoning", "code")
        for prompt in demo.prompts
        if prompt.category == category
    ]
    few = [prompt for index, prompt in enumerate(few) if index % 4 == 0]
    (folder / "few.toml").write_text(to_toml(PromptSet("few", tuple(few))))
    parts: tuple[Part, ...] = ("answers", "text", "tasks") if TASKS else ("answers", "text")
    request = QualityRequest(
        parts, precisions=PRECISIONS, prompts=str(folder / "few.toml"), out=folder / "q", window=128, texts=6,
        kv_cache_gib=0.5, engine_python=engine_env.python, tasks=TASKS, limit=30, include=HERE / "tasks",
    )  # fmt: skip
    return measure(request, Quiet())


@pytest.fixture(scope="module")
def found(directory: Path) -> Quality:
    quality = load_quality(directory)
    assert quality is not None
    return quality


def test_the_baseline_answers_and_two_bits_do_not(found: Quality) -> None:
    right = {
        name: fmean(bool(a.ok) for a in found.answers if (a.precision, a.round) == (name, 1)) for name in PRECISIONS
    }
    assert right["bf16"] >= 0.9  # its README says 99 %
    assert right["rtn-2bit"] <= 0.2  # and 2 %
    assert right["rtn-2bit"] < right["awq"] <= 1
    assert all(answer.error is None and len(answer.tokens) == len(answer.alternatives) > 0 for answer in found.answers)


def test_the_engine_repeats_itself_on_the_same_text(found: Quality) -> None:
    """What it changes by itself is measured, not taken for nothing: here it reads a text twice in another order."""
    repeat = [row for row in found.positions if row.precision == "bf16"]
    assert {row.round for row in repeat} == {2}
    assert max(row.kl_nats for row in repeat) < 1e-3
    assert found.prompts is not None
    own = [row for row in failures(found.prompts, found.answers, "bf16") if row.precision == "bf16"]
    assert len(own) == len(found.prompts.prompts)
    assert sum(row.quant_issue for row in own) <= len(own) // 10


def test_kl_is_what_torch_computes(found: Quality, directory: Path) -> None:
    """vLLM's kernels multiply in bfloat16, torch's here in float32: the two agree to what that rounds."""
    from quantize.fidelity import compare, load_dequantized, load_original

    ids = [json.loads(line)["ids"] for line in (directory / "texts.jsonl").read_text().splitlines()]
    original = load_original(models.resolve("demo").path)
    measured = {row.precision: row for row in fidelity([r for r in found.positions if r.precision != "bf16"])}
    for precision, tolerance in (("awq", 0.25), ("rtn-2bit", 0.03)):
        torch_says = compare(original, load_dequantized(checkpoint(precision)), ids)
        engine_says = measured[precision]
        assert engine_says.kl_nats == pytest.approx(torch_says.kl_nats, rel=tolerance), precision
        assert engine_says.agreement == pytest.approx(torch_says.top1_agreement, abs=0.02), precision
        assert engine_says.perplexity == pytest.approx(torch_says.perplexity_quantized, rel=0.02), precision
        assert engine_says.base_perplexity == pytest.approx(torch_says.perplexity_original, rel=0.01), precision


@pytest.mark.skipif(not TASKS, reason="lm-eval is not installed (kneebench[tasks])")
def test_public_tasks_are_paired_by_document(found: Quality) -> None:
    lines = outcomes(failures(found.prompts, found.answers, "bf16"), found.samples, "bf16")
    pairs = {line.precision: line for line in lines if line.family == "task:demo_answer"}
    assert pairs.keys() == {"awq", "rtn-2bit"}
    assert pairs["awq"].items == pairs["rtn-2bit"].items == 30
    assert pairs["awq"].base_right >= 28
    assert pairs["rtn-2bit"].right_to_wrong >= 20 > pairs["awq"].right_to_wrong


def checkpoint(precision: str) -> Path:
    return checkpoints.checkpoint(precision, None, models.resolve("demo"), None, lambda _: None)[0].path
