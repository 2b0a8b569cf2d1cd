"""vLLM's own layers with our method in them: cut for several processes, the output head, and what is refused.

One process in vLLM's environment builds the layers as each process of a tensor-parallel server would, by telling vLLM
which one it is, and loads the same tensors through vLLM's own loaders. The reference is x W' with the dequantized W.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.engines.environment import EngineEnv
from quantize.packing import pack_awq, pack_gptq
from quantize.scheme import Scheme, dequantize, quantize
from tests.test_plugin_real import in_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

INPUTS, HEADS, KV_HEADS, WIDTH, VOCABULARY = 256, 4, 2, 32, 320

# Runs in vLLM's environment. tensors.safetensors and jobs.json in; what each process computes out, or why not.
LAYERS = """
import json, pickle, sys
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.fused_moe import RoutedExperts
from quantize.vllm_plugin import NAME, KneebenchConfig, register

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

def build(kind, config):
    options = {"bias": False, "quant_config": config}
    if kind == "row":
        return linear.RowParallelLinear(256, 128, prefix="m.layers.0.down_proj", reduce_results=False, **options)
    if kind == "qkv":
        return linear.QKVParallelLinear(256, 32, 4, 2, prefix="m.layers.0.qkv_proj", **options)
    return vocab_parallel_embedding.ParallelLMHead(320, 256, prefix="lm_head", **options)

tensors, outputs, errors = load_file(sys.argv[1]), {}, {}
torch.set_default_dtype(torch.bfloat16)
configuration = VllmConfig()
for job in json.load(open(sys.argv[2])):
    for rank in range(job["ranks"]):
        for module in (linear, parameter, vocab_parallel_embedding):
            module.get_tensor_model_parallel_rank = lambda: rank
            module.get_tensor_model_parallel_world_size = lambda: job["ranks"]
        try:
            config = pickle.loads(pickle.dumps(KneebenchConfig.from_config(job["config"])))
            config.packed_modules_mapping = PARTS
            with set_current_vllm_config(configuration):
                layer = build(job["kind"], config)
            for part, shard, name in job["tensors"]:
                target = getattr(layer, part)
                target.weight_loader(target, tensors[name], *([shard] if shard else []))
            layer.quant_method.process_weights_after_loading(layer)
            x = tensors["x"]
            if job["kind"] == "row":
                x = x.chunk(job["ranks"], dim=-1)[rank]
            bias = tensors["bias"] if job["kind"] == "head" else None
            outputs[f"{job['name']} {rank}"] = layer.quant_method.apply(layer, x, bias)
        except Exception as error:
            errors[f"{job['name']} {rank}"] = f"{type(error).__name__}: {error}"
save_file(outputs, sys.argv[3])

def ask(what, *arguments):
    try:
        return what(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "dynamic": {"-:.*k_proj": {}}}
awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
config = KneebenchConfig.from_config(gptq)
config.packed_modules_mapping = PARTS
choose = KneebenchConfig.override_quantization_method
register(), register()
facts = {
    "chosen": [choose(awq, NAME), choose(gptq, NAME)],
    "not chosen": [choose(awq, None), choose(awq, "awq"), choose({"quant_method": "compressed-tensors"}, NAME)],
    "parts that differ": ask(config.scheme_of, "m.layers.0.qkv_proj"),
    "experts": ask(config.get_quant_method, RoutedExperts.__new__(RoutedExperts), "m.layers.0.mlp.experts"),
    "other layers": config.get_quant_method(torch.nn.Identity(), "m.layers.0.norm"),
    "gemv": ask(KneebenchConfig.from_config, awq | {"version": "gemv"}),
    "3 bits": ask(lambda: build("row", KneebenchConfig.from_config(gptq | {"bits": 3}))),
}
json.dump({"errors": errors, "facts": facts}, open(sys.argv[4], "w"))
"""

GPTQ = {"quant_method": "gptq", "sym": False, "lm_head": True}
AWQ = {"quant_method": "awq", "zero_point": True}


@dataclass(frozen=True)
class Layers:
    x: Tensor
    bias: Tensor
    weights: Mapping[str, Tensor]
    """Dequantized [out, in], by name."""
    outputs: Mapping[str, Tensor]
    """By job and rank."""
    errors: Mapping[str, str]
    facts: Mapping[str, Any]


@pytest.fixture(scope="module")
def layers(engine_env: EngineEnv, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    place = tmp_path_factory.mktemp("layers")
    generator = torch.Generator().manual_seed(1)
    tensors = {"x": torch.randn(5, INPUTS, generator=generator).bfloat16()}
    tensors["bias"] = torch.randn(VOCABULARY, generator=generator).bfloat16()
    order = torch.randperm(INPUTS, generator=generator)
    weights: dict[str, Tensor] = {}

    def store(name: str, outputs: int, layout: str, scheme: Scheme, scattered: bool = False) -> None:
        by = order if scattered else torch.arange(INPUTS)
        quantized = quantize(torch.randn(outputs, INPUTS, generator=generator)[:, by] * 0.05, scheme)
        weights[name] = dequantize(quantized)[:, by.argsort()].bfloat16()
        quantized = quantized._replace(q=quantized.q[:, by.argsort()])
        parts: Any = pack_awq(quantized) if layout == "awq" else pack_gptq(quantized, scheme.bits)
        tensors.update({f"{name}.{part}": tensor.contiguous() for part, tensor in parts._asdict().items()})
        if layout == "gptq":
            tensors[f"{name}.g_idx"] = parts.g_idx[by.argsort()]

    jobs: list[dict[str, Any]] = []

    def job(
        name: str, kind: str, ranks: int, config: dict[str, Any], scheme: Scheme, shards: Mapping[str, str | None]
    ) -> None:
        told = config | {"bits": scheme.bits, "group_size": scheme.group_size}
        given = [
            [part, shard, f"{source}.{part}"]
            for source, shard in shards.items()
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{source}.{part}" in tensors
        ]
        jobs.append({"name": name, "kind": kind, "ranks": ranks, "config": told, "tensors": given})

    for layout, config in (("gptq", GPTQ), ("awq", AWQ)):
        for size in (64, -1):
            scheme = Scheme(4, size)
            store(f"{layout}{size}", 128, layout, scheme)
            for ranks in (1, 2, 4):
                job(f"row {layout} {size} {ranks}", "row", ranks, config, scheme, {f"{layout}{size}": None})
    for layout, config, scheme in (("gptq", GPTQ, Scheme(8, 64)), ("awq", AWQ, Scheme(4, 64))):
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            store(f"{layout} {part}", heads * WIDTH, layout, scheme, scattered=layout == "gptq")
        for ranks in (1, 2, 4):
            job(f"qkv {layout} {ranks}", "qkv", ranks, config, scheme, {f"{layout} {part}": part for part in "qkv"})
    store("scattered", 128, "gptq", Scheme(4, 64), scattered=True)
    for ranks in (1, 2):
        job(f"scattered {ranks}", "row", ranks, GPTQ, Scheme(4, 64), {"scattered": None})
    job("too many", "row", 8, GPTQ, Scheme(4, 64), {"gptq64": None})
    store("head", VOCABULARY, "gptq", Scheme(4, 64))
    job("head", "head", 1, GPTQ, Scheme(4, 64), {"head": None})
    paths = [place / name for name in ("tensors.safetensors", "jobs.json", "outputs.safetensors", "told.json")]
    save_file(tensors, paths[0])
    paths[1].write_text(json.dumps(jobs))
    in_engine(engine_env, LAYERS, *paths)
    told = json.loads(paths[3].read_text())
    return Layers(tensors["x"], tensors["bias"], weights, load_file(paths[2]), told["errors"], told["facts"])


def close(found: Tensor, expected: Tensor) -> None:
    """To the rounding of a few sums in bfloat16, 8 bits."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", [64, -1])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_inputs_split_between_processes_add_up(layout: str, size: int, ranks: int, layers: Layers) -> None:
    found = sum(layers.outputs[f"row {layout} {size} {ranks} {rank}"].float() for rank in range(ranks))
    assert isinstance(found, Tensor)
    close(found, layers.x.float() @ layers.weights[f"{layout}{size}"].float().T)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_each_process_has_its_heads_side_by_side(layout: str, ranks: int, layers: Layers) -> None:
    """4 query heads, 2 of keys and of values. Of 2 processes each has 2, 1 and 1; of 4 each has 1, 1 and 1."""
    each = [layers.x.float() @ layers.weights[f"{layout} {part}"].float().T for part in "qkv"]
    q, k, v = (outputs.split(WIDTH, dim=-1) for outputs in each)
    for rank in range(ranks):
        mine = HEADS // ranks
        shared = max(1, ranks // KV_HEADS)
        kv = slice(0, KV_HEADS) if ranks == 1 else slice(rank // shared, rank // shared + 1)
        expected = torch.cat([*q[rank * mine : (rank + 1) * mine], *k[kv], *v[kv]], dim=-1)
        close(layers.outputs[f"qkv {layout} {ranks} {rank}"], expected)


def test_scattered_inputs_are_not_split(layers: Layers) -> None:
    close(layers.outputs["scattered 1 0"], layers.x.float() @ layers.weights["scattered"].float().T)
    for rank in range(2):
        assert "m.layers.0.down_proj: act-order scatters each group" in layers.errors[f"scattered 2 {rank}"]
        assert "--tensor-parallel-size 1" in layers.errors[f"scattered 2 {rank}"]


def test_groups_that_a_split_would_cut_are_refused(layers: Layers) -> None:
    assert "32 inputs in groups of 64" in layers.errors["too many 0"]
    assert set(layers.errors) == {"scattered 2 0", "scattered 2 1", *(f"too many {rank}" for rank in range(8))}


def test_the_output_head_and_a_bias(layers: Layers) -> None:
    expected = layers.x.float() @ layers.weights["head"].float().T + layers.bias.float()
    close(layers.outputs["head 0"], expected)


def test_what_is_taken_and_what_is_not(layers: Layers) -> None:
    facts = layers.facts
    assert facts["chosen"] == ["kneebench", "kneebench"]
    assert facts["not chosen"] == [None, None, None]
    assert facts["other layers"] is None
    assert "m.layers.0.k_proj, m.layers.0.v_proj have several schemes" in facts["parts that differ"]
    assert facts["experts"].startswith("ValueError: m.layers.0.mlp.experts: a mixture of experts")
    assert "gemv" in facts["gemv"] and "gemm" in facts["gemv"]
    assert "3 bits. kneebench has kernels for 4 and 8" in facts["3 bits"]
