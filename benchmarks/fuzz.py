"""Millions of odd inputs for every reader of bytes that somebody else wrote (tests/fuzz/targets.py).

    python benchmarks/fuzz.py --inputs 10_000_000 --out DIR        all targets, in rounds; DIR/rounds.jsonl grows
    python benchmarks/fuzz.py --inputs 100_000 --target events     one of them
    python benchmarks/fuzz.py --table DIR                          the table of what was done so far

Each target runs in a process of its own, and each round has seeds of its own. Where atheris is installed, every tenth
round is guided by coverage: libFuzzer keeps what reaches a new branch, and our mutator (tests/fuzz/mutator.py) is one
of its own. The other rounds, and all without atheris, are by chance alone and can be repeated by their seed.

A crash is an error that the reader does not declare; slow is an input that takes more than a second of processor time;
an input that takes 20 s is stopped and counts as a hang, and so does a process that says nothing for two minutes. All
of them are kept in DIR/finds, one file for each place where it happened.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS = 10
GUIDED_EVERY = 10
SLOW_S = 1.0
HANG_S = 20.0
SILENT_S = 120.0
"""Code that never comes back to Python cannot be stopped from within: the parent ends such a process."""
INSTRUMENTED = ["harness", "quantize", "tomllib", "prometheus_client"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins after so many")
    parser.add_argument("--target", action="append", help="one of tests/fuzz/targets.py; may be repeated  [all]")
    parser.add_argument("--unguided", action="store_true", help="by chance alone, also where atheris is installed")
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    parser.add_argument("--table", type=Path, metavar="DIR")
    parser.add_argument("--child", nargs=4, metavar=("TARGET", "INPUTS", "SEED", "PIPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(args.table / "rounds.jsonl"))
    elif args.child:
        name, inputs, seed, pipe = args.child
        guided(name, int(inputs), int(seed), args.out, int(pipe))
    else:
        run(args.inputs, args.seconds, args.target, args.out, guided_every=None if args.unguided else GUIDED_EVERY)
        print(table(args.out / "rounds.jsonl"))


# --- rounds -----------------------------------------------------------------------------------------------------------


def run(
    inputs: int, seconds: float, names: list[str] | None, out: Path, *, guided_every: int | None = GUIDED_EVERY
) -> None:
    """Rounds over all targets until so many inputs are in the file, or the time is over. Goes on where it stopped."""
    from tests.fuzz.targets import TARGETS

    chosen = {name: TARGETS[name].share for name in names or TARGETS}
    rounds = out / "rounds.jsonl"
    (out / "finds").mkdir(parents=True, exist_ok=True)
    done = _read(rounds)
    began = time.monotonic()
    number = max((line["round"] for line in done), default=-1) + 1
    while sum(line["inputs"] for line in done) < inputs and time.monotonic() - began < seconds:
        for name, share in chosen.items():
            count = max(1, round(inputs / ROUNDS * share / sum(chosen.values())))
            guided = guided_every is not None and number % guided_every == guided_every - 1 and _can_guide()
            line = {"round": number, **_child(name, count, number, out, guided=guided)}
            with rounds.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        done, number = _read(rounds), number + 1


def _can_guide() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _child(name: str, inputs: int, number: int, out: Path, *, guided: bool) -> dict[str, Any]:
    """What a child says at last; of one that died or fell silent, what it said before that."""
    said: dict[str, Any] = {"target": name, "guided": guided, "inputs": 0, "cpu_s": 0.0}
    ours, theirs = os.pipe()
    # By chance alone: a fork has everything imported. Guided: what is to be instrumented must not be imported yet.
    if guided:
        command = [sys.executable, __file__, "--out", str(out), "--child", name, str(inputs), str(number), str(theirs)]
        process = subprocess.Popen(command, pass_fds=[theirs], stderr=subprocess.DEVNULL, cwd=ROOT)
        pid = process.pid
    elif (pid := os.fork()) == 0:
        by_chance(name, inputs, number, out, theirs)
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        while select.select([pipe], [], [], SILENT_S)[0] and (line := pipe.readline()):
            said |= json.loads(line)
        else:
            os.kill(pid, signal.SIGKILL)  # it is over, or will never be
    status = os.waitpid(pid, 0)[1]
    return said | ({} if said.get("over") else {"died": status})


# --- one target -------------------------------------------------------------------------------------------------------


class _Hang(BaseException):
    """Not an Exception: no reader may take it for an error of its own."""


class Watched:
    """A target that is counted and timed; what breaks it is kept and does not end the run."""

    def __init__(self, name: str, read: Callable[[bytes], None], finds: Path, pipe: int) -> None:
        self._name, self._read, self._finds, self._pipe = name, read, finds, pipe
        self.inputs, self.crashes, self.slow, self.hangs = 0, 0, 0, 0
        self.slowest_s, self.slowest_bytes = 0.0, 0
        self._began_s = time.process_time()
        self._input_began_s = self._began_s
        self._told_s = time.monotonic()
        signal.signal(signal.SIGVTALRM, self._look)
        signal.setitimer(signal.ITIMER_VIRTUAL, 1.0, 1.0)

    def _look(self, *_: object) -> None:
        if self._input_began_s and time.process_time() - self._input_began_s > HANG_S:
            raise _Hang

    def __call__(self, data: bytes) -> None:
        self._input_began_s = begin = time.process_time()
        try:
            self._read(data)
        except _Hang as error:
            self.hangs += 1
            self._keep("hang", data, error)
        except Exception as error:
            self.crashes += 1
            self._keep("crash", data, error)
        took_s = time.process_time() - begin
        self._input_began_s = 0.0
        self.inputs += 1
        if took_s > self.slowest_s:
            self.slowest_s, self.slowest_bytes = took_s, len(data)
        if took_s > SLOW_S:
            self.slow += 1
            self._keep("slow", data, TimeoutError())
        if self.inputs % 256 == 0 and time.monotonic() - self._told_s > 2:
            self.tell()

    def tell(self, *, over: bool = False) -> None:
        self._told_s = time.monotonic()
        figures = {
            "inputs": self.inputs, "cpu_s": time.process_time() - self._began_s, "crashes": self.crashes,
            "slow": self.slow, "hangs": self.hangs, "slowest_s": self.slowest_s, "slowest_bytes": self.slowest_bytes,
            "over": over,
        }  # fmt: skip
        os.write(self._pipe, json.dumps(figures).encode() + b"\n")

    def _keep(self, kind: str, data: bytes, error: BaseException) -> None:
        """One file for each place; the shortest input."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
        place = f"{Path(frames[-1].filename).stem}-{frames[-1].lineno}" if frames else "nowhere"
        path = self._finds / f"{self._name}-{kind}-{type(error).__name__}-{place}"
        if not path.exists() or len(data) < path.stat().st_size:
            path.write_bytes(data)
            said = "".join(traceback.format_exception(error))[-3000:]
            path.with_name(path.name + ".txt").write_text(said, encoding="utf-8", errors="replace")


def by_chance(name: str, inputs: int, seed: int, out: Path, pipe: int) -> None:
    """Run one target over so many inputs; its figures go into the pipe as lines of JSON."""
    from tests.fuzz.mutator import mutate
    from tests.fuzz.targets import TARGETS

    target, rng = TARGETS[name], random.Random(f"{name}/{seed}")
    seeds = target.seeds()
    watched = Watched(name, target.read, out / "finds", pipe)
    for data in seeds:
        watched(data)
    while watched.inputs < inputs:
        watched(mutate(rng, rng.choice(seeds), seeds, target.longest))
    watched.tell(over=True)


def guided(name: str, inputs: int, seed: int, out: Path, pipe: int) -> None:
    """The same under libFuzzer; ends the process."""
    import atheris  # type: ignore[import-untyped, unused-ignore]

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.mutator import mutate

    target = TARGETS[name]
    seeds = target.seeds()
    watched = Watched(name, target.read, out / "finds", pipe)

    def once(data: bytes) -> None:
        watched(data)
        if watched.inputs >= inputs:
            watched.tell(over=True)
            os._exit(0)  # libFuzzer has no other way to say that it is enough

    def change(data: bytes, longest: int, number: int) -> bytes:
        if number % 2:
            return bytes(atheris.Mutate(data, longest))
        return mutate(random.Random(number), data, seeds, longest)

    corpus = out / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for place, data in enumerate(seeds):
        (corpus / f"seed-{place}").write_bytes(data[: target.longest])
    flags = [f"-max_len={target.longest}", f"-seed={seed + 1}", "-rss_limit_mb=4096", f"-timeout={int(SILENT_S)}"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], once, custom_mutator=change)
    atheris.Fuzz()


# --- what came of it --------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path: Path) -> str:
    """Markdown: one line a target, and the sum."""
    columns = ("target", "inputs", "guided", "inputs/s of CPU", "crashes", "over 1 s", "hangs", "slowest")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    by_target = defaultdict(list)
    rounds = _read(path)
    for line in rounds:
        by_target[line["target"]].append(line)

    def total(rows: list[dict[str, Any]], key: str) -> Any:
        return sum(row.get(key, 0) for row in rows)

    for name, rows in [*by_target.items(), ("**all**", rounds)]:
        slowest = max(rows, key=lambda row: row.get("slowest_s", 0.0), default={})
        guided = total([row for row in rows if row["guided"]], "inputs")
        hangs = total(rows, "hangs") + sum("died" in row for row in rows)
        lines.append(
            f"| {name} | {total(rows, 'inputs'):,} | {guided:,} | "
            f"{total(rows, 'inputs') / max(1e-9, total(rows, 'cpu_s')):,.0f} | {total(rows, 'crashes'):,} | "
            f"{total(rows, 'slow'):,} | {hangs:,} | "
            f"{1e3 * slowest.get('slowest_s', 0.0):,.0f} ms ({slowest.get('slowest_bytes', 0):,} bytes) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
