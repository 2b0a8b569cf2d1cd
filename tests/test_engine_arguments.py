"""What an engine is told beyond the usual: options, --engine-arg and --vary become one line, a spec and a cell."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import checkpoints, models
from harness.cli import main
from harness.engines import EngineInfo, ServeSpec
from harness.engines.arguments import placed, read, told, varied, written
from harness.engines.environment import EngineEnv
from harness.engines.vllm_command import command
from harness.engines.vllm_log import read_log
from harness.errors import InputError, ModelError
from harness.job import SweepRequest, engine_args
from harness.job import varied as variants_of
from harness.load.generators import LoadResult
from harness.load.workload import Dialect
from harness.records import Cell, Scenario, SweepPoint
from harness.sweep import Plan, Service, Variant, make_point, plan_sessions
from harness.telemetry.gpu import Gpu
from harness.telemetry.watch import Seen
from harness.variants import parse_vary

CUDA = EngineEnv(Path("/opt/engine/bin/python"), "cuda", "0.32.0", "2.13.0")
CHAT = Scenario("chat", input_tokens=100, output_tokens=20)


def request(**more: Any) -> SweepRequest:
    return SweepRequest(more.pop("scenario", CHAT), (1, 8), **more)


def spec_of(*args: str) -> ServeSpec:
    return placed(ServeSpec(Path("m"), "awq", max_model_len=512), args)


# --- one spelling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        ("--block-size", "32", "--kv-cache-dtype", "fp8"),
        ("--block-size=32", "--kv-cache-dtype=fp8"),
        ("--kv_cache_dtype fp8", "--block_size 32"),
        ("--kv-cache-dtype=fp8", "--block_size", "32"),
    ],
)
def test_however_it_is_typed_it_is_the_same_cell(items: tuple[str, ...]) -> None:
    assert told(("--engine-arg", read(items))) == ("--block-size", "32", "--kv-cache-dtype", "fp8")


def test_values_that_are_more_than_a_word() -> None:
    json = '{"method": "ngram", "num_speculative_tokens": 3}'
    assert read(["--speculative-config", json]) == [("--speculative-config", (json,))]
    assert read([f"--speculative-config={json}"]) == [("--speculative-config", (json,))]
    assert read(["--compilation-config.cudagraph_mode", "FULL"]) == [("--compilation-config.cudagraph_mode", ("FULL",))]
    assert read(["--lora-modules", "a=x", "b=y"]) == [("--lora-modules", ("a=x", "b=y"))]
    assert read(["--seed", "-1", "--x", "-0.5"]) == [("--seed", ("-1",)), ("--x", ("-0.5",))]
    assert read(["-tp", "2", "-pp=3"]) == [("--tensor-parallel-size", ("2",)), ("--pipeline-parallel-size", ("3",))]
    assert told(("--engine-arg", read(["--x=--y"]))) == ("--x=--y",), "a value that looks like a flag hangs on its own"
    assert read(told(("--engine-arg", read(["--x=--y", "--z"])))) == [("--x", ("--y",)), ("--z", ())]


@pytest.mark.parametrize("items", [("32",), ("fp8", "--kv-cache-dtype"), ("",)])
def test_a_value_without_a_flag(items: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="is no argument"):
        read(items)


@pytest.mark.parametrize(
    "flag",
    ["--port", "--host", "--api-key", "--api_key", "--model", "--served-model-name", "--ssl-keyfile", "--config",
     "--uds", "--por", "--served-mod"],
)  # fmt: skip
def test_what_kneebench_says_itself_is_refused(flag: str) -> None:
    for items in ([flag, "8000"], [f"{flag}=8000"], [f"{flag} 8000"]):
        with pytest.raises(InputError) as refused:
            read(["--block-size=32", *items])
        assert "kneebench says that itself" in str(refused.value) and refused.value.exit_code == 2
    with pytest.raises(InputError, match="--vary"):
        varied(((flag[2:].replace("-", "_"), "8000"),))


def test_flags_that_only_begin_alike_are_vllms() -> None:
    found = read(["--model-impl=vllm", "--config-format=hf", "--hf-config-path=x", "--uvicorn-log-level=info"])
    assert len(found) == 4


def test_a_switch_varies_by_its_no_form() -> None:
    assert varied((("enforce_eager", "true"), ("async_scheduling", "False"))) == [
        ("--enforce-eager", ()),
        ("--no-async-scheduling", ()),
    ]


def test_a_flag_that_is_said_twice() -> None:
    for one, two in ((["--enforce-eager"], (("enforce_eager", "false"),)), (["--x=1"], (("x", "2"),))):
        with pytest.raises(InputError, match="said twice, by --engine-arg and by --vary"):
            told(("--engine-arg", read(one)), ("--vary", varied(two)))


def test_rows_have_it_without_this_machines_paths_and_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuv")
    said = written(("--chat-template", "/home/ann/templates/mine own.jinja", "--x", "hf_abcdefghijklmnopqrstuv", "--y"))
    assert said == "--chat-template '<path>/mine own.jinja' --x <key> --y"
    assert written(()) is None


# --- into a spec ------------------------------------------------------------------------------------------------------


def test_what_a_spec_has_a_field_for_goes_there() -> None:
    found = spec_of(
        "--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--gpu-memory-utilization", "0.8",
        "--max-model-len", "4096", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3",
        "--kv-cache-dtype", "fp8", "--block-size", "32", "--enforce-eager",
    )  # fmt: skip
    assert found == ServeSpec(
        Path("m"), "awq", max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=2048, tensor_parallel=2,
        pipeline_parallel=3, kv_cache_dtype="fp8", gpu_memory_utilization=0.8,
        extra_args=("--block-size", "32", "--enforce-eager"),
    )  # fmt: skip
    assert found.cards == 6
    assert spec_of() == ServeSpec(Path("m"), "awq", max_model_len=512) and spec_of().cards == 1


@pytest.mark.parametrize(
    "args",
    [("--max-num-seqs", "0"), ("--max-num-seqs", "many"), ("--max-num-seqs",), ("--max-num-seqs", "1", "2"),
     ("--gpu-memory-utilization", "1.01"), ("--gpu-memory-utilization", "nan"), ("--max-model-len", "32k"),
     ("--tensor-parallel-size", "1.5")],
)  # fmt: skip
def test_values_that_a_field_cannot_have(args: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="cannot be") as refused:
        spec_of(*args)
    assert args[0] in str(refused.value) and refused.value.exit_code == 2


def test_the_command_line_says_each_once() -> None:
    line = command(spec_of("--max-num-seqs", "64", "--tensor-parallel-size", "2", "--kv-cache-dtype", "fp8",
                           "--max-num-batched-tokens", "2048", "--block-size", "32"), CUDA, 8000)  # fmt: skip
    text = " ".join(line)
    for flag in ("--max-num-seqs 64", "--tensor-parallel-size 2", "--kv-cache-dtype fp8", "--block-size 32",
                 "--max-num-batched-tokens 2048", "--max-model-len 512", "--gpu-memory-utilization 0.9"):  # fmt: skip
        assert text.count(flag) == 1 and line.count(flag.split()[0]) == 1
    assert "--pipeline-parallel-size" not in line, "what is not asked for is the engine's to choose"
    plain = command(spec_of(), CUDA, 8000)
    assert not {"--tensor-parallel-size", "--kv-cache-dtype", "--max-num-batched-tokens"} & set(plain)
    staged = command(spec_of("--pipeline-parallel-size", "4"), CUDA, 8000)
    assert staged[staged.index("--pipeline-parallel-size") + 1] == "4"


# --- into the plan of a sweep -----------------------------------------------------------------------------------------


def test_a_cell_holds_all_that_its_engine_is_told_beyond_the_usual() -> None:
    asked = request(
        max_num_seqs=32, tensor_parallel=2, kv_cache_dtype="fp8", engine_args=("--block-size=32",),
        scenario=replace(CHAT, max_model_len=2048), vary=parse_vary(["max_num_batched_tokens=512"]),
    )  # fmt: skip
    assert engine_args(asked, (("max_num_batched_tokens", "512"),)) == (
        "--block-size", "32", "--kv-cache-dtype", "fp8", "--max-model-len", "2048", "--max-num-batched-tokens", "512",
        "--max-num-seqs", "32", "--tensor-parallel-size", "2",
    )  # fmt: skip
    assert engine_args(request()) == (), "nothing beyond what every engine is told"
    assert engine_args(request(), (("max_num_seqs", "256"),)) == ("--max-num-seqs", "256"), "what varies is said always"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_num_seqs": 8, "vary": parse_vary(["max_num_seqs=2,4"])}, "--max-num-seqs is said twice, by an option"),
        ({"kv_cache_dtype": "fp8", "engine_args": ("--kv-cache-dtype", "auto")}, "--kv-cache-dtype is said twice"),
        ({"vary": parse_vary(["max_model_len=64,512"])}, "max_model_len = 64 is too short for this scenario"),
        ({"vary": parse_vary(["port=8000,8001"])}, "--vary --port: kneebench says that itself"),
        ({"vary": parse_vary(["max_num_seqs=0,1"])}, "--max-num-seqs 0 cannot be"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_started(more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        variants_of(request(**more), [Variant("bf16")])
    assert said in str(refused.value) and refused.value.exit_code == 2


def test_settings_take_turns_abba_with_the_precisions_of_one_setting_side_by_side() -> None:
    asked = request(vary=parse_vary(["tensor_parallel_size=1,2"]))
    variants = variants_of(asked, [Variant("bf16", "b", False, 9), Variant("awq", "a", True, 3)])
    one, two = "[tensor_parallel_size=1]", "[tensor_parallel_size=2]"
    assert [variant.precision for variant in variants] == [f"bf16{one}", f"awq{one}", f"bf16{two}", f"awq{two}"]
    assert [variant.cards for variant in variants] == [1, 1, 2, 2]
    assert variants[3] == Variant(f"awq{two}", "a", True, 3, ("--tensor-parallel-size", "2"), 2)
    sessions = [(session.variant.precision, session.repeat) for session in plan_sessions(variants, (1, 8), repeats=2)]
    names = [variant.precision for variant in variants]
    assert sessions == [*((name, 1) for name in names), *((name, 2) for name in reversed(names))]
    (first, *_) = plan_sessions(variants, (8,), repeats=1)
    assert first.cells[0].key == "bf16[tensor_parallel_size=1]-c8-r1"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--vary", "max_num_seqs"], "is no engine argument with values"),
        (["--vary", "max_num_seqs=2,4", "--max-num-seqs", "8"], "said twice"),
        (["--vary", "host=a,b"], "kneebench says that itself"),
        (["--engine-arg", "--port=1"], "kneebench says that itself"),
        (["--vary", "gpu_memory_utilization=0.5,0.9", "--engine", "simulated", "--gpu", "l4", "--kv-cache-gib", "2",
          "--model", "qwen2.5-1.5b"], "beside --kv-cache-gib"),
        (["--vary", "kv_cache_dtype=auto,fp8", "--engine", "simulated", "--gpu", "l4", "--model", "qwen2.5-1.5b"],
         "--kv-cache-dtype cannot be predicted"),
        (["--tensor-parallel", "2", "--engine", "simulated", "--gpu", "l4", "--model", "qwen2.5-1.5b"],
         "cannot be predicted"),
        (["--engine-arg=--block-size=32", "--engine", "simulated", "--gpu", "l4", "--model", "qwen2.5-1.5b"],
         "--block-size cannot be predicted"),
        (["--endpoint", "http://127.0.0.1:9", "--model", "x", "--vary", "max_num_seqs=2,4"], "--endpoint together"),
        (["--endpoint", "http://127.0.0.1:9", "--model", "x", "--tensor-parallel", "2"],
         "--endpoint together with --tensor-parallel-size"),
    ],
)  # fmt: skip
def test_on_the_command_line(
    typed: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", "--out", str(tmp_path / "run"), *typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_row_says_what_its_engine_was_told_and_is_priced_by_its_cards() -> None:
    """0.25 USD an hour for a card, two of them: 0.50 for the row."""
    told = ("--chat-template", "/home/ann/mine.jinja", "--tensor-parallel-size", "2")
    variant = Variant("awq[tensor_parallel_size=2]", engine_args=told, cards=2)
    engine: Any = SimpleNamespace(info=EngineInfo("vllm"))
    plan = Plan(replace(CHAT, usd_per_hour=0.25))
    blank = SweepPoint("run", variant.precision, 0)
    load = LoadResult((), None, None, ())
    point = make_point(Cell(variant.precision, 8), plan, blank, variant, Service(engine, Dialect()), load, Seen())
    assert point.engine_args == "--chat-template '<path>/mine.jinja' --tensor-parallel-size 2"
    assert point.usd_per_hour == 0.5
    alone = make_point(Cell("awq", 8), plan, blank, Variant("awq"), Service(engine, Dialect()), load, Seen())
    assert (alone.engine_args, alone.usd_per_hour) == (None, 0.25)


# --- does it fit ------------------------------------------------------------------------------------------------------


def cards(count: int, gib: float) -> tuple[Gpu, ...]:
    return tuple(Gpu(index, "Some RTX", gib, 0.5, "580", "13.0") for index in range(count))


def test_the_check_of_memory_knows_what_shares_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """10 GiB of weights and 1 MiB of cache a token. At 0.9 of 8 GiB, 7.2 GiB a card: one card is too small (10 + 2 GiB
    for 2,048 tokens); two hold 14.4 GiB; at 8,192 tokens 10 + 8 = 18 GiB are too many, with a cache of 8 bits 10 + 4 =
    14 GiB fit again; at a share of 0.8 the two hold 12.8 GiB, and 14 do not fit."""
    monkeypatch.setattr(models, "weight_bytes", lambda _: 10 * models.GIB)
    shape = type("Shape", (), {"kv_bytes_per_token": 2**20})()
    monkeypatch.setattr(models, "architecture", lambda _: shape)
    monkeypatch.setattr(models, "read_config", lambda _: {})
    model = models.Model("big", tmp_path)
    here: list[tuple[Gpu, ...]] = [cards(2, 8.0)]
    monkeypatch.setattr(checkpoints, "gpus", lambda: here[0])

    checkpoints.check_fits(model, 0.9, 2048, cards=2)
    with pytest.raises(ModelError, match="does not fit Some RTX: 10.0 GiB of weights"):
        checkpoints.check_fits(model, 0.9, 2048)
    with pytest.raises(ModelError, match="does not fit 2 times Some RTX: .* where 14.4 GiB may be used"):
        checkpoints.check_fits(model, 0.9, 8192, cards=2)
    checkpoints.check_fits(model, 0.9, 8192, cards=2, kv_cache_dtype="fp8_e4m3")
    with pytest.raises(ModelError):
        checkpoints.check_fits(model, 0.9, 8192, cards=2, kv_cache_dtype="auto")
    with pytest.raises(ModelError):
        checkpoints.check_fits(model, 0.8, 8192, cards=2, kv_cache_dtype="fp8")
    with pytest.raises(InputError, match="parallel is 4, and this machine has 2"):
        checkpoints.check_fits(model, 0.9, 2048, cards=4)
    here[0] = ()
    checkpoints.check_fits(model, 0.1, 8192, cards=4)  # no card here: everything may be tried


# --- the log of an engine on several cards ----------------------------------------------------------------------------

LOADED = "INFO 11-20 18:47:40 [gpu_model_runner.py:5149] Model loading took {} GiB memory and 9.123456 seconds"
CACHE = "INFO 11-20 18:47:52 [gpu_worker.py:759] Available KV cache memory: {} GiB"
SIZE = ("(EngineCore pid=101) INFO 11-20 18:47:53 [kv_cache_utils.py:2327] GPU KV cache size: {} tokens, Maximum "
        "concurrency for 1,024 tokens per request: {}x")  # fmt: skip


def log(*told: tuple[str, str, str]) -> str:
    """Lines of vLLM's own format strings: (process, GiB of weights, GiB of cache) of each that tells."""
    lines = [f"({process}) {line}" for process, weights, cache in told
             for line in (LOADED.format(weights), CACHE.format(cache))]  # fmt: skip
    return "\n".join([*lines, SIZE.format("146,944", "143.50")])


def test_cards_that_all_tell_are_summed() -> None:
    """Tensor parallel shares are equal, the stages of a pipeline are not: 5.29 + 5.29 and 3.10 + 4.05."""
    facts = read_log(log(("Worker_TP0 pid=102", "5.29", "7.85"), ("Worker_TP1 pid=103", "5.29", "7.85")), cards=2)
    assert facts.weights_gib == pytest.approx(10.58) and facts.kv_cache_gib == pytest.approx(15.7)
    assert facts.kv_cache_tokens == 146_944 and facts.max_concurrency == 143.5, "of the engine, not of a card"
    assert facts.taken_alike is None
    facts = read_log(log(("Worker_PP0 pid=102", "3.10", "9"), ("Worker_PP1 pid=103", "4.05", "8")), cards=2)
    assert facts.weights_gib == pytest.approx(7.15) and facts.kv_cache_gib == pytest.approx(17)
    older = log(("VllmWorker rank=1 pid=3275251", "5", "7"), ("VllmWorker rank=0 pid=3275250", "5", "7"))
    assert read_log(older, cards=2).weights_gib == 10


def test_where_the_first_card_alone_tells_the_others_are_taken_to_be_like_it() -> None:
    """vLLM 0.32 logs both by info_once, which only the first process of a machine does: 4 x 5.29, and it is said."""
    facts = read_log(log(("Worker_TP0 pid=102", "5.29", "7.85")), cards=4)
    assert facts.weights_gib == pytest.approx(21.16) and facts.kv_cache_gib == pytest.approx(31.4)
    assert facts.taken_alike == "1 of 4"


def test_one_card_is_read_as_ever() -> None:
    facts = read_log(log(("EngineCore pid=101", "5.29", "7.85")))
    assert (facts.weights_gib, facts.kv_cache_gib, facts.taken_alike) == (5.29, 7.85, None)
    again = log(("EngineCore pid=101", "5.29", "7.85"), ("EngineCore pid=101", "0.4", "1.0"))
    assert read_log(again).weights_gib == 5.29, "what a process tells first is the model; a draft's comes later"
    nothing = read_log("", cards=2)
    assert nothing.weights_gib is None and nothing.taken_alike is None


def test_the_smallest_cache_counts_where_stages_differ() -> None:
    text = "\n".join([SIZE.format("146,944", "143.50"), SIZE.format("90,112", "88.00")])
    facts = read_log(text, cards=2)
    assert (facts.kv_cache_tokens, facts.max_concurrency) == (90_112, 88.0)
