"""lm-eval as a program beside us: found, asked what it knows, run against a served endpoint.

Its interpreter may be another than ours, and nothing of it is imported; only its output and its files are read. Its
command line and logs are no stable interface, so what is known of them stands here and in `tasks.py`, nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.engines import Target
from harness.errors import InputError, MissingTool, RunError
from harness.processes import run_lines
from harness.redact import hide, redact

OLDEST = (0, 4, 13)
"""The oldest lm-eval that this was tried with."""
INSTALL = 'pip install "kneebench[tasks]"'

_ASK_VERSIONS = """
import importlib.metadata, importlib.util, json
names = ("aiohttp", "requests", "tenacity", "transformers")
print(json.dumps([importlib.metadata.version("lm_eval"), [n for n in names if importlib.util.find_spec(n) is None]]))
"""
_ASK_TASKS = """
import json, sys
from lm_eval.tasks import TaskManager
print(json.dumps(sorted(TaskManager(include_path=sys.argv[1] or None).all_tasks)))
"""
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Exit)\b(?!: Session is closed)")
"""The last line of a traceback; but not of those that requests under way leave when the first has failed."""
_REFUSED = re.compile(r"API request failed.*?(Status code: .*?|error message: .*?)(?:\. Retrying|$)")
_PROGRESS = re.compile(r"Requesting API:.*?(\d+)/(\d+)")

_REMEDIES = (
    (
        r"Couldn't reach .* on the Hub|couldn't connect to|LocalEntryNotFound|OfflineModeIsEnabled|name resolution",
        "the data set, or the tokenizer, comes over the network, and there is none: run it once where there is one and "
        "carry over its cache (HF_HOME), or name a task over local files with --include",
    ),
    (
        r"Loglikelihood is not supported for chat completions",
        "this task compares the likelihood of given answers, for which the model's tokenizer must be known: "
        "give the model's directory or name",
    ),
    (
        r"marked as unsafe|code_eval",
        "choose another: this task executes what the model wrote, unguarded, which kneebench never does; "
        "the code prompts of `bench failures` are executed in a sandbox",
    ),
    (r"chat_template is not set|No chat template", "the model has no chat template: ask it without one"),
    (
        r"maximum context length|max_model_len",
        "serve a longer context (--max-model-len), or ask with fewer examples (--fewshot)",
    ),
    (r"Status code: 40[13]", "check the key in the environment (KNEEBENCH_API_KEY)"),
    (r"Cannot connect to host|ServerDisconnected", "look at the server's own log: it no longer answers"),
)
"""What lm-eval says, and what to do; the first that fits."""


@dataclass(frozen=True, slots=True)
class LmEval:
    """An interpreter that has lm-eval."""

    python: Path
    version: str


def find(python: Path | None = None, *, tokenizer: bool = False) -> LmEval:
    """lm-eval in `python` (None: ours). Raises MissingTool where it, or what it needs to read a tokenizer, is not."""
    where = Path(os.path.abspath((python or Path(sys.executable)).expanduser()))
    try:
        reply = subprocess.run([where, "-I", "-c", _ASK_VERSIONS], capture_output=True, text=True, timeout=60)
        version, missing = json.loads(reply.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise MissingTool(f"Public tasks need lm-eval, and {where} has none.", remedy=INSTALL) from error
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingTool(f"lm-eval {version} is too old.", remedy=f"{INSTALL}, which brings {oldest} or newer")
    needed = [name for name in missing if tokenizer or name != "transformers"]
    if needed:
        raise MissingTool(f"lm-eval is installed without {', '.join(needed)}.", remedy=INSTALL)
    return LmEval(where, version)


def known_tasks(found: LmEval, include: Path | None) -> list[str]:
    """Names of all tasks, groups and tags (14,000), those of `include` among them; takes some 6 s."""
    command = [str(found.python), "-c", _ASK_TASKS, str(include.absolute()) if include else ""]
    reply = subprocess.run(command, capture_output=True, text=True, env=_environment(None))
    try:
        names: list[str] = json.loads(reply.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        lines = [line for line in reply.stderr.splitlines() if line.strip()] or ["(nothing)"]
        said = next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])
        raise InputError(f"lm-eval cannot list its tasks. It says:\n    {redact(said)[:500]}") from error
    return names


def run(
    found: LmEval, config: Path, name: str, target: Target, on_status: Callable[[str], None] = lambda _: None
) -> None:
    """Run lm-eval with a file of its settings, in which no key may stand. RunError with its own words when it fails.

    `name` is what it is about, for `on_status` and the error.
    """
    if target.api_key:
        hide(target.api_key)  # its log tells the headers of failed requests
    tail: deque[str] = deque(maxlen=6)
    refused = error = ""
    on_status(f"{name}: lm-eval starts")

    def read(line: str) -> None:
        nonlocal refused, error
        if line:
            tail.append(line)
        if bar := _PROGRESS.search(line):
            on_status(f"{name}: asking ({bar[1]} of {bar[2]})")
        if reason := _REFUSED.search(line):
            refused = reason[1]
        elif _ERROR.match(line):
            error = line

    code = run_lines([str(found.python), "-m", "lm_eval", "run", "--config", str(config)], _environment(target), read)
    if code != 0:
        lines = [refused or error] if refused or error else list(tail)
        said = "\n".join(f"    {redact(line)[:500]}" for line in lines) or "    (nothing)"
        remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, said)), "")
        raise RunError(f"lm-eval failed at {name} (exit code {code}). It says:\n{said}", remedy=remedy)


def _environment(target: Target | None) -> dict[str, str]:
    """Ours, with this server's key in place of any other, and without leave to execute what a model wrote."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "HF_ALLOW_CODE_EVAL", "HF_DATASETS_TRUST_REMOTE_CODE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    proxied = kept.get("NO_PROXY") or kept.get("no_proxy")
    direct = ",".join(filter(None, [proxied, "127.0.0.1", "localhost", "::1"]))  # no proxy before the loopback
    told = {"NO_PROXY": direct, "no_proxy": direct, "LMEVAL_LOG_LEVEL": "INFO"}
    # A file named datasets.py where we stand must not hide the package; nor are compiled files left beside the tasks.
    told |= {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **told, "OPENAI_API_KEY": (target.api_key if target else None) or ""}
