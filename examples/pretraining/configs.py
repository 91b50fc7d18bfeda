"""LLaMA sizes, from one that a laptop trains in minutes to 13B."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    hidden: int
    ffn: int
    layers: int
    heads: int
    length: int  # default sequence length in tokens
    positions: int = 2048


# From 60m on, the sizes of the C4 experiments that GaLore, Fira and APOLLO report.
SIZES = {
    "cpu": Size(128, 352, 4, 4, 128),
    "9m": Size(256, 704, 8, 8, 256),
    "60m": Size(512, 1376, 8, 8, 256),
    "130m": Size(768, 2048, 12, 12, 256),
    "350m": Size(1024, 2736, 24, 16, 256),
    "1b": Size(2048, 5461, 24, 32, 256),
    "3b": Size(2560, 6848, 32, 32, 256),
    "7b": Size(4096, 11008, 32, 32, 256),
    "13b": Size(5120, 13824, 40, 40, 256),
}


def build_model(
    name: str, vocabulary: int, length: int, device: torch.device, dtype: torch.dtype, checkpointing: bool, seed: int
) -> LlamaForCausalLM:
    """A LLaMA with random weights, made directly on the device and in the type that it is trained in."""
    size = SIZES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(size.positions, length),
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if checkpointing and hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif checkpointing:  # its older name
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()
