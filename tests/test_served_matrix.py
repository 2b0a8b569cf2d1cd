"""Every method and layout that vLLM's CPU build accepts, served by it and held against the dequantized model in torch.

One process in vLLM's environment loads the checkpoints one after the other, less than a second each, and scores the
same texts with every one; a server for each would take half a minute. What `formats.cpu_objection` says cannot be
served is tried as well, so that its word is never out of date. The reference is in float32, teacher-forced.

Measured with vLLM 0.32 on the random model (944 positions a checkpoint, 223 to 298 of them with a margin above 0.1 nat,
30,683 in all): the most likely token agrees at every one of these; where it differs the margin is at most 0.003 nat in
float16, 0.035 in bfloat16, and 0.074 with 8-bit activations, of which a difference in the last bit can move an integer.
Log-probabilities are off by up to 0.006, 0.09 and 0.16 nat.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.engines import ServeSpec
from harness.engines.environment import EngineEnv
from harness.engines.vllm_command import settings, surroundings
from quantize import formats
from quantize.errors import SchemeError
from quantize.job import quantize_model
from quantize.layout import parse
from quantize.recipe import W8A8, Exception_, Recipe
from quantize.scheme import Quantized, Scheme, dequantize
from quantize.weights import open_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

MARGIN_NAT = 0.1
DTYPES = ("float16", "bfloat16")
TOLERANCE_NAT = {"float16": 0.02, "bfloat16": 0.2, "int8": 0.3}
PROMPTS = [[(7 * i * i + 3 * i + 11 * j * i + j) % 256 for i in range(60)] for j in range(16)]

SYMMETRIC = Scheme(symmetric=True)
EIGHT = Scheme(8, symmetric=True)


@dataclass(frozen=True)
class Case:
    """A checkpoint to make and serve."""

    method: str
    format: str
    scheme: Scheme
    exceptions: tuple[Exception_, ...] = ()

    @property
    def name(self) -> str:
        except_for = "".join(f", {e.pattern} {e.scheme or '16 bit'}" for e in self.exceptions)
        return f"{self.method} as {self.format} {self.scheme}{except_for}"

    @property
    def rounds_activations(self) -> bool:
        return W8A8 in (self.scheme, *(e.scheme for e in self.exceptions))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Both for the baseline; one for the other methods, whose layout is the same and whose integers differ."""
        return DTYPES if self.method == "rtn" else DTYPES[1:]


def _writable(case: Case) -> bool:
    try:
        formats.check(case.format, {"model.layers.0.mlp.up_proj": case.scheme})
    except SchemeError:
        return False
    return True


UNIFORM = [
    case
    for method, format, bits, group, symmetric in product(
        ("rtn", "awq", "gptq", "awq+gptq"), formats.FORMATS, (2, 3, 4, 8), formats.GROUP_SIZES, (False, True)
    )
    if _writable(case := Case(method, format, Scheme(bits, group, symmetric)))
]
DOWN, ATTENTION = "down_proj", r"layers\.1\.self_attn"
OTHERS = [
    *(Case(method, "compressed-tensors", W8A8) for method in ("rtn", "gptq", "smoothquant", "smoothquant+gptq")),
    Case("rtn", "compressed-tensors", SYMMETRIC, (Exception_(DOWN, W8A8),)),
    Case("awq+gptq", "compressed-tensors", SYMMETRIC, (Exception_(DOWN, Scheme(4, 32)),)),
    *(Case("rtn", format, SYMMETRIC, (Exception_(ATTENTION, None),)) for format in formats.FORMATS),
    *(Case("awq", format, SYMMETRIC, (Exception_(DOWN, None),)) for format in formats.FORMATS),
]
SERVED = [case for case in [*UNIFORM, *OTHERS] if formats.cpu_objection({"a": case.scheme}) is None]
NOT_ON_CPU = [case for case in UNIFORM if case not in SERVED and case.method == "rtn"]

# Runs in vLLM's environment: job.json in, one line of JSON out for each checkpoint and type.
ENGINE = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt
gc.collect = lambda *_: 0  # vLLM collects seven times for each engine, 0.3 s each; by itself Python does so in time
job = json.load(open(sys.argv[1]))
params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2, detokenize=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
with open(sys.argv[2], "w") as out:
    for name, path, dtype in job["loads"]:
        answer = {"name": name, "dtype": dtype}
        try:
            llm = LLM(path, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
                      max_num_seqs=16, kv_cache_memory_bytes=1 << 23, disable_log_stats=True)
            found = llm.generate(prompts, params, use_tqdm=False)
            answer["places"] = [[{k: v.logprob for k, v in place.items()} for place in one.prompt_logprobs[1:]]
                                for one in found]
            llm.llm_engine.engine_core.shutdown()
            del llm, found
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=out, flush=True)
"""

# vLLM's own unpacking of a layout that only its CUDA build has a kernel for.
UNPACK = """
import pathlib, sys
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types
shards = pathlib.Path(sys.argv[1]).parent.glob("*.safetensors")
words = {name: t for shard in shards for name, t in load_file(shard).items() if name.endswith(".qweight")}
save_file({name: unpack_quantized_values_into_int32(t, scalar_types.uint8b128, 0).contiguous()
           for name, t in words.items()}, sys.argv[2])
"""


def make(path: Path, source: Path, calibration: Path, case: Case) -> None:
    """`source` quantized, as a checkpoint in `path`."""
    recipe = Recipe(case.method, case.scheme, case.exceptions, format=case.format, samples=16, length=64)
    quantize_model(source, recipe, out=path, calibration=calibration)


def integers(path: Path) -> dict[str, tuple[Scheme, Quantized]]:
    """What a checkpoint holds, by module."""
    model = open_model(path)
    layout = parse(model.config["quantization_config"])
    found = {}
    for name, (scheme, parts) in layout.modules(model.files).items():
        tensors = model.read(f"{name}.{part}" for part in parts)
        parts_of = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        found[name] = scheme, formats.unpack(parts_of, layout.format, scheme)
    return found


def per_token_int8(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The inputs as vLLM rounds them for W8A8: to 127 steps either way of each token's largest."""
    steps = inputs[0].abs().amax(dim=-1, keepdim=True) / 127
    return (torch.round(inputs[0] / steps) * steps,)


@torch.no_grad()
def expected(path: Path, rounded: bool = True) -> Tensor:
    """Log-probabilities of the dequantized checkpoint over PROMPTS, float32 [prompts, length, vocabulary].

    With `rounded`, activations go through int8 where the checkpoint says so.
    """
    model = tiny_model.build(dtype=torch.float32)
    stored = open_model(path)
    held = integers(path)
    state = stored.read(name for name in stored.files if name.rpartition(".")[0] not in held or name.endswith(".bias"))
    state |= {f"{name}.weight": dequantize(quantized) for name, (_, quantized) in held.items()}
    missing, unknown = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])  # tied
    for name, (scheme, _) in held.items():
        if scheme.activation_bits and rounded:
            model.get_submodule(name).register_forward_pre_hook(per_token_int8)
    return torch.log_softmax(model(input_ids=torch.tensor(PROMPTS)).logits, dim=-1)


def in_engine(env: EngineEnv, script: str, *arguments: Path, timeout_s: float) -> None:
    """Run `script` in vLLM's environment, with the surroundings that a server has."""
    ours = settings(ServeSpec(arguments[0].parent, "awq"), env)
    # The engine in this very process, not in one that it starts: seconds a checkpoint, and errors arrive as such.
    around = surroundings(env, {**ours, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}, None)
    log = arguments[0].with_suffix(".log")
    with log.open("wb") as output:
        line = [str(env.python), "-c", script, *map(str, arguments)]
        code = subprocess.run(line, env=around, stdout=output, stderr=output, timeout=timeout_s).returncode
    assert code == 0, log.read_text(errors="replace")[-3000:]


@dataclass(frozen=True)
class Engine:
    """The checkpoints that vLLM was given, and what it answered, by case and type."""

    checkpoints: Mapping[Case, Path]
    answers: Mapping[tuple[str, str], Mapping[str, Any]]


@pytest.fixture(scope="module")
def engine(engine_env: EngineEnv, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    if engine_env.kind != "cpu":
        pytest.skip("what the CPU build accepts is asked of the CPU build")
    place = tmp_path_factory.mktemp("matrix")
    source = tiny_model.save(place / "source")
    calibration = place / "calibration.txt"
    calibration.write_text("\n\n".join(f"Line {i} says {i * i} and has words like any other line." for i in range(64)))
    checkpoints = {case: place / f"checkpoint-{i}" for i, case in enumerate([*SERVED, *NOT_ON_CPU])}
    for case, path in checkpoints.items():
        make(path, source, calibration, case)
    loads = [(case.name, str(checkpoints[case]), dtype) for case in SERVED for dtype in case.dtypes]
    loads += [(case.name, str(checkpoints[case]), "bfloat16") for case in NOT_ON_CPU]
    (place / "job.json").write_text(json.dumps({"loads": loads, "prompts": PROMPTS}))
    in_engine(engine_env, ENGINE, place / "job.json", place / "answers.jsonl", timeout_s=800)
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    return Engine(checkpoints, {(answer["name"], answer["dtype"]): answer for answer in answers})


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_vllm_serves_what_torch_computes(case: Case, engine: Engine) -> None:
    reference = expected(engine.checkpoints[case])
    for dtype in case.dtypes:
        answer = engine.answers[case.name, dtype]
        assert "error" not in answer, answer["error"]
        tolerance = TOLERANCE_NAT["int8" if case.rounds_activations else dtype]
        clear = 0
        for logprobs, places in zip(reference, answer["places"], strict=True):
            for place, tokens in zip(logprobs, places, strict=False):
                served = {int(token): value for token, value in tokens.items()}
                (most, second), (token, _) = (part.tolist() for part in place.topk(2))
                assert served == pytest.approx({t: float(place[t]) for t in served}, abs=tolerance), dtype
                if most - second > MARGIN_NAT:
                    clear += 1
                    assert max(served, key=lambda t: served[t]) == token, (dtype, most - second)
        assert clear > 150, dtype


@pytest.mark.parametrize("case", NOT_ON_CPU, ids=lambda case: case.name)
def test_what_has_no_cpu_kernel_is_known(case: Case, engine: Engine) -> None:
    assert case.scheme.bits != 4
    says = engine.answers[case.name, "bfloat16"]["error"]
    assert "Failed to find a kernel" in says or "Marlin does not support weight_bits = uint8b128" in says


def test_activations_are_rounded_as_the_reference_rounds_them(engine: Engine) -> None:
    case = Case("rtn", "compressed-tensors", W8A8)

    def mean_error(reference: Tensor) -> float:
        places = engine.answers[case.name, "float16"]["places"]
        errors = [
            abs(value - float(logprobs[i, int(token)]))
            for logprobs, prompt in zip(reference, places, strict=True)
            for i, tokens in enumerate(prompt)
            for token, value in tokens.items()
        ]
        return sum(errors) / len(errors)

    path = engine.checkpoints[case]
    assert mean_error(expected(path)) < 0.7 * mean_error(expected(path, rounded=False))


def test_vllm_unpacks_8_bit_gptq_to_the_same_integers(engine: Engine, engine_env: EngineEnv, tmp_path: Path) -> None:
    # Its CUDA build serves this layout; of the loaders that run here only vLLM's own code reads it.
    (case,) = (case for case in NOT_ON_CPU if case.format == "gptq" and case.scheme == EIGHT)
    path = engine.checkpoints[case]
    in_engine(engine_env, UNPACK, path / "config.json", tmp_path / "unpacked.safetensors", timeout_s=120)
    unpacked = load_file(tmp_path / "unpacked.safetensors")
    held = integers(path)
    assert len(unpacked) == len(held) == 14
    for name, (_, quantized) in held.items():
        assert torch.equal(unpacked[f"{name}.qweight"].T, quantized.q.to(torch.int32)), name
