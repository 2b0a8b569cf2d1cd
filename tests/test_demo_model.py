"""The committed demo model keeps its promises: small, servable, right in BF16, visibly damaged by 3-bit rounding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import demo_model
import demo_tasks
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent.parent / "scenarios" / "demo-model"


@cache
def scores(bits: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model, tokenizer = demo_model.load(HERE)
    if bits < 16:
        demo_model.damage(model, bits)
    return demo_model.accuracy(model, tokenizer, demo_model.read_heldout(HERE))


def test_bf16_answers_nearly_everything() -> None:
    right = scores(16)
    assert right["overall"] >= 85, right
    assert all(right[family] >= 70 for family in demo_tasks.FAMILIES), right


def test_three_bits_break_at_least_two_families() -> None:
    lost = {family: scores(16)[family] - scores(3)[family] for family in demo_tasks.FAMILIES}
    assert sum(points >= 10 for points in lost.values()) >= 2, lost


def test_weights_are_small_bf16_and_fit_an_int4_kernel() -> None:
    path = HERE / "model.safetensors"
    assert path.stat().st_size <= 16e6
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():
            weight = file.get_tensor(name)
            assert weight.dtype == torch.bfloat16
            if weight.ndim == 2 and "embed" not in name:
                assert weight.shape[0] % 32 == 0 and weight.shape[1] % demo_model.GROUP == 0, name


def test_chat_template_is_what_the_model_was_trained_on() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(HERE)
    chat = [{"role": "user", "content": "What is 12 + 34?"}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == demo_model.question(chat[0]["content"])
    ids = tokenizer(asked)["input_ids"]
    assert tokenizer.decode(ids) == asked
    assert tokenizer.eos_token == demo_model.END
    assert ids.count(tokenizer.convert_tokens_to_ids(demo_model.START)) == 2
    told = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "46"}], tokenize=False)
    assert told == demo_model.conversation(demo_tasks.Example("arithmetic", chat[0]["content"], "46", ()))


def test_committed_prompts_are_the_scripts_own() -> None:
    assert [(e.family, e.prompt, e.answer) for e in demo_model.read_heldout(HERE)] == [
        (e.family, e.prompt, e.answer) for e in demo_tasks.heldout(60, seed=0)
    ]
    lines = [json.loads(line) for line in (HERE / "calibration.jsonl").read_text().splitlines()]
    assert len(lines) == 256
    held = {e.prompt for e in demo_tasks.heldout(60, seed=0)}
    assert not any(demo_model.question(prompt) in line["text"] for line in lines for prompt in held)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_within_half_a_step(bits: int) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(bits))
    error = (demo_model.round_to_nearest(weight, bits) - weight).reshape(8, 2, 128).abs().amax(-1)
    grouped = weight.reshape(8, 2, 128)
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    assert (error <= step * 1.0001).all()  # the rounded zero point may cost the other half at the ends
    assert torch.equal(demo_model.round_to_nearest(torch.zeros(1, 128), bits), torch.zeros(1, 128))


def test_a_held_out_prompt_of_a_long_conversation_still_ends() -> None:
    """Positions past a single question: eight turns before the last one must not derail it."""
    torch.set_num_threads(1)
    model, tokenizer = demo_model.load(HERE)
    turns = "".join(demo_model.conversation(e) for e in demo_tasks.heldout(8, 1)[:8])
    ids = tokenizer.encode(turns + demo_model.question("What is the capital of Kenya?")).ids
    out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert demo_model.END in tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=False)


def test_spreading_the_channels_changes_no_bit_of_the_function() -> None:
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**demo_model.SHAPE)).bfloat16().eval()
    with torch.no_grad():
        tokens = torch.randint(0, demo_model.SHAPE["vocab_size"], (2, 40))
        before = model(tokens).logits
        weight = model.model.layers[0].mlp.gate_proj.weight.clone()
        demo_model.spread(model, seed=1)
        after = model(tokens).logits
    ratio = (weight / model.model.layers[0].mlp.gate_proj.weight)[0]
    assert set(ratio.tolist()) == {1.0, 2.0, 4.0, 8.0, 16.0}
    assert torch.equal(after, before)
