"""Train, export and judge the demo model: a 2.7 M parameter Qwen2 that fits in a test and still has something to lose.

    python tools/demo_model.py train --out scenarios/demo-model      # about half an hour on two cores
    python tools/demo_model.py evaluate scenarios/demo-model --bits 3

Idea: a model that answers the five families of demo_tasks nearly always, with few parameters to spare, so that what
quantization breaks shows as wrong answers and not only as a drift of logits. Constraints: the shapes an INT4 kernel
asks for (inputs a multiple of group 128, outputs of 32) and grouped-query attention, as in the models it stands for.
Trade-off: the schedule is counted in steps and not in minutes, so that the same seed gives the same run; `--minutes`
only refuses to go on for longer than promised.

A row of a batch is filled with short conversations that cannot see each other (a block-diagonal mask), which wastes no
padding; in every sixteenth step a row is one long conversation of many turns, so that later positions are trained too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_tasks
import torch
import torch.nn.functional as F
from demo_tasks import Example
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 1280,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
WEIGHTS = {"facts": 0.2, "arithmetic": 0.24, "reasoning": 0.3, "code": 0.09, "summary": 0.17}
PROMPT_WEIGHT = 0.1  # of a prompt token in the loss; its names and numbers are random, so most of it cannot be learnt
GROUP = 128


def question(prompt: str) -> str:
    return f"{START}user\n{prompt}{END}\n{START}assistant\n"


def conversation(example: Example) -> str:
    return f"{question(example.prompt)}{example.answer}{END}\n"


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE, each digit on its own: a number's tokens are then its columns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"user\n{e.prompt}\nassistant\n{e.answer}\n" for e in demo_tasks.stream("train", seed))
    tokenizer.train_from_iterator(itertools.islice(texts, 20_000), trainer)
    if tokenizer.get_vocab_size() != SHAPE["vocab_size"]:
        raise ValueError(f"BPE found {tokenizer.get_vocab_size()} tokens, the model has {SHAPE['vocab_size']}")
    return tokenizer


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # [rows, length]
    positions: torch.Tensor  # [rows, length], from 0 in each conversation
    weights: torch.Tensor  # [rows, length], of each token as a target
    mask: torch.Tensor  # [rows, 1, length, length], True where a query may look


def encode(tokenizer: Tokenizer, examples: list[Example]) -> list[tuple[list[int], list[float]]]:
    """Tokens and loss weights of each conversation."""
    asked = tokenizer.encode_batch_fast([question(e.prompt) for e in examples])
    answered = tokenizer.encode_batch_fast([f"{e.answer}{END}\n" for e in examples])
    return [
        (q.ids + a.ids, [PROMPT_WEIGHT] * len(q.ids) + [1.0] * (len(a.ids) - 1) + [PROMPT_WEIGHT])
        for q, a in zip(asked, answered, strict=True)
    ]


def pack(pieces: Iterator[tuple[list[int], list[float]]], rows: int, length: int, joined: bool) -> Batch:
    """Fill rows with whole conversations; `joined` makes a row one conversation of many turns."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.zeros(rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length)
    segment = torch.full((rows, length), -1)
    row = at = number = 0
    for ids, weight in pieces:
        if at + len(ids) > length:
            row, at = row + 1, 0
            if row == rows:
                break
        here = slice(at, at + len(ids))
        tokens[row, here] = torch.tensor(ids)
        weights[row, here] = torch.tensor(weight)
        positions[row, here] = torch.arange(at, at + len(ids)) if joined else torch.arange(len(ids))
        segment[row, here] = 0 if joined else number
        weights[row, at] = weights[row, at] if joined and at else 0.0  # nothing comes before a first token
        at, number = at + len(ids), number + 1
    mask = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
    return Batch(tokens, positions, weights, mask)


def batches(tokenizer: Tokenizer, seed: int, tokens: int) -> Iterator[Batch]:
    def pieces() -> Iterator[tuple[list[int], list[float]]]:
        source = demo_tasks.stream("train", seed, WEIGHTS)
        while True:
            yield from encode(tokenizer, list(itertools.islice(source, 512)))

    flow = pieces()
    for step in itertools.count():
        joined = step % 16 == 15
        length = 512 if joined else 128
        yield pack(flow, tokens // length, length, joined)


# --- optimisation ----------------------------------------------------------------------------------------------------


def orthogonalize(g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix, of a stack of matrices [n, rows, columns]."""
    wide = g.shape[1] <= g.shape[2]
    x: torch.Tensor = g if wide else g.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):  # fmt: skip
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x if wide else x.mT).float()


class Muon:
    """Momentum whose update is made orthogonal: every direction of a hidden matrix learns at one rate.

    torch.optim.Muon takes one matrix at a time; on a CPU, stacks of one shape are quicker. The dtype is that of the
    Newton-Schulz products only: a direction need not be exact.
    """

    def __init__(
        self, parameters: list[torch.Tensor], dtype: torch.dtype, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self.dtype = dtype
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.stacks = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(stack), *stack[0].shape) for stack in self.stacks]
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for stack, moment in zip(self.stacks, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in stack if p.grad is not None])
            moment.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(moment, self.momentum), self.dtype)  # Nesterov's look ahead
            update *= max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for p, u in zip(stack, update, strict=True):
                p.mul_(1 - rate * self.decay).sub_(u, alpha=rate)


def token_losses(model: Any, tokens: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The loss of predicting each token but a row's first: [rows, length - 1]."""
    out = model(input_ids=tokens, attention_mask=bias, position_ids=positions, use_cache=False)
    return F.cross_entropy(out.logits[:, :-1].mT.float(), tokens[:, 1:], reduction="none")


def fit(model: Any, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(hidden, torch.bfloat16 if args.bf16 else torch.float32)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    forward = torch.compile(token_losses, dynamic=False) if args.compile else token_losses
    for step, batch in enumerate(itertools.islice(batches(tokenizer, args.seed, args.tokens), args.steps)):
        rate = min((step + 1) / 50, 1 - step / args.steps)  # up within 50 steps, then down in a line to zero
        bias = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9)
        weights = batch.weights[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = forward(model, batch.tokens, batch.positions, bias)
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        for group in adam.param_groups:
            group["lr"] = args.adam * rate
        muon.step(args.muon * rate)
        adam.step()
        model.zero_grad(set_to_none=True)
        minutes = (time.monotonic() - began) / 60
        if step % 50 == 0 or step == args.steps - 1:
            on_answers = losses.detach()[weights == 1.0].mean()
            print(f"step {step:5d}  loss {loss.item():.3f}  answers {on_answers:.4f}  {minutes:5.1f} min", flush=True)
        if step % 500 == 499:
            export(model, tokenizer, args.out, args.seed)  # so that a run cut short leaves something
        if args.probe and step % args.probe == args.probe - 1:
            print(report(model, tokenizer, demo_tasks.heldout(40, 1)), flush=True)
        if minutes > args.minutes:
            raise SystemExit(f"step {step} of {args.steps} after {args.minutes} minutes: give it fewer --steps")


# --- judging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model: Any, tokenizer: Tokenizer, prompts: list[str], limit: int = 48) -> list[str]:
    """Greedy answers, in batches of one prompt length so that nothing is padded."""
    end = tokenizer.token_to_id(END)
    encoded = [tokenizer.encode(question(p)).ids for p in prompts]
    found: dict[int, list[int]] = {}
    for length in sorted({len(ids) for ids in encoded}):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        tokens, cache = torch.tensor([encoded[i] for i in rows]), None
        found.update({i: [] for i in rows})
        for _ in range(limit):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            for i, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                found[i].append(token)
            if all(end in found[i] for i in rows):
                break
    texts = (found[i][: found[i].index(end)] if end in found[i] else found[i] for i in range(len(prompts)))
    return [tokenizer.decode(ids) for ids in texts]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Tokenizer, examples: list[Example]) -> tuple[float, float]:
    """exp(mean negative log-likelihood) of the answers' tokens, and of every token after the first."""
    total = {True: 0.0, False: 0.0}
    count = {True: 0, False: 0}
    for ids, weights in encode(tokenizer, examples):
        tokens = torch.tensor([ids])
        losses = F.cross_entropy(model(input_ids=tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="none")
        answer = torch.tensor(weights[1:]) == 1.0
        for kind in (True, False):
            total[kind] += losses[answer == kind].sum().item()
            count[kind] += int((answer == kind).sum())
    return math.exp(total[True] / count[True]), math.exp(sum(total.values()) / sum(count.values()))


def accuracy(model: Any, tokenizer: Tokenizer, examples: list[Example]) -> dict[str, float]:
    """Share of exactly right greedy answers, in percent: each family, and `overall`."""
    given = answers(model, tokenizer, [e.prompt for e in examples])
    right: dict[str, list[bool]] = {family: [] for family in demo_tasks.FAMILIES}
    for example, text in zip(examples, given, strict=True):
        right[example.family].append(text == example.answer)
    scores = {family: 100 * sum(hits) / len(hits) for family, hits in right.items()}
    return scores | {"overall": 100 * sum(map(sum, right.values())) / len(examples)}


def report(model: Any, tokenizer: Tokenizer, examples: list[Example]) -> str:
    scores = accuracy(model, tokenizer, examples)
    on_answers, on_text = perplexity(model, tokenizer, examples)
    row = "  ".join(f"{name} {score:.1f} %" for name, score in scores.items())
    return f"{row}  perplexity {on_answers:.4f} (answers) {on_text:.3f} (all text)"


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Asymmetric min-max rounding of each run of `group` inputs: scale = (max - min) / (2^bits - 1)."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-low / scale).round()
    levels = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1)
    rounded: torch.Tensor = (levels - zero) * scale
    return rounded.reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def damage(model: Any, bits: int) -> None:
    """Round every linear layer but the embedding and the head, in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(round_to_nearest(module.weight, bits))


def load(folder: Path) -> tuple[Any, Tokenizer]:
    """BF16 weights, computed with in float32: what the weights lost stays lost, the arithmetic adds nothing."""
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.float().eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def read_heldout(folder: Path) -> list[Example]:
    lines = (json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines())
    return [Example(line["family"], line["prompt"], line["answer"], ()) for line in lines]


# --- export ----------------------------------------------------------------------------------------------------------


SPREAD = (0.6, 0.15, 0.1, 0.1, 0.05)
"""Share of a norm's channels that is scaled by 2^0, 2^1 .. 2^4."""
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def spread(model: Any, seed: int) -> None:
    """Give the norms' channels unequal scales, in place, without changing what the model computes.

    Large models grow channels whose activations are many times the others' (Dettmers et al., arXiv 2208.07339; Xiao et
    al., arXiv 2211.10438); the weights that meet them are what simple rounding spoils and what activation-aware methods
    save. Four layers trained in minutes grow none: Muon leaves their weights Gaussian, and three bits cost them
    nothing. So a norm's gain is multiplied by a power of two, channel by channel, and the columns of the weights that
    read it are divided by it. Every product stays what it was, bit for bit in BF16, but a group of weights now has a
    range wider than its important members.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for norm, readers in READERS.items():
            gain = layer.get_submodule(norm).weight
            scale = 2.0 ** torch.multinomial(torch.tensor(SPREAD), len(gain), replacement=True, generator=generator)
            gain.mul_(scale)
            for reader in readers:
                layer.get_submodule(reader).weight.div_(scale)


def export(trained: Any, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    """The files transformers (4 and 5) and vLLM read; configs by hand, since each version writes its own dialect."""
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(trained)
    spread(model, seed)
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    added = {
        str(tokenizer.token_to_id(t)): {
            "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True
        }
        for t in (PAD, START, END)
    }  # fmt: skip
    names = {"bos_token": None, "eos_token": END, "pad_token": PAD, "unk_token": None}
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SHAPE, **ids,
            "torch_dtype": "bfloat16", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
            "use_sliding_window": False,
        },
        "generation_config.json": {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": SHAPE["max_position_embeddings"],
            "clean_up_tokenization_spaces": False, "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
            **names,
        },
        "special_tokens_map.json": {"eos_token": END, "pad_token": PAD},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    held = [{"family": e.family, "prompt": e.prompt, "answer": e.answer} for e in demo_tasks.heldout(60, seed)]
    texts = [{"text": conversation(e)} for e in itertools.islice(demo_tasks.stream("train", seed + 1), 256)]
    for name, lines in (("heldout.jsonl", held), ("calibration.jsonl", texts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    # "eager": on a CPU the backward pass of fused attention takes longer than that of its plain matrix products.
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation="eager"))  # type: ignore[call-arg]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fit(model, tokenizer, args)
    export(model, tokenizer, args.out, args.seed)
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")
    args.folder, args.bits = args.out, [4, 3, 2]
    evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    _, tokenizer = load(args.folder)
    AutoTokenizer.from_pretrained(args.folder)  # must load as any user would load it
    examples = read_heldout(args.folder)
    for bits in [16, *args.bits]:
        model, _ = load(args.folder)
        if bits < 16:
            damage(model, bits)
        print(f"{'BF16' if bits == 16 else f'{bits}-bit'}: {report(model, tokenizer, examples)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    teach = commands.add_parser("train", help="train, export and evaluate")
    teach.add_argument("--out", type=Path, required=True)
    teach.add_argument("--seed", type=int, default=0)
    teach.add_argument("--steps", type=int, default=1800)
    teach.add_argument("--tokens", type=int, default=4096, help="in a step")
    teach.add_argument("--muon", type=float, default=0.015, help="peak learning rate of the hidden matrices")
    teach.add_argument("--adam", type=float, default=0.002, help="peak learning rate of everything else")
    teach.add_argument("--minutes", type=float, default=60, help="give up after this long")
    teach.add_argument("--probe", type=int, default=0, help="print held-out accuracy every so many steps")
    # Defaults: those of the committed model. One thread suffers far less than two from neighbours on the machine.
    teach.add_argument("--threads", type=int, default=1)
    flag = argparse.BooleanOptionalAction
    teach.add_argument("--bf16", action=flag, default=True, help="multiply in bfloat16, which pays where a CPU has AMX")
    teach.add_argument("--compile", action=flag, default=True, help="fuse the model; needs a C++ compiler")
    teach.set_defaults(run=train)
    judge = commands.add_parser("evaluate", help="accuracy and perplexity, in BF16 and rounded")
    judge.add_argument("folder", type=Path)
    judge.add_argument("--bits", type=int, nargs="*", default=[3])
    judge.add_argument("--threads", type=int, default=1)
    judge.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
