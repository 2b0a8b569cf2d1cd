"""How far a quantized model is from the original, teacher-forced: both read the same tokens, neither generates.

Over positions t with next-token distributions p (original) and q (quantized):

    KL            mean over t of sum_v p(v) ln(p(v) / q(v))            nats a token; 0 for the same model
    perplexity    exp(mean over t of -ln p(next token))
    agreement     share of positions whose most likely token is the same
    SQNR          10 log10(||h||^2 / ||h - hhat||^2) of each block's output h, in dB; about 6 dB is one bit

`compare` holds two whole models. `report` walks both, a block of each at a time, ends in the same figures, and adds
those of each linear layer (`layerwise`). Its files:

    fidelity.csv     a row for each linear layer; the header is the field names of `layerwise.LayerFidelity`
    fidelity.json    the figures of the whole, and the layers with the largest errors of their own
    fidelity.png     which layers hurt, at a glance (`figure`)

What is infinite (no error at all) is an empty field in the files.

Greedy texts are not compared: one near-tie flips a token, and everything after it differs for no other reason.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dequantized import open_dequantized
from quantize.errors import CalibrationError, ModelError
from quantize.formats import HEAD
from quantize.head import compare_ends, head_of
from quantize.layerwise import LayerFidelity, compare_blocks, quantize_inputs
from quantize.sequences import Batch, batches
from quantize.store import Store
from quantize.walk import walk
from quantize.weights import ModelDir, open_model

_MEMORY = 2**30
_SAME = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
_WORST = 5
"""Layers that fidelity.json names."""


@dataclass(frozen=True)
class Fidelity:
    """`positions` next-token distributions compared; `sqnr_db` is by block, first to last."""

    positions: int
    kl_nats: float
    perplexity_original: float
    perplexity_quantized: float
    top1_agreement: float
    sqnr_db: tuple[float, ...]


@dataclass(frozen=True)
class FidelityReport:
    """`whole` is the model's; `layers` in the order in which they are computed."""

    original: str
    checkpoint: str
    whole: Fidelity
    layers: tuple[LayerFidelity, ...]


def load_dequantized(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A plain transformers model with the weights that a checkpoint's kernels multiply with: the reference.

    In float32 the weights are exact. Where the scheme quantizes activations (W8A8), the inputs of those layers are
    rounded as well. Raises ModelError where the directory holds no quantized checkpoint, SchemeError where it holds one
    of a layout that is not read here.
    """
    model = open_dequantized(path)
    built = build_model(path, model.read(model.files), dtype)
    for name, (scheme, _) in model.modules.items():
        if scheme.activation_bits is not None:
            quantize_inputs(built.get_submodule(name), scheme.activation_bits)
    return built


def load_original(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as it was before quantization, as `load_dequantized` gives the one after."""
    model = open_model(path)
    return build_model(path, model.read(model.files), dtype)


def build_model(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The model that `path`/config.json describes, with `tensors` by name; ModelError where they do not fit it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
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


def report(
    original: Path,
    checkpoint: Path,
    sequences: Sequence[Sequence[int]],
    device: str = "cpu",
    *,
    activation_bits: int | None = None,
    memory: int = _MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Fidelity of `checkpoint` to `original`, directories both, over sequences of token ids, a block at a time.

    activation_bits: 4 or 8, in place of what the checkpoint says of its quantized layers (W4A4 is evaluated this way);
    memory: bytes of hidden states held, above which they go to disk; progress: called with the blocks done and in all.
    Raises CalibrationError without two tokens in a row, ModelError where the two are not one architecture, RunError
    where a block of either puts out NaN or infinity.
    """
    models = open_model(original), open_dequantized(checkpoint)
    _check_same(*models)
    parts = batches(sequences)
    if not any(int(batch.real.sum(dim=1).max()) > 1 for batch in parts):
        raise CalibrationError("sequences without two tokens in a row", "one at least", "Give longer sequences")
    stores = Store(memory // 2), Store(memory // 2)
    layers: list[LayerFidelity] = []
    sqnr = []
    try:
        walks = (walk(model, sequences, device, store=store) for model, store in zip(models, stores, strict=True))
        for before, after in zip(*walks, strict=True):
            found, block_db = compare_blocks(before, after, models[1].scheme_of, activation_bits)
            layers += found
            sqnr.append(block_db)
            if progress:
                progress(before.index + 1, before.total)
        head = models[1].scheme_of(HEAD)
        whole = _whole(models, stores, parts, device, sqnr, (activation_bits or head.activation_bits) if head else None)
    finally:
        for store in stores:
            store.close()
    return FidelityReport(original.name, checkpoint.name, whole, tuple(layers))


def _check_same(original: ModelDir, quantized: ModelDir) -> None:
    for key in _SAME:
        given, wanted = (model.config.get(key) for model in (quantized, original))
        if given != wanted:
            raise ModelError(f"a checkpoint whose {key} is {given!r}", f"{wanted!r}, the original's", "Give its source")


def _whole(
    models: tuple[ModelDir, ModelDir],
    stores: tuple[Store, Store],
    parts: Sequence[Batch],
    device: str,
    sqnr_db: Sequence[float],
    head_bits: int | None,
) -> Fidelity:
    """The figures of the models' ends, from the hidden states that two finished walks left in `stores`.

    head_bits: of the second model's activations where its output head reads them, None for unrounded.
    """
    names = [f"hidden.{batch}" for batch in range(len(parts))]
    for store in stores:
        for name, batch in zip(names, parts, strict=True):
            store.put(name, store.get(name)[batch.real])
    following = [_following(batch) for batch in parts]
    heads = head_of(models[0], device), head_of(models[1], device, head_bits)
    ends = compare_ends(heads, stores, names, following)
    positions = sum(len(each) for each in following)
    predicted = sum(int((each >= 0).sum()) for each in following)
    before, after = (torch.exp(torch.stack([end.nll[i].sum() for end in ends]).sum() / predicted) for i in (0, 1))
    kl, agreed = sum(float(end.kl_nats.sum()) for end in ends), sum(float(end.agreed.sum()) for end in ends)
    return Fidelity(positions, kl / positions, float(before), float(after), agreed / positions, tuple(sqnr_db))


def _following(batch: Batch) -> Tensor:
    """The token after each real one, -1 where there is none: int64 [real tokens]."""
    after = torch.full_like(batch.ids, -1)
    after[:, :-1] = torch.where(batch.real[:, 1:], batch.ids[:, 1:], -1)
    return after[batch.real]


def write(found: FidelityReport, directory: Path) -> None:
    """Write the three files of the module's text into `directory`, which is made where it is missing."""
    from quantize.figure import draw

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "fidelity.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(LayerFidelity)], lineterminator="\n")
        table.writeheader()
        table.writerows({name: _plain(value) for name, value in asdict(layer).items()} for layer in found.layers)
    worst = sorted(found.layers, key=lambda layer: -layer.own_error_db)[:_WORST]
    weights = sum(layer.weights for layer in found.layers)
    summary = {
        "original": found.original,
        "checkpoint": found.checkpoint,
        **asdict(found.whole),
        "sqnr_db": [_plain(db) for db in found.whole.sqnr_db],
        "mean_bits": round(sum(layer.bits * layer.weights for layer in found.layers) / weights, 3),
        "largest_own_errors": [
            {"block": layer.block, "layer": layer.layer, "bits": layer.bits, "own_error_db": _plain(layer.own_error_db)}
            for layer in worst
        ],
    }
    (directory / "fidelity.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(found, directory / "fidelity.png")


def _plain(value: Any) -> Any:
    """Figures to five digits; None for what is infinite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
