"""lm-eval itself against vLLM itself, over the demo model's held-out questions. Needs both; see conftest.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.engines import ServeSpec
from harness.engines.vllm import VllmServer
from harness.errors import InputError, MissingTool, RecordError, RunError
from harness.models import resolve
from harness.quality import lm_eval
from harness.quality.tasks import check_same, check_tasks, read_asked, read_samples, run_tasks

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

LOCAL = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has lm-eval: the one that KNEEBENCH_TASKS_PYTHON names, else ours."""
    named = os.environ.get("KNEEBENCH_TASKS_PYTHON")
    try:
        return lm_eval.find(Path(named) if named else None, tokenizer=True).python
    except MissingTool as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI promises lm-eval: {error}")
        pytest.skip(f"no lm-eval: {error}")


@pytest.fixture
def engine(serving: Callable[[ServeSpec], VllmServer]) -> VllmServer:
    return serving(ServeSpec(resolve("demo").path, "bf16", max_model_len=512, max_num_seqs=16, kv_cache_gib=0.25))


def test_names_are_checked(python: Path) -> None:
    check_tasks(["demo_answer", "gsm8k", "mmlu"], LOCAL, python)
    with pytest.raises(InputError, match="no task 'demo_answers'(?s:.*)demo_answer"):
        check_tasks(["demo_answers"], LOCAL, python)


def test_both_kinds_of_task(engine: VllmServer, python: Path, tmp_path: Path) -> None:
    tokenizer = resolve("demo").path
    tasks = ["demo_answer", "demo_choice"]
    logs = run_tasks(engine.target, tasks, out_dir=tmp_path / "a", tokenizer=tokenizer, include=LOCAL, python=python)
    assert [(asked.part, asked.fewshot, asked.documents) for asked in read_asked(logs)] == [
        ("demo_answer", 0, 300),
        ("demo_choice", 0, 300),
    ]
    samples = read_samples(logs, "bf16")
    shares = {}
    for task, metric in (("demo_answer", "exact_match"), ("demo_choice", "acc"), ("demo_choice", "acc_norm")):
        values = [sample.value for sample in samples if (sample.task, sample.metric) == (task, metric)]
        results = json.loads((tmp_path / "a" / task / "results.json").read_text())["results"]
        assert len(values) == 300
        assert sum(values) / 300 == pytest.approx(results[task][f"{metric},none"], abs=1e-12), "lm-eval's own mean"
        shares[metric] = sum(values) / 300
    # scenarios/demo-model/README.md: 99.3 % greedy in torch. A choice among four is easier; chance is 25 %.
    assert shares["exact_match"] == pytest.approx(0.993, abs=0.01)
    assert shares["acc"] > 0.97

    # By hand: acc is 1 where the likeliest of the echoed choices is the right one.
    for text in logs[1].read_text().splitlines():
        line = json.loads(text)
        likelihoods = [float(answer[0]) for answer in line["filtered_resps"]]
        assert len(set(likelihoods)) == 4 and max(likelihoods) <= 0
        assert line["acc"] == (likelihoods.index(max(likelihoods)) == int(line["target"]))
    assert str(Path.home()) not in "".join(log.read_text() for log in logs)

    # The server's own chat template must give the same answers as the tokenizer's.
    chat = run_tasks(
        engine.target, ["demo_answer"], out_dir=tmp_path / "c", tokenizer=None, include=LOCAL, python=python
    )
    share = sum(sample.value for sample in read_samples(chat, "bf16")) / 300
    assert share == pytest.approx(shares["exact_match"], abs=0.01)


def test_the_same_question_each_time(engine: VllmServer, python: Path, tmp_path: Path) -> None:
    def asked(name: str, fewshot: int, seed: int) -> list[Path]:
        return run_tasks(
            engine.target,
            ["demo_choice"],
            out_dir=tmp_path / name,
            tokenizer=resolve("demo").path,
            fewshot=fewshot,
            limit=5,
            seed=seed,
            include=LOCAL,
            python=python,
        )

    first = asked("first", 1, 0)
    check_same({"bf16": first, "awq": asked("again", 1, 0)})
    with pytest.raises(RecordError, match="document . of demo_choice is another, has another prompt"):
        check_same({"bf16": first, "awq": asked("other examples", 1, 1)})


def test_what_fails(engine: VllmServer, python: Path, tmp_path: Path) -> None:
    tokenizer = resolve("demo").path
    with pytest.raises(RunError, match="maximum context length(?s:.*)--fewshot"):
        run_tasks(
            engine.target,
            ["demo_answer"],
            out_dir=tmp_path,
            tokenizer=tokenizer,
            fewshot=40,
            limit=5,
            include=LOCAL,
            python=python,
        )
    with pytest.raises(RunError, match="the model's tokenizer must be known"):
        run_tasks(
            engine.target, ["demo_choice"], out_dir=tmp_path, tokenizer=None, limit=5, include=LOCAL, python=python
        )
    stranger = replace(engine.target, api_key="not-this-servers-key")
    with pytest.raises(RunError, match="401(?s:.*)check the key"):
        run_tasks(
            stranger, ["demo_answer"], out_dir=tmp_path, tokenizer=tokenizer, limit=5, include=LOCAL, python=python
        )
    assert list(tmp_path.iterdir()) == []
