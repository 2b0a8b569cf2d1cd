"""The Dockerfile's rules, read from its text: nothing here can build it, and docs/container.md says so."""

from __future__ import annotations

import re
from pathlib import Path

from harness.engines.environment import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


def steps(text: str) -> list[tuple[str, str]]:
    """(instruction, what follows) of each step, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def dockerfile() -> list[tuple[str, str]]:
    return steps((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_the_base_is_an_argument_with_a_tag_that_stays() -> None:
    found = dict(dockerfile())
    images = [rest for word, rest in dockerfile() if word == "FROM"]
    assert images == ["${CUDA_IMAGE}"]
    image = next(rest for word, rest in dockerfile() if word == "ARG" and rest.startswith("CUDA_IMAGE="))
    assert re.fullmatch(r"CUDA_IMAGE=[\w/.-]+:\d[\w.-]*-devel-[\w.]+", image)
    assert "latest" not in str(found)


def test_it_does_not_run_as_root() -> None:
    words = [word for word, _ in dockerfile()]
    users = [rest for word, rest in dockerfile() if word == "USER"]
    assert users == ["bench"]
    as_root = [rest for word, rest in dockerfile()[: words.index("USER")] if word == "RUN"]
    assert not [rest for rest in as_root if "pip" in rest], "pip runs code of packages: never as root"
    assert dict(dockerfile())["ENTRYPOINT"] == '["bench"]'


def test_no_index_and_no_secret_is_in_it() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"https?://|index-url|PIP_INDEX|PIP_EXTRA|TOKEN|API_KEY|trusted-host", text)
    installs = [rest for word, rest in dockerfile() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2 and all("--mount=type=secret,id=pip" in rest for rest in installs)


def test_the_engine_is_a_layer_of_its_own_below_the_code_and_the_version_that_is_pinned() -> None:
    listed = dockerfile()
    engine = next(i for i, (word, rest) in enumerate(listed) if word == "RUN" and "${VLLM}" in rest)
    code = next(i for i, (word, _) in enumerate(listed) if word == "COPY")
    assert engine < code
    assert ("ARG", f"VLLM={PACKAGES['cuda'][0]}") in listed and len(PACKAGES["cuda"]) == 1
    assert "/cache/kneebench/engines/cuda" in listed[engine][1]
    assert "XDG_CACHE_HOME=/cache" in dict(listed)["ENV"]


def test_the_hubs_cache_and_the_results_outlive_the_container() -> None:
    found = dict(dockerfile())
    assert found["VOLUME"] == '["/cache/huggingface", "/work"]'
    assert "HF_HOME=/cache/huggingface" in found["ENV"] and found["WORKDIR"] == "/work"


def test_only_what_builds_it_is_sent() -> None:
    rules = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {
        "harness", "quantize", "scenarios", "pyproject.toml", "README.md", "LICENSE",
    }  # fmt: skip


def test_steps_are_read_as_docker_reads_them() -> None:
    assert steps("# a\nRUN a \\\n    && b\nUSER c\n") == [("RUN", "a && b"), ("USER", "c")]
