"""vLLM's own scheduler, without a model: run by tests/predict/test_scheduler.py in an environment that has vLLM.

python vllm_scheduler.py MODEL_DIR < cases.json > steps.json

A case: {"limits": {kv_blocks, block_size, max_num_seqs, max_num_batched_tokens}, "requests": [[arrives before step, in,
out], ...]}. Every step takes 1. Of each step it tells [when it began, {request: tokens scheduled}, [got a token],
[preempted], waiting after it].
"""

import json
import sys

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import KVCacheConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


def steps(case, model):
    limits = case["limits"]
    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=2048,
        block_size=limits["block_size"],
        max_num_seqs=limits["max_num_seqs"],
        max_num_batched_tokens=limits["max_num_batched_tokens"],
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        async_scheduling=False,
    ).create_engine_config()
    blocks = limits["kv_blocks"] + 1  # one of them is never used
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=limits["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=limits["block_size"],
    )
    coming = sorted(enumerate(case["requests"]), key=lambda entry: (entry[1][0], entry[0]))
    now, told = 0, []
    while coming or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            now = max(now, coming[0][1][0])
        while coming and coming[0][1][0] <= now:
            number, (_, asked, answer) = coming.pop(0)
            params = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0)
            params.update_from_generation_config({}, 7)
            scheduler.add_request(Request(str(number), [1] * asked, params, None))
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        names = list(scheduled)
        whole = [scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens for name in names]
        told.append(
            [
                now,
                {name: scheduled[name] for name in sorted(names, key=int)},
                sorted(int(name) for name, got in zip(names, whole, strict=True) if got),
                sorted(int(name) for name in output.preempted_req_ids or ()),
                len(scheduler.waiting),
            ]
        )
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: at for at, name in enumerate(names)},
                sampled_token_ids=[[0] if got else [] for got in whole],
            ),
        )
        now += 1
    return told


if __name__ == "__main__":
    json.dump([steps(case, sys.argv[1]) for case in json.load(sys.stdin)], sys.stdout)
