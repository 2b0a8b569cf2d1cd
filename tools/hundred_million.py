"""A model of 97 M parameters for measuring quantizers: the demo model's text and planted outliers, in a real width.

    python tools/hundred_million.py OUT [--steps 100] [--tokens 1024]

Idea: what a quantizer costs depends on shapes, and whether it helps on the weights' and activations' statistics, so a
model of 14 blocks, hidden 768, is trained just long enough to leave its random start, and given the outlier channels
that `demo_model.spread` plants. Constraint: a quarter of an hour of one CPU core, without a network. Trade-off: it
predicts the tasks' text but cannot do the tasks; perplexity and KL mean something, accuracy would not. AdamW alone,
because Muon's orthogonalisation of matrices this large costs more than a step of so few tokens.

OUT is some 200 MB in BF16 and is not committed; the seed gives it again (up to the arithmetic of the machine). The
defaults took 6.7 minutes of one core of an AMD EPYC with AVX-512 BF16 and ended at a held-out perplexity of 3.95 on
answers, 4.09 on all text; the loudest channel before each block's projections is 15 to 29 times the median one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import demo_model
import demo_tasks
import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE: dict[str, Any] = demo_model.SHAPE | {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
TOKENIZER = Path(__file__).resolve().parent.parent / "scenarios" / "demo-model" / "tokenizer.json"
WARM_UP = 20
"""Steps in which the learning rate rises; it then falls in a line to zero."""


def fit(model: Any, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """`args.steps` steps of AdamW on `args.tokens` tokens of the demo model's batches each."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
    began = time.monotonic()
    for step, batch in enumerate(itertools.islice(demo_model.batches(tokenizer, args.seed, args.tokens), args.steps)):
        rate = args.rate * min((step + 1) / WARM_UP, 1 - step / args.steps)
        for group in adam.param_groups:
            group["lr"] = rate
        bias = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9)
        weights = batch.weights[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = demo_model.token_losses(model, batch.tokens, batch.positions, bias)
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        model.zero_grad(set_to_none=True)
        minutes = (time.monotonic() - began) / 60
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {minutes:5.1f} min", flush=True)
        if minutes > args.minutes:
            raise SystemExit(f"step {step} of {args.steps} after {args.minutes} minutes: give it fewer --steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024, help="in a step, a multiple of 512")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30, help="give up after this long")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="multiply in bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    demo_model.SHAPE = SHAPE  # what `export` writes into config.json
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation="eager"))  # type: ignore[call-arg]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fit(model, tokenizer, args)
    demo_model.export(model, tokenizer, args.out, args.seed)
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")
    stored, _ = demo_model.load(args.out)
    answers, text = demo_model.perplexity(stored, tokenizer, demo_tasks.heldout(12, 1))
    print(f"held-out perplexity {answers:.2f} (answers) {text:.2f} (all text)")


if __name__ == "__main__":
    main()
