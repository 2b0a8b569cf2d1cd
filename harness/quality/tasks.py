"""Public tasks (gsm8k, mmlu, ...) asked of a served endpoint by lm-eval, and its verdict on each document.

A model whose tokenizer is known is asked by `local-completions`, which serves tasks of both kinds: those that generate,
and those that compare the likelihood of given answers (vLLM echoes a prompt with its log-probabilities). Without one it
is asked by `local-chat-completions`, which can only generate.

lm-eval runs once a task, so that what is finished is finished, and two tasks that share a part do not collide. Its
logs are kept, a line a document. Precisions can be compared only if they were asked the same: `check_same` holds the
documents, the prompts with their few-shots, the right answers and the versions against each other.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.engines import Target
from harness.errors import InputError, RecordError, RunError
from harness.files import plain_name, write_whole
from harness.quality import lm_eval
from harness.records import Sample
from harness.redact import redact, redacted
from harness.suggest import did_you_mean

RESULTS = "results.json"

_NO_LIMIT = 1 << 30
"""lm-eval's max_length. A true one makes it cut long prompts without a word; so it is the server that refuses them."""
_PATIENCE_S = 3600
_KEPT = (
    "lm_eval_version",
    "versions",
    "n-shot",
    "n-samples",
    "task_hashes",
    "results",
    "groups",
    "group_subtasks",
    "higher_is_better",
)
"""Of lm-eval's own summary; the rest is about this machine, or the moment."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the documents of one part of a task were asked with; equal for every precision, or nothing is comparable."""

    task: str
    """As it was asked for: a task, or a group or tag of several."""
    part: str
    """lm-eval's own name: the task itself, or one of the group's."""
    version: str
    fewshot: int | None
    documents: int
    lm_eval_version: str


def check_tasks(tasks: Sequence[str], include: Path | None = None, python: Path | None = None) -> None:
    """Raises InputError for a task that lm-eval does not know: before a server is started, and within some 6 s."""
    if include is not None and not include.is_dir():
        raise InputError(f"--include {include}: no such directory", allowed="a directory of lm-eval's task files")
    known = lm_eval.known_tasks(lm_eval.find(python), include)
    for task in tasks:
        if task not in known:
            raise InputError(
                f"lm-eval knows no task {task!r}{did_you_mean(task, known)}",
                allowed=f"the {len(known):,} of `lm-eval ls tasks`",
                remedy="choose one of them, or name the directory of your own with --include",
            )


def run_tasks(
    target: Target,
    tasks: Sequence[str],
    *,
    out_dir: Path,
    tokenizer: Path | str | None,
    fewshot: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    seed: int = 0,
    concurrency: int = 8,
    chat: bool = True,
    python: Path | None = None,
    on_status: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Ask `target` all documents of the tasks (or the first `limit` of each); returns the logs, a line a document.

    They stay in out_dir/TASK/, with results.json, lm-eval's own summary; of the prompts they keep the first of each
    part and the hashes of all. A task that is there already is not asked again. `fewshot` None: as many examples as the
    task itself says. `chat` False: a base model, which has no chat template.
    Raises MissingTool, InputError, or RunError with lm-eval's own last words when it fails.
    """
    if tokenizer is None and not chat:
        raise InputError("A model without a chat template is asked by completions", remedy="name its tokenizer")
    found = lm_eval.find(python, tokenizer=tokenizer is not None)
    asked = {"fewshot": fewshot, "limit": limit, "seed": seed, "chat": chat}
    logs: list[Path] = []
    for task in tasks:
        home = out_dir / plain_name(re.sub(r"[^\w.+()-]", "_", task))
        if not _is_there(home, asked):
            with tempfile.TemporaryDirectory(prefix="kneebench-tasks-") as scratch:
                wanted = {
                    **_model(target, tokenizer, concurrency, seed),
                    "tasks": [task],
                    "include_path": str(include.absolute()) if include else None,
                    "num_fewshot": fewshot,
                    "limit": limit,
                    "seed": seed,
                    "apply_chat_template": chat,
                    "log_samples": True,
                    "output_path": str(Path(scratch) / "out"),
                }
                config = Path(scratch) / "config.yaml"
                config.write_text(json.dumps(wanted), encoding="utf-8")  # JSON is YAML
                lm_eval.run(found, config, task, target, on_status)
                _keep(Path(scratch) / "out", home, task, asked)
        logs += sorted(home.glob("samples_*.jsonl"))
    return logs


def read_samples(paths: Sequence[Path], precision: str) -> list[Sample]:
    """The verdicts on each document that are 0 or 1, its main one first: the first metric of the task's first filter.

    A metric is named as lm-eval does (acc, exact_match), with its filter where it has one (exact_match,strict-match).
    Documents of a group or tag are pooled under its name, as PART/NUMBER. Metrics with other values (f1, bleu) are left
    out, for the whole part. Raises RecordError for a log that cannot be read, or a part without any metric left.
    """
    samples = []
    for path in paths:
        verdicts: dict[str, dict[str, float]] = {}
        graded: set[str] = set()
        task = ""
        for line in _lines(path):
            task, number = line["task"], str(line["doc_id"])
            document = number if line["part"] == task else f"{line['part']}/{number}"
            for metric in line["metrics"]:
                label = metric if line["filter"] == "none" else f"{metric},{line['filter']}"
                if line[metric] in (0, 1):
                    verdicts.setdefault(document, {})[label] = float(line[metric])
                else:
                    graded.add(label)
        kept = [
            Sample(task, document, precision, metric, value)
            for document, found in verdicts.items()
            for metric, value in found.items()
            if metric not in graded
        ]
        if not kept:
            has = f"it has {', '.join(sorted(graded))}" if graded else "it has no document"
            raise RecordError(
                f"{path.name}: no metric says right or wrong of a document ({has})",
                remedy="choose a task with exact_match or acc",
            )
        samples += kept
    return samples


def read_asked(paths: Sequence[Path]) -> list[Asked]:
    """What each log's part was asked with, by lm-eval's summary beside it."""
    found = []
    for path in paths:
        first = next(_lines(path), None)
        if first is None:
            raise RecordError(f"{path.name}: no document in it", remedy="delete its directory and ask again")
        summary, part = _summary(path.parent / RESULTS), first["part"]
        found.append(
            Asked(
                task=first["task"],
                part=part,
                version=str(summary["versions"].get(part)),
                fewshot=summary["n-shot"].get(part),
                documents=summary["n-samples"][part]["effective"],
                lm_eval_version=summary["lm_eval_version"],
            )
        )
    return found


def check_same(logs: Mapping[str, Sequence[Path]]) -> None:
    """Raises RecordError unless all precisions (name -> logs) were asked the same as the first."""
    (baseline, first), *others = logs.items()
    asked, questions = set(read_asked(first)), _questions(first)
    for precision, paths in others:
        what = _first_odd(asked ^ set(read_asked(paths))) or _first_odd(questions ^ _questions(paths))
        if what:
            raise RecordError(
                f"{precision} was not asked the same as {baseline}: {what}",
                remedy="delete both results of that task and ask both with one lm-eval, one tokenizer and the same "
                "few-shots, limit and seed",
            )


# --- asking -----------------------------------------------------------------------------------------------------------


def _model(target: Target, tokenizer: Path | str | None, concurrency: int, seed: int) -> dict[str, Any]:
    """lm-eval's model and its arguments. The key goes by the environment."""
    arguments: dict[str, Any] = {
        "model": target.model,
        "num_concurrent": concurrency,
        "max_length": _NO_LIMIT,
        "timeout": _PATIENCE_S,
        "seed": seed,
    }
    if tokenizer is None:
        arguments["base_url"] = f"{target.base_url}/v1/chat/completions"
        return {"model": "local-chat-completions", "model_args": arguments}
    arguments["base_url"] = f"{target.base_url}/v1/completions"
    arguments["tokenizer"] = str(Path(tokenizer).absolute()) if Path(tokenizer).is_dir() else str(tokenizer)
    arguments["tokenizer_backend"] = "huggingface"
    return {"model": "local-completions", "model_args": arguments}


def _is_there(home: Path, asked: dict[str, Any]) -> bool:
    """Whether a task is finished. Raises InputError when it was asked otherwise."""
    if not (home / RESULTS).is_file():
        return False
    before = _summary(home / RESULTS)["asked"]
    if before != asked:
        told = ", ".join(f"{name} {value}" for name, value in before.items() if value != asked.get(name))
        raise InputError(f"{home}: this task is there with {told}", remedy="ask the same, or choose another --out")
    return True


def _keep(out: Path, home: Path, task: str, asked: dict[str, Any]) -> None:
    """Move what lm-eval wrote to where it stays, without this machine's paths; the summary last, as the seal."""
    summaries = list(out.glob("*/results_*.json"))
    if len(summaries) != 1:  # it only warns when it cannot write
        raise RunError(f"lm-eval ended at {task} without a result", remedy="see whether the disk is full")
    summary, stamp = _summary(summaries[0]), summaries[0].stem.removeprefix("results_")
    home.mkdir(parents=True, exist_ok=True)
    for part in summary["n-samples"]:
        lines = _lines(summaries[0].with_name(f"samples_{part}_{stamp}.jsonl"))
        text = "".join(_kept_line(line | {"task": task, "part": part}, number) for number, line in enumerate(lines))
        write_whole(home / f"samples_{part}.jsonl", text)
    kept = {"asked": asked} | redacted({name: summary.get(name) for name in _KEPT})
    write_whole(home / RESULTS, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _kept_line(line: dict[str, Any], number: int) -> str:
    """A line of JSON without paths and names. The prompts, kilobytes each with their few-shots, go after the first."""
    if number > 0:
        del line["arguments"]
    text = json.dumps(line, ensure_ascii=False)
    # Most lines have nothing to hide, and looking string by string takes ten times as long. An n of \n at the
    # beginning of a name would hide it from `redact`.
    plain = re.sub(r"\\[nrt]", " ", text)
    return (text if redact(plain) == plain else json.dumps(redacted(line), ensure_ascii=False)) + "\n"


# --- reading ----------------------------------------------------------------------------------------------------------


def _questions(paths: Sequence[Path]) -> set[tuple[str, ...]]:
    """Part, document and filter of each verdict, and the hashes of document, prompt and right answer."""
    return {
        (line["part"], str(line["doc_id"]), line["filter"], line["doc_hash"], line["prompt_hash"], line["target_hash"])
        for path in paths
        for line in _lines(path)
    }


def _first_odd(odd: set[Any]) -> str:
    """One of the things that only one side has, in words; "" where there is none."""
    if not odd:
        return ""
    one = min(odd, key=str)
    if isinstance(one, Asked):
        told = f"{one.part}, version {one.version}, {one.fewshot} few-shots, {one.documents} documents"
        return f"only one of them has {told}, lm-eval {one.lm_eval_version}"
    return f"document {one[1]} of {one[0]} is another, has another prompt or another right answer, or is not there"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{path} line {number}: not JSON", remedy="delete its directory") from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})", remedy="check the directory") from error


def _summary(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read", remedy="delete its directory and ask again") from error
    return found
