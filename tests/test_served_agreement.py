"""A real vLLM serving our AWQ checkpoint gives the distributions of the dequantized model in torch.

Teacher-forced: the server scores texts that it is given, so one near-tie does not derail all that follows. The
reference is in float32, where its weights are exact; what is left is the server's own arithmetic in half precision.
Measured on 2,918 positions of the demo model: the most likely token agrees wherever the margin is above 0.1 nat (2,792
of them), and its log-probability is off by at most 0.006 nat in float16 and 0.044 in bfloat16.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoTokenizer

from harness.engines import ServeSpec
from harness.engines.vllm import VllmServer
from quantize.fidelity import load_dequantized
from quantize.job import quantize_model
from quantize.recipe import Recipe
from tests.served import served_logprobs

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = Path(__file__).parent.parent / "scenarios" / "demo-model"
MARGIN_NAT = 0.1
TOLERANCE_NAT = {"float16": 0.02, "bfloat16": 0.12}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_model(DEMO, Recipe("awq"), out=tmp_path_factory.mktemp("served") / "awq").path


def conversations(count: int) -> list[list[int]]:
    """Held-out questions with their answers, as token ids: `count` of them, spread over the families."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rows = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    found = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_server_agrees_with_the_reference(
    dtype: Literal["float16", "bfloat16"], checkpoint: Path, serving: Callable[[ServeSpec], VllmServer]
) -> None:
    server = serving(ServeSpec(checkpoint, "awq", dtype=dtype, max_model_len=512, kv_cache_gib=1))
    assert "WNA16" in server.log() or "Marlin" in server.log()
    prompts = conversations(100)
    reference = load_dequantized(checkpoint)
    clear = 0
    for ids, places in zip(prompts, served_logprobs(server.target, prompts), strict=True):
        expected = torch.log_softmax(reference(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
        for logprobs, served in zip(expected, places, strict=False):
            (most, second), (token, _) = (part.tolist() for part in logprobs.topk(2))
            assert served[token] == pytest.approx(most, abs=TOLERANCE_NAT[dtype])
            if most - second > MARGIN_NAT:
                clear += 1
                assert max(served, key=lambda t: served[t]) == token
    assert clear > 1000
