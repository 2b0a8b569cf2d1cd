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
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantize import products
from quantize.blocks import Family, Half, Heads, Site, Stage, core_of, family_of, heads_of, linear
from quantize.devices import in_order
from quantize.errors import ModelError, RunError
from quantize.sequences import Batch, batches
from quantize.store import Store
from quantize.weights import ModelDir

_ATTENTION = "self_attn"
_ROWS = 1024
"""Of a Gram matrix at a time, where it is changed as a whole: it is hundreds of MB for a wide layer."""
_HIDDEN = "hidden"
"""What the store has the hidden states under, before the number of their batch."""


@dataclass(frozen=True)
class InputStats:
    """What a site sees. gram: float32 [in, in], mean over tokens; abs_max: float32 [in]."""

    gram: Tensor
    abs_max: Tensor

    def scaled(self, scale: Tensor) -> "InputStats":
        """The statistics of x / scale, [in]."""
        gram = torch.empty_like(self.gram)
        for row in range(0, len(gram), _ROWS):  # a second matrix of this size is enough
            rows = slice(row, row + _ROWS)
            torch.div(self.gram[rows], torch.outer(scale[rows], scale), out=gram[rows])
        return InputStats(gram, self.abs_max / scale)


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


@dataclass(frozen=True)
class Step:
    """One block of the walk: change `block` in place, and move the calibration set through it.

    prefix: of the block's tensors in the checkpoint; stored: the types that the checkpoint's tensors have, by their
    names in the block; flow: None without calibration; arithmetic: of the products in the block's forward, whose sums,
    norms and hidden states stay float32; onward: whether anybody wants the hidden states behind it; beside: the same
    block on other devices, which share in moving the calibration set.
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
    onward: bool = True
    beside: tuple["Step", ...] = ()

    @property
    def sides(self) -> tuple["Step", ...]:
        """This step, and those beside it."""
        return self, *self.beside

    def agree(self) -> None:
        """Give the blocks beside this one what it has become."""
        for other in self.beside:
            other.block.load_state_dict(self.block.state_dict())

    def advance(self, visit: Visit | None = None) -> None:
        """Move the hidden states through the block; site by site, if there is somebody to visit them.

        Raises RunError where a block puts out NaN or infinity.
        """
        if self.flow is None:
            return
        if visit is not None:
            _by_site(self, visit)
            return
        self.agree()
        sides = self.sides
        moved = in_order(
            lambda at, batch: forward(sides[at], hidden(sides[at], batch), batch), len(self.flow), len(sides)
        )
        for batch, states in enumerate(moved):
            put(self, batch, states)


@torch.no_grad()
def _by_site(step: Step, visit: Visit) -> None:
    """Run `step`'s block site by site, and put the hidden states behind it in the place of those before it.

    A site's statistics are gathered as its inputs are made, and each is made once: what a stage adds to the hidden
    states is normed for the next one while it is at hand.
    """
    flow = step.flow
    if flow is None:
        raise ValueError("this walk has no calibration set")
    _check_parts(step)
    norms = [step.block.get_submodule(stage.halves[0].norm) for stage in step.family.stages]
    gathered = Gathered()
    for batch in range(len(flow)):
        gathered.add(_first(norms[0](hidden(step, batch))), flow.real[batch])
    for number, stage in enumerate(step.family.stages):
        visit(stage.inputs, gathered.stats(_name(step)))  # a factor in the norm is in what it gives from here on
        factors: dict[str, Tensor | None] = {}
        for half in stage.halves:
            step.agree()
            gathered = Gathered()
            for batch, inner in enumerate(_inner(step, half)):
                gathered.add(inner, flow.real[batch])
                flow.store.put(f"{half.core}.{batch}", inner)
            factors[half.core] = visit(half.output, gathered.stats(_name(step)))
        following = norms[number + 1] if number + 1 < len(norms) else None
        if following is None and not step.onward:
            return
        step.agree()
        gathered = Gathered()
        for batch, after in enumerate(_after(step, stage, factors)):
            put(step, batch, after)
            for half in stage.halves:
                flow.store.drop(f"{half.core}.{batch}")
            if following is not None:
                gathered.add(_first(following(after)), flow.real[batch])


def _inner(step: Step, half: Half) -> Iterator[Tensor]:
    """Of each batch what the core of `half` gives its last layer, on the step's device."""
    assert step.flow is not None
    sides = step.sides
    with ExitStack() as stack:
        cores = [stack.enter_context(core_of(side.block, half)) for side in sides]

        def inner(at: int, batch: int) -> Tensor:
            side = sides[at]
            normed = _first(side.block.get_submodule(half.norm)(hidden(side, batch)))
            return _call(side, cores[at], normed, _arguments(side, batch, half)).to(step.device)

        yield from in_order(inner, len(step.flow), len(sides))


def _after(step: Step, stage: Stage, factors: Mapping[str, Tensor | None]) -> Iterator[Tensor]:
    """Of each batch the hidden states behind `stage`, on the step's device.

    factors: what has moved from the inputs of each half's last layer into the operation before, or None.
    """
    assert step.flow is not None
    sides, store = step.sides, step.flow.store

    def after(at: int, batch: int) -> Tensor:
        side = sides[at]
        states = hidden(side, batch)
        for half in stage.halves:
            inner, factor = store.get(f"{half.core}.{batch}").to(side.device), factors[half.core]
            given = inner if factor is None else inner / factor.to(side.device)
            states = states + _tail(side, half, given)
        return states.to(step.device)

    yield from in_order(after, len(step.flow), len(sides))


class Gathered:
    """The statistics of a site as its inputs come by."""

    def __init__(self) -> None:
        self._gram = self._loudest = torch.empty(0)
        self._tokens = 0

    def add(self, x: Tensor, real: Tensor) -> None:
        """Take in `x` [sequences, length, in] where `real` [sequences, length] is true."""
        x = x.flatten(0, -2) if bool(real.all()) else x[real.to(x.device)]
        if not self._tokens:
            self._gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._loudest = torch.zeros_like(self._gram[0])
        add_gram(self._gram, x.T.contiguous())
        self._loudest = torch.maximum(self._loudest, torch.maximum(x.amax(dim=0), -x.amin(dim=0)))
        self._tokens += len(x)

    def stats(self, source: str) -> InputStats:
        """Of all that was taken in, which came out of `source`, and is then given away. Raises RunError where it was
        not finite."""
        gram, self._gram = self._gram, torch.empty(0)
        _mirror(gram)
        _check_finite(source, gram)
        return InputStats(gram.div_(self._tokens), self._loudest)


def _mirror(gram: Tensor) -> None:
    """Make `gram` [in, in] symmetric in place, by what is on and above its diagonal."""
    for start in range(0, len(gram), _ROWS):
        end = min(start + _ROWS, len(gram))
        block = gram[start:end, start:end].triu_()
        block += block.triu(1).T
        gram[end:, start:end] = gram[start:end, end:].T


def _name(step: Step) -> str:
    return f"block {step.index}"


def _check_finite(source: str, x: Tensor) -> None:
    if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(x)):  # which hands NaN on, in one pass
        raise RunError(f"{source} puts out NaN or infinity", "finite activations", "Check the model's weights")


def _tail(step: Step, half: Half, inner: Tensor) -> Tensor:
    """What a half adds to the hidden states, from its last layer's input."""
    output = _call(step, linear(step.block, half.output.linears[0]), inner, {})
    return output if half.after is None else step.block.get_submodule(half.after)(output)


def _call(step: Step, module: nn.Module, inputs: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What `module` makes of `inputs` in the walk's arithmetic, float32."""
    if step.arithmetic == torch.float32:
        with products.Faster():
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
    inputs = parts = hidden(step, 0)[:1]
    arguments = {name: _first_row(value) for name, value in _arguments(step, 0).items()}
    for stage in step.family.stages:
        start = parts
        for half in stage.halves:
            with core_of(block, half) as core:
                normed = block.get_submodule(half.norm)(start)
                inner = _call(step, core, normed, arguments if half.core == _ATTENTION else {})
            parts = parts + _tail(step, half, inner)
    whole = _call(step, block, inputs, arguments)
    near = 1e-4 if step.arithmetic == torch.float32 else 2**-6
    if not torch.allclose(parts, whole, rtol=10 * near, atol=near * float(whole.abs().max())):
        raise ModelError(
            "a block that does not compute what its family's blocks do",
            "the architectures of quantize/blocks.py as transformers has them",
            "This version of transformers may have changed the architecture: see its release notes",
        )


def _first_row(value: Any) -> Any:
    """Of what a block is called with for a batch, what its first sequence needs."""
    if isinstance(value, tuple):
        return tuple(_first_row(item) for item in value)
    return value[:1] if isinstance(value, Tensor) and value.ndim > 1 else value


def add_gram(gram: Tensor, channels: Tensor, tiles: int = 4) -> None:
    """Add X'X to `gram` [in, in], its upper triangle alone: X', `channels` [in, tokens], is cut into `tiles`, and what
    lies below the diagonal tiles is left out, which saves three eighths of the work."""
    size = -(-len(channels) // tiles)
    for start in range(0, len(channels), size):
        gram[start : start + size, start:] += products.linear(channels[start : start + size], channels[start:])


@torch.no_grad()
def forward(step: Step, inputs: Tensor, batch: int) -> Tensor:
    """The outputs of the block for one batch of `inputs`, which are those of `hidden` or stand for them."""
    return _call(step, step.block, inputs, _arguments(step, batch))


def hidden(step: Step, batch: int) -> Tensor:
    """The hidden states of one batch before the block, on its device."""
    assert step.flow is not None
    return step.flow.store.get(f"{_HIDDEN}.{batch}").to(step.device)


def put(step: Step, batch: int, hidden: Tensor) -> None:
    """Put the `hidden` states of one batch behind the block in the place of those before it; they must be finite."""
    assert step.flow is not None
    _check_finite(_name(step), hidden)
    step.flow.store.put(f"{_HIDDEN}.{batch}", hidden)


def _arguments(step: Step, batch: int, half: Half | None = None) -> dict[str, Any]:
    """What the block, or the core of a half, is called with besides its input: only attention takes anything."""
    assert step.flow is not None
    if half is not None and half.core != _ATTENTION:
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
    to_the_end: bool = True,
    beside: Sequence[str] = (),
    stride: int = 1,
) -> Iterator[Step]:
    """Yield each block of `model` from `start` on, with the calibration `sequences` of token ids before it; without
    any, with none.

    What the caller makes of a block is what the calibration set goes through: a block's inputs are the outputs of the
    QUANTIZED blocks before it, for those are what it will see when served. What the last block puts out is computed if
    it is wanted (`to_the_end`). To begin at a later block, `store` has to hold the hidden states before it
    (`hidden.<batch>`), which it does after a walk that got there. `beside` are more devices, for the calibration set to
    be spread over; without one, a walk can leave blocks to others and take each `stride`th.
    """
    family = family_of(model.config.get("model_type"))
    skeleton = skeleton_of(model)
    heads = heads_of(skeleton.config)
    flow = _embed(skeleton, model, family, batches(sequences), store or Store(2**62), start) if sequences else None
    layers = skeleton.model.layers
    for index, layer in list(enumerate(layers))[start::stride]:
        prefix = f"model.layers.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in model.read(model.names(prefix)).items()}
        stored = {name: tensor.dtype for name, tensor in tensors.items()}
        block = _materialise(layer, tensors, prefix, device)
        del tensors
        onward = to_the_end or index + 1 < len(layers)
        step = Step(index, len(layers), prefix, block, family, heads, stored, flow, device, arithmetic, onward)
        copies = tuple(replace(step, block=deepcopy(block).to(other), device=other) for other in beside if flow)
        yield replace(step, beside=copies)
        for side in (step, *copies):
            side.block.to("meta")


def skeleton_of(model: ModelDir) -> Any:
    """The model's modules without any memory behind their weights."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
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
        block.load_state_dict(dict(tensors))  # which widens them as it copies
    except RuntimeError as error:
        raise ModelError(
            f"tensors under {prefix} of other shapes ({error})", "the shapes that config.json implies", "Fetch it again"
        ) from error
    return block.requires_grad_(False)
