"""How far a quantized model is from the original, teacher-forced: both read the same tokens, neither generates.

Over positions t with next-token distributions p (original) and q (quantized):

    KL            mean over t of sum_v p(v) ln(p(v) / q(v))            nats a token; 0 for the same model
    perplexity    exp(mean over t of -ln p(next token))
    agreement     share of positions whose most likely token is the same
    SQNR          10 log10(||h||^2 / ||h - hhat||^2) of each block's output h, in dB; about 6 dB is one bit

Greedy texts are not compared: one near-tie flips a token, and everything after it differs for no other reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.packing import AwqTensors, unpack_awq
from quantize.scheme import dequantize
from quantize.sequences import batches
from quantize.weights import open_model

_PACKED = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Fidelity:
    """`positions` next-token distributions compared; `sqnr_db` is by block, first to last."""

    positions: int
    kl_nats: float
    perplexity_original: float
    perplexity_quantized: float
    top1_agreement: float
    sqnr_db: tuple[float, ...]


def load_dequantized(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A plain transformers model with the weights that an AWQ checkpoint's kernel multiplies with: the reference.

    In float32 the weights are exact. Raises ModelError where the directory holds no AWQ checkpoint.
    """
    model = open_model(path)
    quantization = model.config.get("quantization_config", {})
    if quantization.get("quant_method") != "awq" or quantization.get("version") != "gemm":
        raise ModelError(f"{path} with quantization_config {quantization}", "awq, version gemm", "Quantize it first")
    tensors = model.read(model.files)
    for name in [name.removesuffix(".qweight") for name in model.files if name.endswith(".qweight")]:
        packed = AwqTensors(*(tensors.pop(f"{name}.{part}") for part in _PACKED))
        tensors[f"{name}.weight"] = dequantize(unpack_awq(packed))
    return _build(path, tensors, dtype)


def load_original(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as it was before quantization, as `load_dequantized` gives the one after."""
    model = open_model(path)
    return _build(path, model.read(model.files), dtype)


def _build(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it would look for kernels of its own
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype)
    missing, unexpected = model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ModelError(
            f"{path}: tensors missing {sorted(set(missing) - tied)[:3]}, unknown {sorted(unexpected)[:3]}",
            "those that its config.json implies",
            "Fetch or quantize it again",
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def compare(original: Any, quantized: Any, sequences: Sequence[Sequence[int]]) -> Fidelity:
    """Fidelity of `quantized` to `original`, both transformers models, over sequences of token ids."""
    kl = agreed = positions = predicted = 0.0
    nll = torch.zeros(2, dtype=torch.float64)
    signal = torch.zeros(len(original.model.layers), dtype=torch.float64)
    noise = torch.zeros_like(signal)
    for batch in batches(sequences):
        real, follows = batch.real, batch.real[:, 1:]
        (logp, hidden), (logq, hidden_q) = (_forward(model, batch.ids) for model in (original, quantized))
        kl += float((logp.exp() * (logp - logq)).sum(dim=-1)[real].sum(dtype=torch.float64))
        agreed += float((logp.argmax(dim=-1) == logq.argmax(dim=-1))[real].sum())
        positions += float(real.sum())
        predicted += float(follows.sum())
        for i, p in enumerate((logp, logq)):
            nll[i] -= p[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0][follows].sum(dtype=torch.float64)
        for i, (h, h_q) in enumerate(zip(hidden, hidden_q, strict=True)):
            signal[i] += (h[real].double() ** 2).sum()
            noise[i] += ((h - h_q)[real].double() ** 2).sum()
    before, after = torch.exp(nll / predicted).tolist()
    sqnr = 10 * torch.log10(signal / noise)
    return Fidelity(int(positions), kl / positions, before, after, agreed / positions, tuple(sqnr.tolist()))


def _forward(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, float32 [sequences, length, vocabulary], and each block's output."""
    hidden: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return torch.log_softmax(logits.float(), dim=-1), hidden
