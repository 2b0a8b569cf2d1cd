"""A random model small enough to quantize in a second, saved as a real one would be; tests are its only users.

Some channels of its norms are made loud, as those of trained models are, so that AWQ has something to find.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # a model this small loses more to waiting for a second thread than it gains by it

VOCABULARY = 257  # bytes, and one end

# What a family's config wants besides, or calls otherwise.
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "phi": {"tie_word_embeddings": False},
    "phi3": {"pad_token_id": 0},
}
_SECOND = {"gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}


def build(family: str = "qwen2", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> Any:
    """A transformers model: two blocks, hidden 128, grouped-query attention of 4 heads on 2, gated MLP of 256."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": None,
        **_OWN.get(family, {}),
    }
    torch.manual_seed(seed)
    from_config: Any = AutoModelForCausalLM.from_config
    model = from_config(AutoConfig.for_model(family, **shape | changes), dtype=torch.float32).eval()
    offset = 1.0 if family.startswith("gemma") else 0.0  # Gemma's norms multiply by their weight plus one
    with torch.no_grad():
        for layer in model.model.layers:
            for name, norm in layer.named_children():
                if not name.endswith("layernorm"):
                    continue
                norm.weight.uniform_(0.5, 1.5).sub_(offset)
                if name in ("input_layernorm", _SECOND.get(family, "post_attention_layernorm")):
                    loud = torch.randperm(norm.weight.numel())[:4]
                    norm.weight[loud] = (norm.weight[loud] + offset) * 20 - offset
                if getattr(norm, "bias", None) is not None:
                    norm.bias.normal_(std=0.1)
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5 / 2)
                    if module.bias is not None:
                        module.bias.normal_(std=0.1)
    return model.to(dtype)


def save(path: Path, **options: Any) -> Path:
    """Write such a model with a byte tokenizer to `path`."""
    build(**options).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<|end|>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(path)
    return path
