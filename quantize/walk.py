"""Through a model one decoder block at a time, with what its linear layers see on calibration data.

Held at any moment: one block in float32, the hidden states of the calibration set between two blocks ([tokens, hidden],
on disk above a budget), and the Gram matrix of one site. Never the whole model, never its activations.

For each input X [tokens, in] of a linear layer these statistics are enough, whatever is searched afterwards:

    G = X'X / tokens   [in, in]      since the output error of a changed weight is a trace:
                                     ||(W - What) X'||^2 / tokens = tr((W - What) G (W - What)')
    max |x|            [in]          how loud each channel gets (how loud it is lies on G's diagonal)

so a search over hundreds of candidates runs no forward at all. A block is run site by site: the inputs of all sequences
are gathered at one site, a method changes the layers there, and what was gathered goes on through the changed layers to
the next. One pass so gives each layer the inputs that it will see when served, and the block's outputs besides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Family, Half, Heads, Site, core_of, family_of, heads_of, linear
from quantize.errors import ModelError, RunError
from quantize.sequences import Batch, batches
from quantize.store import Store
from quantize.weights import ModelDir


@dataclass(frozen=True)
class InputStats:
    """What a site sees. gram: float32 [in, in], mean over tokens; abs_max: float32 [in]; tokens: how many."""

    gram: Tensor
    abs_max: Tensor
    tokens: int

    def scaled(self, scale: Tensor) -> "InputStats":
        """The statistics of x / scale, [in]."""
        return InputStats(self.gram / torch.outer(scale, scale), self.abs_max / scale, self.tokens)


Visit = Callable[[Site, InputStats], Tensor | None]
"""Called at each site with what it sees; may change the site's layers, whose outputs are then what goes on.

If it moved a factor into the operation before, it returns that, [in]: what was gathered at the site is divided by it,
as it would be if it were computed again."""


@dataclass(frozen=True)
class Flow:
    """The calibration set between two blocks: batches of hidden states in `store`, [sequences, length, hidden] each.

    real: of each batch, bool [sequences, length], False at padding; arguments: of each batch, what each block is called
    with besides its hidden states.
    """

    store: Store
    real: Sequence[Tensor]
    arguments: Sequence[Sequence[Mapping[str, Any]]]

    def __len__(self) -> int:
        return len(self.real)

    @property
    def tokens(self) -> int:
        """How many places hold a token."""
        return sum(int(real.sum()) for real in self.real)


@dataclass(frozen=True)
class Step:
    """One block of the walk: change `block` in place, and move the calibration set through it.

    prefix: of the block's tensors in the checkpoint; stored: the types that the checkpoint's tensors have, by their
    names in the block; flow: None without calibration; arithmetic: of the products in the block's forward, whose sums,
    norms and hidden states stay float32.
    """

    index: int
    total: int
    prefix: str
    block: nn.Module
    family: Family
    heads: Heads
    stored: Mapping[str, torch.dtype]
    flow: Flow | None
    device: str
    arithmetic: torch.dtype = torch.float32

    def advance(self, visit: Visit | None = None) -> None:
        """Move the hidden states through the block; site by site, if there is somebody to visit them.

        Raises RunError where a block puts out NaN or infinity.
        """
        if self.flow is None:
            return
        if visit is not None:
            _by_site(self, visit)
            return
        for batch in range(len(self.flow)):
            _put(self, batch, forward(self, hidden(self, batch), batch))


_HIDDEN = "hidden"


@torch.no_grad()
def _by_site(step: Step, visit: Visit) -> None:
    """Run `step`'s block site by site, and put the hidden states behind it in the place of those before it."""
    flow = step.flow
    if flow is None:
        raise ValueError("this walk has no calibration set")
    _check_parts(step)
    for stage in step.family.stages:
        norm = step.block.get_submodule(stage.halves[0].norm)
        factors: dict[str, Tensor | None] = {}

        def normed(batch: int, norm: nn.Module = norm) -> Tensor:
            return _first(norm(hidden(step, batch)))

        visit(stage.inputs, _gather(step, normed))  # a factor in the norm is in what it gives from here on
        for half in stage.halves:
            with core_of(step.block, half) as core:
                for batch in range(len(flow)):
                    flow.store.put(
                        f"{half.core}.{batch}", _call(step, core, normed(batch), _arguments(step, batch, half))
                    )

            def waiting(batch: int, name: str = half.core) -> Tensor:
                return flow.store.get(f"{name}.{batch}").to(step.device)

            factors[half.core] = visit(half.output, _gather(step, waiting))
        for batch in range(len(flow)):
            after = hidden(step, batch)
            for half in stage.halves:
                inner, factor = flow.store.pop(f"{half.core}.{batch}").to(step.device), factors[half.core]
                after = after + _tail(step, half, inner if factor is None else inner / factor)
            _put(step, batch, after)


def _tail(step: Step, half: Half, inner: Tensor) -> Tensor:
    """What a half adds to the hidden states, from its last layer's input."""
    output = _call(step, linear(step.block, half.output.linears[0]), inner, {})
    return output if half.after is None else step.block.get_submodule(half.after)(output)


def _call(step: Step, module: nn.Module, inputs: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What `module` makes of `inputs` in the walk's arithmetic, float32."""
    if step.arithmetic == torch.float32:
        return _first(module(inputs, **arguments))
    with torch.autocast(torch.device(step.device).type, step.arithmetic):
        return _first(module(inputs, **arguments)).float()


def _check_parts(step: Step) -> None:
    """Raise ModelError where a block's parts, put together by `blocks`, are not the block: a wrong fold is silent.

    Checked on the first sequence of the first block, which costs one forward of it.
    """
    if step.index or step.flow is None:
        return
    block = step.block
    inputs = parts = hidden(step, 0)
    for stage in step.family.stages:
        start = parts
        for half in stage.halves:
            with core_of(block, half) as core:
                normed = block.get_submodule(half.norm)(start)
                inner = _call(step, core, normed, _arguments(step, 0, half))
            parts = parts + _tail(step, half, inner)
    whole = forward(step, inputs, 0)
    near = 1e-4 if step.arithmetic == torch.float32 else 2**-6
    if not torch.allclose(parts, whole, rtol=10 * near, atol=near * float(whole.abs().max())):
        raise ModelError(
            "a block that does not compute what its family's blocks do",
            "the architectures of quantize/blocks.py as transformers has them",
            "This version of transformers may have changed the architecture: see its release notes",
        )


def _gather(step: Step, inputs: Callable[[int], Tensor]) -> InputStats:
    """The statistics of a site's `inputs`, by batch, at the real places."""
    flow = step.flow
    assert flow is not None
    gram = loudest = torch.empty(0)
    tokens = 0
    for batch, real in enumerate(flow.real):
        x = inputs(batch).to(step.device)
        x = x.flatten(0, -2) if bool(real.all()) else x[real.to(x.device)]
        if not tokens:
            gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            loudest = torch.zeros_like(gram[0])
        add_gram(gram, x)
        loudest = torch.maximum(loudest, x.abs().amax(dim=0))
        tokens += len(x)
    gram.triu_().add_(gram.triu(1).T)
    if not torch.isfinite(gram).all():
        raise RunError(
            f"block {step.index} puts out NaN or infinity", "finite activations", "Check the model's weights"
        )
    return InputStats(gram.div_(tokens), loudest, tokens)


def add_gram(gram: Tensor, x: Tensor, tiles: int = 8) -> None:
    """Add X'X to `gram` [in, in], its upper triangle alone: X [tokens, in] is cut into `tiles`, and what lies below the
    diagonal tiles is left out, which saves almost half of the work."""
    size = -(-x.shape[1] // tiles)
    for start in range(0, x.shape[1], size):
        gram[start : start + size, start:].addmm_(x[:, start : start + size].T, x[:, start:])


@torch.no_grad()
def forward(step: Step, inputs: Tensor, batch: int) -> Tensor:
    """The outputs of the block for one batch of `inputs`, which are those of `hidden` or stand for them."""
    return _call(step, step.block, inputs, _arguments(step, batch))


def hidden(step: Step, batch: int) -> Tensor:
    """The hidden states of one batch before the block, on its device."""
    assert step.flow is not None
    return step.flow.store.get(f"{_HIDDEN}.{batch}").to(step.device)


def _put(step: Step, batch: int, hidden: Tensor) -> None:
    assert step.flow is not None
    if not torch.isfinite(hidden).all():
        raise RunError(
            f"block {step.index} puts out NaN or infinity", "finite activations", "Check the model's weights"
        )
    step.flow.store.put(f"{_HIDDEN}.{batch}", hidden)


def _arguments(step: Step, batch: int, half: Half | None = None) -> dict[str, Any]:
    """What the block, or the core of a half, is called with besides its input: only attention takes anything."""
    assert step.flow is not None
    if half is not None and half.core != "self_attn":
        return {}
    return {name: _to(value, step.device) for name, value in step.flow.arguments[batch][step.index].items()}


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _to(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def walk(
    model: ModelDir,
    sequences: Sequence[Sequence[int]] = (),
    device: str = "cpu",
    *,
    store: Store | None = None,
    start: int = 0,
    arithmetic: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Yield each block of `model` from `start` on, with the calibration `sequences` of token ids before it; without
    any, with none.

    What the caller makes of a block is what the calibration set goes through: a block's inputs are the outputs of the
    QUANTIZED blocks before it, for those are what it will see when served. To begin at a later block, `store` has to
    hold the hidden states before it (`hidden.<batch>`), which it does after a walk that got there.
    """
    family = family_of(model.config.get("model_type"))
    skeleton = _skeleton(model)
    heads = heads_of(skeleton.config)
    flow = _embed(skeleton, model, family, batches(sequences), store or Store(2**62), start) if sequences else None
    layers = skeleton.model.layers
    for index, layer in list(enumerate(layers))[start:]:
        prefix = f"model.layers.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in model.read(model.names(prefix)).items()}
        stored = {name: tensor.dtype for name, tensor in tensors.items()}
        block = _materialise(layer, tensors, prefix, device)
        del tensors
        yield Step(index, len(layers), prefix, block, family, heads, stored, flow, device, arithmetic)
        block.to("meta")


def _skeleton(model: ModelDir) -> Any:
    """The model's modules without any memory behind their weights."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"{model.path}/config.json: {error}", "what transformers accepts", "Correct it, or fetch it again"
        ) from error
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return build(config, dtype=torch.float32).eval()


@torch.no_grad()
def _embed(skeleton: Any, model: ModelDir, family: Family, batches: Sequence[Batch], store: Store, start: int) -> Flow:
    """Each batch before the first block, or, with a later `start`, only what the blocks are called with besides.

    The model's own forward makes masks and rotary angles, so it is run with every block replaced by one that notes what
    it is called with and lets the hidden states through. Of the embedding, as large as several blocks, only the rows
    that are looked up are read.
    """
    decoder = skeleton.model
    vocabulary = decoder.embed_tokens.weight.shape[0]
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
    if (highest := int(used[-1])) >= vocabulary:
        raise ModelError(f"a token id of {highest}", f"ids below the vocabulary, {vocabulary}", "Check the tokenizer")
    rows = model.rows("model.embed_tokens.weight", used).float()
    embedding = decoder.embed_tokens
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None
    if hasattr(embedding, "embed_scale"):  # Gemma's, a constant that no checkpoint holds
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    decoder.rotary_emb = type(decoder.rotary_emb)(config=skeleton.config)  # its angles are computed, not stored
    setattr(decoder, family.final, nn.Identity())  # the walk ends before it
    arguments: list[dict[str, Any]] = []

    def note(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        arguments.append(kwargs)
        return hidden_states

    for layer in decoder.layers:
        layer.forward = note
    noted = []
    for number, batch in enumerate(batches):
        ids = torch.searchsorted(used, batch.ids)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        if start == 0:
            store.put(f"{_HIDDEN}.{number}", hidden)
        noted.append(arguments)
        arguments = []
    for layer in decoder.layers:
        del layer.forward
    embedding.to("meta")
    return Flow(store, [batch.real for batch in batches], noted)


def _materialise(layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str, device: str) -> nn.Module:
    """Give a block of the skeleton its weights, in float32 on `device`."""
    if difference := sorted(layer.state_dict().keys() ^ tensors.keys()):
        raise ModelError(
            f"tensors under {prefix} that are missing or unknown: {', '.join(difference)}",
            "those that config.json implies",
            "Fetch it again",
        )
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(
            f"{prefix}{bad[0]} holds NaN or infinity", "finite numbers", "The model is damaged: fetch it again"
        )
    block = layer.to_empty(device=device)
    try:
        block.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ModelError(
            f"tensors under {prefix} of other shapes ({error})", "the shapes that config.json implies", "Fetch it again"
        ) from error
    return block.requires_grad_(False)
