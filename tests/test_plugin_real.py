"""Real vLLM with our kernels: what it serves, held against its own path and against plain 16-bit weights.

Two servers, one with vLLM's AWQ kernel and one through the plugin, score the same 50 conversations, teacher-forced. The
other layouts are loaded one after the other by one process in vLLM's environment, each beside its dequantized twin,
whose weights are the same numbers in 16 bit, served by vLLM without us. On a CPU our operators run their torch version.

Measured with vLLM 0.32 and the demo model: of 1,582 positions of the AWQ checkpoint in bfloat16, 1,460 have a margin
above 0.1 nat, and at every one the likeliest token is the same; log-probabilities differ by 0.0013 nat in the mean. The
other layouts: 593 positions each, none apart where the margin is clear; 0.0008 to 0.0032 nat in bfloat16, 0.0001 and
0.0002 in float16.
"""

import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from harness import checkpoints
from harness.engines import ServeSpec, plugin
from harness.engines.environment import EngineEnv
from harness.engines.vllm import VllmServer
from harness.engines.vllm_command import settings, surroundings
from harness.models import Model, resolve
from quantize.packing import pack_awq, pack_gptq
from quantize.scheme import Scheme, dequantize, quantize
from tests.served import served_logprobs

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"
MARGIN_NAT = 0.1
OURS, THEIRS = "KneebenchTorchKernel", "CPUWNA16LinearKernel"

Places = list[list[dict[int, float]]]
"""Of each prompt, of each position after the first: the likeliest tokens and their logprobs."""


def conversations(count: int = 50) -> list[list[int]]:
    """Held-out questions with their answers, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rows = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    found = []
    for row in rows[:: len(rows) // count][:count]:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


@dataclass(frozen=True)
class Agreement:
    """How near two servers are: over positions, and over those where the first one's margin is above MARGIN_NAT."""

    positions: int
    clear: int
    apart: int
    """Clear positions whose likeliest token is another."""
    mean_nat: float
    """Mean |difference| of the log-probability of the first one's likeliest token."""


def agreement(theirs: Places, ours: Places) -> Agreement:
    positions = clear = apart = 0
    differences = []
    for these, those in zip(theirs, ours, strict=True):
        for one, other in zip(these, those, strict=True):
            best, second = sorted(one, key=one.__getitem__, reverse=True)[:2]
            positions += 1
            differences.append(abs(one[best] - other.get(best, -torch.inf)))
            if one[best] - one[second] > MARGIN_NAT:
                clear += 1
                apart += max(other, key=other.__getitem__) != best
    return Agreement(positions, clear, apart, sum(differences) / positions)


# --- two servers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def awq() -> Model:
    return checkpoints.checkpoint("awq", None, resolve("demo"), None, lambda _: None)[0]


def test_awq_through_the_plugin_agrees_with_vllms_own_path(
    awq: Model, serving: Callable[[ServeSpec], VllmServer], record_property: Callable[[str, object], None]
) -> None:
    theirs, ours = (
        serving(ServeSpec(awq.path, name, max_model_len=512, max_num_seqs=16, kv_cache_gib=0.25))
        for name in ("awq", "awq@kneebench")
    )
    assert (theirs.info.kernel, ours.info.kernel) == (THEIRS, OURS)
    assert ours.info.settings["--quantization"] == "kneebench"
    assert "--quantization" not in theirs.info.settings
    prompts = conversations()
    found = agreement(served_logprobs(theirs.target, prompts), served_logprobs(ours.target, prompts))
    record_property("agreement", str(found))
    assert found.positions == sum(len(ids) - 1 for ids in prompts) > 1000
    assert found.clear > 0.8 * found.positions
    assert found.apart == 0
    assert 0 < found.mean_nat < 0.01  # 0 would mean that one of them ran twice


# --- the other layouts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A way to store the demo model's linear layers."""

    name: str
    layout: str
    scheme: Scheme
    dtype: str = "bfloat16"
    scattered: bool = False
    """Act-order: the inputs of a group lie anywhere."""
    eight: str | None = None
    """Layers of 8 bits among others, by a part of their names."""
    kept: str | None = None
    """Layers in 16 bit."""
    listed: bool = True
    """Whether config.json names the ones that are kept; some tools only leave them out."""
    with_g_idx: bool = True


CASES = (
    Case("act-order", "gptq", Scheme(4, 64), scattered=True),
    Case("act-order, v2, 8 bits", "gptq_v2", Scheme(8, 32), "float16", scattered=True),
    Case("act-order, one group a row", "gptq", Scheme(4, -1, symmetric=True), scattered=True),
    Case("old, without g_idx", "gptq", Scheme(4, 128, symmetric=True), with_g_idx=False),
    Case("8 bits", "gptq", Scheme(8, 128, symmetric=True)),
    Case("8 bits among 4", "gptq", Scheme(4, 128), eight="down_proj", kept="layers.1.self_attn"),
    Case("kept and not listed", "gptq_v2", Scheme(4, 32), kept="layers.2.mlp", listed=False),
    Case("awq, float16", "awq", Scheme(4, 32), "float16", kept="down_proj"),
    Case("awq, one group a row", "awq", Scheme(4, -1)),
)
TORN = Case("torn", "gptq", Scheme(4, 64), scattered=True)
UNEVEN = Case("uneven", "gptq", Scheme(4, 64), scattered=True)


def write(path: Path, case: Case, order_of: Callable[[str], str] = lambda name: name) -> None:
    """The demo model as `case` stores it in path/stored, and with the same weights in 16 bit in path/plain.

    order_of: what the order of a layer's inputs depends on; q, k, v and gate, up have theirs in common.
    """
    config = json.loads((DEMO / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(DEMO / "model.safetensors").items():
        if not name.endswith("_proj.weight") or (case.kept and case.kept in name):
            stored[name] = plain[name] = weight
            continue
        module = name.removesuffix(".weight")
        bits = 8 if case.eight and case.eight in name else case.scheme.bits
        scheme = Scheme(bits, case.scheme.group_size, case.scheme.symmetric)
        order = torch.arange(weight.shape[1])
        if case.scattered:
            seed = zlib.crc32(order_of(module).encode())
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        quantized = quantize(weight[:, order], scheme)
        back = order.argsort()
        plain[name] = dequantize(quantized)[:, back].to(getattr(torch, case.dtype))
        quantized = quantized._replace(q=quantized.q[:, back])
        parts: Any = pack_awq(quantized) if case.layout == "awq" else pack_gptq(quantized, bits)
        tensors = {part: tensor for part, tensor in parts._asdict().items() if part != "g_idx" or case.with_g_idx}
        if "g_idx" in tensors:
            tensors["g_idx"] = parts.g_idx[back]
        if case.layout == "gptq_v2":
            tensors["qzeros"] = tensors["qzeros"] + sum(1 << i for i in range(0, 32, bits))  # not z - 1 but z
        stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    for folder, tensors, extra in (("stored", stored, described(case)), ("plain", plain, {})):
        (path / folder).mkdir(parents=True)
        save_file(tensors, path / folder / "model.safetensors", metadata={"format": "pt"})
        (path / folder / "config.json").write_text(json.dumps(config | extra))


def described(case: Case) -> dict[str, Any]:
    """The quantization_config, as the tools that have such layouts write it."""
    told: dict[str, Any] = {"bits": case.scheme.bits, "group_size": case.scheme.group_size}
    if case.layout == "awq":
        kept = [case.kept] if case.kept else None
        return {
            "quantization_config": told
            | {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": kept}
        }
    dynamic: dict[str, Any] = {}
    if case.kept and case.listed:
        dynamic[f"-:.*{case.kept}.*"] = {}
    if case.eight:
        dynamic[f"+:.*{case.eight}"] = {"bits": 8}
    told |= {"quant_method": "gptq", "checkpoint_format": case.layout, "sym": case.scheme.symmetric}
    return {"quantization_config": told | {"desc_act": case.scattered, "dynamic": dynamic}}


def fused(module: str) -> str:
    """The name of the matrix that vLLM lays a layer into."""
    return re.sub(r"(gate|up)_proj$", "gate_up_proj", re.sub(r"[qkv]_proj$", "qkv_proj", module))


# Runs in vLLM's environment: job.json in, one line of JSON out for each load.
LOADS = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt
gc.collect = lambda *_: 0  # as in test_served_matrix.py: vLLM's own collections are most of what a load takes
job = json.load(open(sys.argv[1]))
params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5, detokenize=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
with open(sys.argv[2], "w") as out:
    for name, path, options in job["loads"]:
        answer = {"name": name}
        try:
            llm = LLM(path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=16,
                      kv_cache_memory_bytes=1 << 25, disable_log_stats=True, **options)
            found = llm.generate(prompts, params, use_tqdm=False)
            answer["places"] = [[{k: v.logprob for k, v in place.items()} for place in one.prompt_logprobs[1:]]
                                for one in found]
            llm.llm_engine.engine_core.shutdown()
            del llm, found
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=out, flush=True)
"""


def in_engine(env: EngineEnv, script: str, *arguments: Path) -> None:
    """Run `script` in vLLM's environment, with the surroundings that a server of ours has."""
    ours = settings(ServeSpec(arguments[0].parent, "awq@kneebench"), env)
    alone = {**ours, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    around = plugin.surroundings("awq@kneebench", surroundings(env, alone, None))
    log = arguments[0].with_suffix(".log")
    with log.open("wb") as output:
        line = [str(env.python), "-c", script, *map(str, arguments)]
        code = subprocess.run(line, env=around, stdout=output, stderr=output, timeout=600).returncode
    assert code == 0, log.read_text(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def answers(
    engine_env: EngineEnv, awq: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Mapping[str, Any]]]:
    """What vLLM answered for each load, by name."""
    place = tmp_path_factory.mktemp("plugin")
    loads: list[tuple[str, Path, dict[str, str]]] = []
    ours = {"quantization": "kneebench"}
    for number, case in enumerate(CASES):
        path = place / str(number)
        write(path, case, fused)
        loads.append((case.name, path / "stored", ours | {"dtype": case.dtype}))
        loads.append((f"{case.name}, plain", path / "plain", {"dtype": case.dtype}))
    write(place / "torn", TORN)
    write(place / "uneven", UNEVEN, fused)
    weights = load_file(place / "uneven" / "stored" / "model.safetensors")
    odd = next(name for name in weights if name.endswith("o_proj.g_idx"))
    weights[odd][weights[odd] == 1] = 0
    save_file(weights, place / "uneven" / "stored" / "model.safetensors", metadata={"format": "pt"})
    loads += [(name, place / name / "stored", ours) for name in ("torn", "uneven")]
    loads.append(("dummy", place / "0" / "stored", ours | {"load_format": "dummy"}))
    loads.append(("not quantized", DEMO, ours))
    loads.append(("unasked", awq.path, {}))
    (place / "job.json").write_text(json.dumps({"loads": loads, "prompts": conversations(20)}, default=str))
    in_engine(engine_env, LOADS, place / "job.json", place / "answers.jsonl")
    yield {line["name"]: line for line in map(json.loads, (place / "answers.jsonl").read_text().splitlines())}


def places(answer: Mapping[str, Any]) -> Places:
    assert "error" not in answer, answer["error"]
    return [[{int(token): value for token, value in place.items()} for place in one] for one in answer["places"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_layout_is_served_as_its_weights_in_16_bit(
    case: Case, answers: Mapping[str, Mapping[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    found = agreement(places(answers[f"{case.name}, plain"]), places(answers[case.name]))
    record_property("agreement", str(found))
    assert found.clear > 0.8 * found.positions > 400
    assert found.apart == 0
    assert found.mean_nat < (0.001 if case.dtype == "float16" else 0.01)


def test_what_cannot_be_multiplied_rightly_is_refused(answers: Mapping[str, Mapping[str, Any]]) -> None:
    assert "gate_up_proj: its parts have different g_idx" in answers["torn"]["error"]
    assert "a g_idx whose groups are not all of one size" in answers["uneven"]["error"]


def test_random_weights_are_served(answers: Mapping[str, Mapping[str, Any]]) -> None:
    assert len(places(answers["dummy"])) == 20


def test_what_is_not_quantized_is_no_business_of_ours(answers: Mapping[str, Mapping[str, Any]]) -> None:
    assert "Cannot find the config file for kneebench" in answers["not quantized"]["error"]
    places(answers["unasked"])
