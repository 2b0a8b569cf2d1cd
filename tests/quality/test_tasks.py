"""Public tasks without lm-eval: a stand-in that writes what lm-eval 0.4.13 writes, and logs made by hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.engines import Target
from harness.errors import InputError, MissingTool, RecordError, RunError
from harness.quality import lm_eval
from harness.quality.tasks import Asked, check_same, check_tasks, read_asked, read_samples, run_tasks
from harness.records import Sample, read_table, write_table

KEY = "kneebench-Qx3uRm9sLw2vTz7yHc5bNd8fGj4kPa1e"
TARGET = Target("http://127.0.0.1:8000", "kneebench", KEY)
MAIN = """
import json, os, sys
from pathlib import Path
told = Path(__file__).with_name("told.json")
if "-c" in sys.argv:
    if "-I" in sys.argv:
        print(json.dumps(VERSIONS))
    else:
        print("a banner")
        print(json.dumps(["gsm8k", "mmlu", "mmlu_anatomy"]))
    sys.exit()
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
told.write_text(json.dumps({"argv": sys.argv, "config": config, "env": dict(os.environ)}))
"""
"""What each stand-in begins with: it answers lm_eval.find and known_tasks, and tells how it was called."""
WRITES = """
print("Requesting API:  50%|#####     | 1/2 [00:01<00:01]", end="\\r")
print("Requesting API: 100%|##########| 2/2 [00:02<00:00]")
out = Path(config["output_path"]) / "kneebench"
out.mkdir(parents=True)
stamp = "2026-01-02T03-04-05.678901"
for part, lines in PARTS.items():
    (out / f"samples_{part}_{stamp}.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
summary = {
    "lm_eval_version": "0.4.13",
    "versions": {part: 3.0 for part in PARTS},
    "n-shot": {part: 5 for part in PARTS},
    "n-samples": {part: {"original": 9, "effective": 2} for part in PARTS},
    "results": {part: {"acc,none": 0.5} for part in PARTS},
    "pretty_env_info": "a machine", "date": 1.5,
}
(out / f"results_{stamp}.json").write_text(json.dumps(summary))
"""


def line(doc_id: int, filter: str = "none", **metrics: Any) -> dict[str, Any]:
    """A line of lm-eval's log."""
    return {
        "doc_id": doc_id,
        "doc": {"question": f"What is {doc_id} + 1?"},
        "target": str(doc_id + 1),
        "arguments": {"gen_args_0": {"arg_0": "a long prompt", "arg_1": {"until": ["\n"]}}},
        "resps": [["3"]],
        "filtered_resps": ["3"],
        "filter": filter,
        "metrics": list(metrics),
        "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}",
        "target_hash": f"t{doc_id}",
        **metrics,
    }


StandIn = Callable[..., Path]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    """`stand_in(code)`: an executable in place of the interpreter that has lm-eval."""

    def make(code: str = WRITES, versions: object = ("0.4.13", []), parts: object = None) -> Path:
        path = tmp_path / "python"
        parts = parts or {"gsm8k": [line(0, acc=1.0), line(1, acc=0.0)]}
        main = f"#!{sys.executable}\nVERSIONS = {versions!r}\nPARTS = {parts!r}\n{MAIN}{code}"
        path.write_text(main, encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def told(python: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(python.with_name("told.json").read_text())
    return found


def write_log(
    home: Path, lines: list[dict[str, Any]], task: str = "gsm8k", part: str = "gsm8k", **summary: Any
) -> Path:
    """A log as run_tasks keeps it."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"samples_{part}.jsonl"
    path.write_text("".join(json.dumps(item | {"task": task, "part": part}) + "\n" for item in lines))
    kept = {
        "lm_eval_version": "0.4.13",
        "versions": {part: 3.0},
        "n-shot": {part: 5},
        "n-samples": {part: {"original": 9, "effective": len(lines)}},
    }
    (home / "results.json").write_text(json.dumps(kept | summary))
    return path


# --- running ----------------------------------------------------------------------------------------------------------


def test_what_is_asked_and_what_is_kept(tmp_path: Path, stand_in: StandIn) -> None:
    python, status = stand_in(), list[str]()
    logs = run_tasks(
        TARGET,
        ["gsm8k"],
        out_dir=tmp_path / "tasks",
        tokenizer=tmp_path,
        fewshot=5,
        limit=2,
        include=tmp_path,
        seed=7,
        concurrency=3,
        python=python,
        on_status=status.append,
    )
    assert status == ["gsm8k: lm-eval starts"] + [f"gsm8k: asking ({n} of 2)" for n in (1, 2)]
    config = told(python)["config"]
    assert config["model"] == "local-completions" and config["apply_chat_template"] is True
    assert config["model_args"] | {"max_length": 0, "timeout": 0} == {
        "model": "kneebench",
        "base_url": "http://127.0.0.1:8000/v1/completions",
        "tokenizer": str(tmp_path),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 3,
        "seed": 7,
        "max_length": 0,
        "timeout": 0,
    }
    assert config["model_args"]["max_length"] > 10_000_000, "else lm-eval cuts long prompts and says nothing"
    assert (config["tasks"], config["num_fewshot"], config["limit"], config["seed"]) == (["gsm8k"], 5, 2, 7)
    assert config["include_path"] == str(tmp_path)

    assert logs == [tmp_path / "tasks" / "gsm8k" / "samples_gsm8k.jsonl"]
    first, second = map(json.loads, logs[0].read_text().splitlines())
    assert first["arguments"] and "arguments" not in second, "of the prompts, the first is kept"
    assert second["doc"] == {"question": "What is 1 + 1?"} and second["prompt_hash"] == "p1"
    summary = json.loads((logs[0].parent / "results.json").read_text())
    assert summary["results"] == {"gsm8k": {"acc,none": 0.5}}
    assert "pretty_env_info" not in summary and "date" not in summary
    assert read_samples(logs, "awq") == [
        Sample("gsm8k", "0", "awq", "acc", 1.0),
        Sample("gsm8k", "1", "awq", "acc", 0.0),
    ]
    assert read_asked(logs) == [Asked("gsm8k", "gsm8k", "3.0", 5, 2, "0.4.13")]


def test_the_key_goes_by_the_environment_alone(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-users-own-000000")
    monkeypatch.setenv("NO_PROXY", "inner.example")
    python = stand_in()
    run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "a", tokenizer=None, python=python)
    seen = told(python)
    assert seen["env"]["OPENAI_API_KEY"] == KEY
    assert KEY not in json.dumps([seen["argv"], seen["config"]])
    assert "HF_ALLOW_CODE_EVAL" not in seen["env"], "nobody gave leave to execute what the model wrote"
    assert seen["env"]["NO_PROXY"] == "inner.example,127.0.0.1,localhost,::1"

    keyless = Target("http://10.0.0.9:8000", "m")
    run_tasks(keyless, ["gsm8k"], out_dir=tmp_path / "b", tokenizer=None, python=python)
    assert told(python)["env"]["OPENAI_API_KEY"] == "", "the user's key for another service is not sent to this one"


def test_without_a_tokenizer_it_asks_by_chat(tmp_path: Path, stand_in: StandIn) -> None:
    python = stand_in(versions=("0.4.13", ["transformers"]))
    run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=python)
    config = told(python)["config"]
    assert config["model"] == "local-chat-completions"
    assert config["model_args"]["base_url"] == "http://127.0.0.1:8000/v1/chat/completions"
    assert "tokenizer" not in config["model_args"]
    with pytest.raises(InputError, match="name its tokenizer"):
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path, tokenizer=None, chat=False, python=python)


def test_logs_hold_neither_key_nor_paths(tmp_path: Path, stand_in: StandIn) -> None:
    odd = line(0, acc=1.0) | {"doc": {"text": f"see\n{Path.home()}/data, password: abcdefgh\\ and {KEY}"}}
    python = stand_in(parts={"gsm8k": [odd, line(1, acc=1.0)]})
    (log,) = run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=python)
    text = log.read_text()
    assert str(Path.home()) not in text and KEY not in text and "abcdefgh" not in text
    assert json.loads(text.splitlines()[0])["doc"]["text"].startswith("see\n<home>/data")


def test_a_task_that_is_there_is_not_asked_again(tmp_path: Path, stand_in: StandIn) -> None:
    python = stand_in()
    out = tmp_path / "tasks"
    logs = run_tasks(TARGET, ["gsm8k"], out_dir=out, tokenizer=None, limit=2, python=python)
    python.with_name("told.json").unlink()
    assert run_tasks(TARGET, ["gsm8k"], out_dir=out, tokenizer=None, limit=2, python=python) == logs
    assert not python.with_name("told.json").exists()
    with pytest.raises(InputError, match="there with limit 2"):
        run_tasks(TARGET, ["gsm8k"], out_dir=out, tokenizer=None, limit=3, python=python)


def test_a_group_is_pooled_under_its_name(tmp_path: Path, stand_in: StandIn) -> None:
    parts = {"mmlu_law": [line(0, acc=1.0, acc_norm=0.0)], "mmlu_anatomy": [line(0, acc=0.0, acc_norm=0.0)]}
    python = stand_in(parts=parts)
    logs = run_tasks(TARGET, ["mmlu"], out_dir=tmp_path / "tasks", tokenizer=None, python=python)
    assert [log.name for log in logs] == ["samples_mmlu_anatomy.jsonl", "samples_mmlu_law.jsonl"]
    assert [(s.task, s.doc_id, s.metric, s.value) for s in read_samples(logs, "bf16")] == [
        ("mmlu", "mmlu_anatomy/0", "acc", 0.0),
        ("mmlu", "mmlu_anatomy/0", "acc_norm", 0.0),
        ("mmlu", "mmlu_law/0", "acc", 1.0),
        ("mmlu", "mmlu_law/0", "acc_norm", 0.0),
    ]


REFUSED = '[models.api_models:521] API request failed! Status code: 400, Response text: {"error":"%s"}. Retrying...'


@pytest.mark.parametrize(
    ("said", "expected", "remedy"),
    [
        (
            "ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)",
            "Couldn't reach 'openai/gsm8k'",
            "comes over the network",
        ),
        ("NotImplementedError: Loglikelihood is not supported for chat completions.", "Loglikelihood", "tokenizer"),
        ("ValueError: Attempted to run task: x which is marked as unsafe.", "unsafe", "executes what the model wrote"),
        (REFUSED % "maximum context length is 512 tokens", 'text: {"error"', "serve a longer context"),
        (REFUSED.replace("400", "401") % "Unauthorized", "Status code: 401", "check the key"),
        (
            "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 127.0.0.1:9",
            "Cannot connect",
            "server's own log",
        ),
        ("Killed", "Killed", ""),
    ],
)
def test_it_fails_with_lm_evals_own_words(
    tmp_path: Path, stand_in: StandIn, said: str, expected: str, remedy: str
) -> None:
    code = f"""
print("Traceback (most recent call last):")
print({said!r})
if "API request failed" in {said!r}:
    print("aiohttp.client_exceptions.ClientResponseError: 400, message='Bad Request'")
for _ in range(20):
    print("RuntimeError: Session is closed")
sys.exit(3)
"""
    code = code.replace("range(20)", "range(0)") if said == "Killed" else code
    with pytest.raises(RunError) as caught:
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=stand_in(code))
    text = str(caught.value)
    assert (
        "gsm8k (exit code 3)" in text
        and expected in text
        and "Session is closed" not in text
        and "ClientResponseError" not in text
    )
    assert (remedy in text) if remedy else ("To mend it" not in text)
    assert not (tmp_path / "tasks").exists(), "nothing is kept of a task that failed"


def test_an_error_holds_no_key(tmp_path: Path, stand_in: StandIn) -> None:
    code = f"print(\"ValueError: headers Authorization='Bearer {KEY}'\"); sys.exit(1)"
    with pytest.raises(RunError) as caught:
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=stand_in(code))
    assert KEY not in str(caught.value) and "<key>" in str(caught.value)


def test_who_is_interrupted_leaves_no_lm_eval_behind(tmp_path: Path, stand_in: StandIn) -> None:
    code = """
import time
Path(__file__).with_name("pid").write_text(str(os.getpid()))
print("Requesting API: 50% 1/2 [", flush=True)
time.sleep(60)
"""

    def interrupt(text: str) -> None:
        if "1 of 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "a", tokenizer=None, python=stand_in(code), on_status=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_end_without_files_is_a_failure(tmp_path: Path, stand_in: StandIn) -> None:
    with pytest.raises(RunError, match="without a result"):
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=stand_in("pass"))
    lost = WRITES + '\n(out / f"samples_gsm8k_{stamp}.jsonl").unlink()\n'
    with pytest.raises(RecordError, match="cannot be read"):
        run_tasks(TARGET, ["gsm8k"], out_dir=tmp_path / "tasks", tokenizer=None, python=stand_in(lost))
    assert not (tmp_path / "tasks" / "gsm8k" / "results.json").exists()


def test_what_is_not_installed(tmp_path: Path, stand_in: StandIn) -> None:
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\necho PackageNotFoundError >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(MissingTool, match=r'has none(?s:.*)pip install "kneebench\[tasks\]"'):
        lm_eval.find(bare)
    with pytest.raises(MissingTool, match="has none"):
        lm_eval.find(tmp_path / "nowhere")
    with pytest.raises(MissingTool, match="0.4.12 is too old(?s:.*)0.4.13 or newer"):
        lm_eval.find(stand_in(versions=("0.4.12", [])))
    with pytest.raises(MissingTool, match="without aiohttp"):
        lm_eval.find(stand_in(versions=("0.5", ["aiohttp", "transformers"])))
    assert lm_eval.find(stand_in(versions=("0.4.13", ["transformers"]))).version == "0.4.13"
    with pytest.raises(MissingTool, match="without transformers"):
        lm_eval.find(stand_in(versions=("0.4.13", ["transformers"])), tokenizer=True)


def test_unknown_tasks_are_told_before_anything_starts(tmp_path: Path, stand_in: StandIn) -> None:
    python = stand_in()
    check_tasks(["gsm8k", "mmlu"], None, python)
    with pytest.raises(InputError, match=r"no task 'gsm9k': did you mean gsm8k\?(?s:.*)the 3 of"):
        check_tasks(["gsm8k", "gsm9k"], None, python)
    with pytest.raises(InputError, match="no such directory"):
        check_tasks(["gsm8k"], tmp_path / "nowhere", python)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_main_verdict_comes_first_and_filters_have_names(tmp_path: Path) -> None:
    """gsm8k writes all documents under its first filter, then all under its second."""
    lines = [
        line(0, "strict-match", exact_match=0.0),
        line(1, "strict-match", exact_match=1.0),
        line(0, "flexible-extract", exact_match=1.0),
        line(1, "flexible-extract", exact_match=True),
    ]
    samples = read_samples([write_log(tmp_path, lines)], "bf16")
    assert [(s.doc_id, s.metric, s.value) for s in samples] == [
        ("0", "exact_match,strict-match", 0.0),
        ("0", "exact_match,flexible-extract", 1.0),
        ("1", "exact_match,strict-match", 1.0),
        ("1", "exact_match,flexible-extract", 1.0),
    ]
    write_table(tmp_path / "samples.csv", samples, Sample)
    assert read_table(tmp_path / "samples.csv", Sample) == samples


def test_metrics_that_are_neither_0_nor_1_are_left_out(tmp_path: Path) -> None:
    """f1 is 1 for one document and 0.4 for the other: it is graded, and goes for both."""
    lines = [line(0, f1=1.0, exact_match=1.0, list=[1, 0]), line(1, f1=0.4, exact_match=0.0, list=[0, 0])]
    samples = read_samples([write_log(tmp_path, lines)], "bf16")
    assert [(s.doc_id, s.metric) for s in samples] == [("0", "exact_match"), ("1", "exact_match")]
    with pytest.raises(RecordError, match=r"it has bleu, f1\)"):
        read_samples([write_log(tmp_path, [line(0, f1=0.3, bleu=7.2)])], "bf16")
    with pytest.raises(RecordError, match="no document"):
        read_samples([write_log(tmp_path, [])], "bf16")


def test_a_broken_log_is_named(tmp_path: Path) -> None:
    path = write_log(tmp_path, [line(0, acc=1.0)])
    path.write_text(path.read_text() + '{"doc_id": 1, "do')
    with pytest.raises(RecordError, match="samples_gsm8k.jsonl line 2"):
        read_samples([path], "bf16")


def test_the_same_question_may_be_answered_otherwise(tmp_path: Path) -> None:
    base = write_log(tmp_path / "bf16", [line(0, acc=1.0), line(1, acc=1.0)])
    other = write_log(tmp_path / "awq", [line(1, acc=0.0), line(0, acc=1.0)])
    check_same({"bf16": [base], "awq": [other]})
    check_same({"bf16": [base]})


@pytest.mark.parametrize("name", ["doc_hash", "prompt_hash", "target_hash", "filter"])
def test_another_question_is_found(tmp_path: Path, name: str) -> None:
    base = write_log(tmp_path / "bf16", [line(0, acc=1.0), line(1, acc=1.0)])
    same = write_log(tmp_path / "awq", [line(0, acc=1.0), line(1, acc=1.0)])
    other = write_log(tmp_path / "gptq", [line(0, acc=1.0), line(1, acc=1.0) | {name: "other"}])
    with pytest.raises(RecordError, match="gptq was not asked the same as bf16: document 1 of gsm8k"):
        check_same({"bf16": [base], "awq": [same], "gptq": [other]})


@pytest.mark.parametrize("change", [{"versions": {"gsm8k": 2.0}}, {"n-shot": {"gsm8k": 0}}, {"lm_eval_version": "0.5"}])
def test_another_version_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    base = write_log(tmp_path / "bf16", [line(0, acc=1.0)])
    other = write_log(tmp_path / "awq", [line(0, acc=1.0)], **change)
    with pytest.raises(RecordError, match="awq was not asked the same as bf16: only one of them has gsm8k"):
        check_same({"bf16": [base], "awq": [other]})


def test_a_missing_document_is_found(tmp_path: Path) -> None:
    base = write_log(tmp_path / "bf16", [line(0, acc=1.0), line(1, acc=1.0)])
    other = write_log(tmp_path / "awq", [line(0, acc=1.0)])
    with pytest.raises(RecordError, match="2 documents|1 documents"):
        check_same({"bf16": [base], "awq": [other]})
    with pytest.raises(RecordError):
        check_same({"bf16": [base], "awq": []})
