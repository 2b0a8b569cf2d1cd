"""vLLM serves AWQ and GPTQ checkpoints with our kernels: `--quantization kneebench`.

vLLM finds `register` by an entry point of the group vllm.general_plugins and calls it in each of its processes;
harness/engines/plugin.py shows it to the servers that a sweep starts. Of each linear layer:

    create_weights    parameters as the checkpoint stores them: vLLM loads them, cuts them for tensor parallelism, and
                      lays q, k, v and gate, up side by side
    process_weights   kneebench::prepare, once; what the checkpoint stored is let go
    apply             kneebench::linear

vLLM 0.32 ignores g_idx and refuses desc_act, and wants GPTQ symmetric, on a CPU of 4 bits. Here what is stored is what
is multiplied: zero points, 4 and 8 bits, and g_idx of any order as long as its groups are of one size.

The one module of ours that imports vLLM, and it runs in vLLM's environment: of our own dependencies it needs torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.transformers_utils.config import get_safetensors_params_metadata

from quantize.kernels import operators
from quantize.layout import Layout, parse
from quantize.scheme import PER_CHANNEL, Scheme

NAME = "kneebench"
_SERVED = ("awq", "gptq")
_STORED = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32

logger = init_logger("vllm.kneebench")  # below vLLM's own, or its handler would not print it

Loader = Callable[..., None]


def register() -> None:
    """Tell vLLM of `--quantization kneebench`. May be called again."""
    register_quantization_config(NAME)(KneebenchConfig)


class KneebenchConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not here for mypy to see
    """What config.json says of a checkpoint's quantized layers, and the method for each."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.stored: list[str] = []
        """The modules that the checkpoint has integers of; empty where it cannot be asked (--load-format dummy)."""

    def __repr__(self) -> str:
        return f"KneebenchConfig({self.layout})"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json", "quant_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KneebenchConfig":
        """Raises SchemeError for a layout that the kernels do not read, as AWQ's "gemv" or Marlin's own."""
        return cls(parse(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Only when asked for by name; vLLM itself says so where the checkpoint is of another method."""
        return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") in _SERVED else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """vLLM's own drops g_idx."""
        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """See which modules the checkpoint has integers of: not every tool lists in config.json what it left alone."""
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.stored = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.stored = hf_to_vllm_mapper.apply_list(self.stored)

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise ValueError(f"{prefix}: a mixture of experts. {NAME} serves dense models: leave --quantization out.")
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        scheme = self.scheme_of(prefix)
        if scheme is not None:
            return KneebenchLinearMethod(prefix, self.layout.format, scheme)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()

    def scheme_of(self, prefix: str) -> Scheme | None:
        """The scheme of a layer by vLLM's name for it; None where it is left in 16 bit.

        Raises ValueError where the parts that vLLM fuses into one matrix differ.
        """
        parent, dot, leaf = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        schemes = {self.layout.scheme_of(part) if self._is_stored(part) else None for part in parts}
        if len(schemes) > 1:
            raise ValueError(f"{prefix}: {', '.join(parts)} have several schemes, and vLLM fuses them into one matrix.")
        return schemes.pop()

    def _is_stored(self, name: str) -> bool:
        return not self.stored or any(name == module or name.endswith(f".{module}") for module in self.stored)


@register_weight_loader_v2_supported_method
class KneebenchLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer, or the output head, of 4 or 8 bits."""

    def __init__(self, prefix: str, layout: str, scheme: Scheme) -> None:
        if scheme.bits not in (4, 8):
            raise ValueError(
                f"{prefix}: {scheme.bits} bits. {NAME} has kernels for 4 and 8; `python -m quantize.expand` makes "
                "plain 16-bit weights of the others."
            )
        self.prefix, self.layout, self.scheme = prefix, layout, scheme
        self.n = self.k = 0
        self.is_split = False
        """Whether this process has a part of the layer's inputs only."""

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters in the checkpoint's layout (quantize/packing.py has the table), for vLLM to load."""
        self.k, self.n = input_size_per_partition, sum(output_partition_sizes)
        self.is_split = input_size_per_partition != input_size
        a_row = self.scheme.group_size == PER_CHANNEL
        size = self.k if a_row else self.scheme.group_size
        per_word = _WORD // self.scheme.bits
        if self.k % size or any(part % per_word for part in output_partition_sizes):
            raise ValueError(
                f"{self.prefix}: {self.k} inputs in groups of {size}, and outputs of {output_partition_sizes}, "
                f"{per_word} to a word. Both have to come out even: take a smaller --tensor-parallel-size."
            )
        groups, in_rows = self.k // size, self.layout == "awq"
        packed = {"packed_factor": per_word, "output_dim": 1}
        load = {"weight_loader": extra_weight_attrs["weight_loader"]}
        words = (self.k, self.n // per_word) if in_rows else (self.k // per_word, self.n)
        qweight = torch.empty(words, dtype=torch.int32)
        qzeros = torch.empty(groups, self.n // per_word, dtype=torch.int32)
        scales = torch.empty(groups, self.n, dtype=params_dtype)
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(data=qweight, input_dim=0, packed_dim=1 if in_rows else 0, **packed, **load),
        )
        if a_row:  # the one group belongs to each process, whichever inputs it has
            layer.register_parameter("qzeros", PackedColumnParameter(data=qzeros, packed_dim=1, **packed, **load))
            layer.register_parameter("scales", ChannelQuantScaleParameter(data=scales, output_dim=1, **load))
        else:
            layer.register_parameter(
                "qzeros", PackedvLLMParameter(data=qzeros, input_dim=0, packed_dim=1, **packed, **load)
            )
            layer.register_parameter("scales", GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, **load))
        if not in_rows:  # old files may have no g_idx: then each group is neighbours
            neighbours = torch.arange(self.k, dtype=torch.int32) // size
            load = {"weight_loader": _alike(self.prefix, load["weight_loader"])}
            layer.register_parameter("g_idx", RowvLLMParameter(data=neighbours, input_dim=0, **load))

    def process_weights_after_loading(self, layer: Module) -> None:
        """Rewrite the layer into the kernels' tiles. Raises InputError where its groups are not all of one size."""
        stored = {name: getattr(layer, name).data for name in _STORED if hasattr(layer, name)}
        order = self._order(stored.get("g_idx"))
        prepared = torch.ops.kneebench.prepare(
            stored["qweight"],
            stored["qzeros"],
            stored["scales"],
            order,
            self.layout,
            self.scheme.bits,
            self.scheme.group_size,
        )
        for name in stored:
            delattr(layer, name)
        for name, tensor in zip(("tiles", "scales", "zeros", "perm"), prepared, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        logger.info_once(
            "Using %s for %d-bit layers in the %s layout",
            "KneebenchCudaKernel" if prepared[0].is_cuda else "KneebenchTorchKernel",
            self.scheme.bits,
            self.layout,
        )

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.kneebench.linear(
            x,
            layer.tiles,
            layer.scales,
            layer.zeros,
            layer.perm,
            self.scheme.bits,
            self.scheme.group_size,
            self.n,
            self.k,
        )
        return y if bias is None else y + bias

    def _order(self, g_idx: Tensor | None) -> Tensor | None:
        """The group of each input; None where groups are neighbours."""
        if g_idx is None:
            return None
        if self.is_split:
            g_idx = g_idx - g_idx[0]  # the scales of this process begin with its own first group
        if operators.neighbours(g_idx, self.scheme.group_size):
            return None
        if self.is_split:
            raise ValueError(
                f"{self.prefix}: act-order scatters each group over all inputs, so they cannot be split between "
                "processes. Allowed: --tensor-parallel-size 1."
            )
        return g_idx


def _alike(prefix: str, load: Loader) -> Loader:
    """`load`, for what the parts of a fused layer have to have in common. Raises ValueError where they differ."""
    first: list[Tensor] = []

    def load_alike(parameter: Parameter, loaded: Tensor, *shard: Any, **named: Any) -> None:
        if first and not torch.equal(first[0], loaded):
            raise ValueError(f"{prefix}: its parts have different g_idx, and vLLM fuses them into one matrix.")
        first[:] = [loaded]
        load(parameter, loaded, *shard, **named)

    return load_alike
