"""The models that are known by name: the fields of their config.json, as far as they decide about memory.

Values are those that the authors published; `tests/planner/test_families.py` compares the numbers of parameters with theirs.
"""

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]


def _decoder(model_type: str, hidden: int, ffn: int, layers: int, heads: int, vocabulary: int, **more: Any) -> Fields:
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }


def _llama(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int = 32_000, **more: Any) -> Fields:
    return _decoder("llama", hidden, ffn, layers, heads, vocabulary, **more)


def _mistral(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int = 32_000, **more: Any) -> Fields:
    grouped = {"num_key_value_heads": 8, "sliding_window": None}
    return _decoder("mistral", hidden, ffn, layers, heads, vocabulary, **grouped, **more)


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int, **more: Any) -> Fields:
    return _decoder("qwen2", hidden, ffn, layers, heads, vocabulary, **more)


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> Fields:
    return _decoder("qwen3", hidden, ffn, layers, heads, 151_936, **{"num_key_value_heads": 8, "head_dim": 128, **more})


def _gemma(hidden: int, ffn: int, layers: int, heads: int, keys: int) -> Fields:
    more = {"num_key_value_heads": keys, "head_dim": 256, "tie_word_embeddings": True}
    return _decoder("gemma", hidden, ffn, layers, heads, 256_000, **more)


def _gemma3(hidden: int, ffn: int, layers: int, heads: int, keys: int, **more: Any) -> Fields:
    """The text part; five layers in six see a window only."""
    how = {"num_key_value_heads": keys, "head_dim": 256, "sliding_window": 1024, "tie_word_embeddings": True}
    return _decoder("gemma3_text", hidden, ffn, layers, heads, **{"vocabulary": 262_208, **how, **more})


def _phi3(hidden: int, ffn: int, layers: int, heads: int, keys: int, vocabulary: int, **more: Any) -> Fields:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _decoder("phi3", hidden, ffn, layers, heads, vocabulary, num_key_value_heads=keys, **tokens, **more)


def _gpt2(hidden: int, layers: int, heads: int) -> Fields:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


def _gpt_oss(layers: int, experts: int) -> Fields:
    """Weights of its experts in bfloat16: the 4-bit ones that were published are for inference."""
    heads = {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}
    mixture = {"num_local_experts": experts, "num_experts_per_tok": 4}
    return _decoder("gpt_oss", 2880, 2880, layers, 64, 201_088, **heads, **mixture)


def _mixtral(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int) -> Fields:
    mixture = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    return _decoder("mixtral", hidden, ffn, layers, heads, vocabulary, **mixture)


def _vision(model_type: str, hidden: int, layers: int, heads: int, patch: int, **more: Any) -> Fields:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "num_labels": 1000,
        **more,
    }


def _vit(hidden: int, layers: int, heads: int, patch: int) -> Fields:
    """For images of 224 × 224 and the 1000 classes of ImageNet."""
    return _vision("vit", hidden, layers, heads, patch, image_size=224, num_channels=3)


def _dit(hidden: int, layers: int, heads: int, patch: int) -> Fields:
    """For latents of 4 × 32 × 32 (images of 256 × 256) and the 1000 classes of ImageNet."""
    return _vision("dit", hidden, layers, heads, patch, image_size=32, num_channels=4)


BUILT_IN: Mapping[str, Fields] = {
    # The sizes of the C4 experiments that GaLore, Fira and APOLLO report; 7b and 13b are those of LLaMA itself.
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-3b": _llama(2560, 6848, 32, 32),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 128_256, num_key_value_heads=8),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 128_256, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "mistral-7b": _mistral(4096, 14336, 32, 32),
    "mistral-nemo-12b": _mistral(5120, 14336, 40, 32, 131_072, head_dim=128),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 151_936, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 152_064, num_key_value_heads=4),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(2048, 6144, 48, 32, num_key_value_heads=4)
    | {"model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, vocabulary=262_144, sliding_window=512),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128),
    "phi-2": _decoder("phi", 2560, 10240, 32, 32, 51_200, partial_rotary_factor=0.4),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, 32_064),
    "phi-4": _phi3(5120, 17920, 40, 40, 10, 100_352),
    "phi-4-mini": _phi3(3072, 8192, 32, 24, 8, 200_064, partial_rotary_factor=0.75, tie_word_embeddings=True),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "mixtral-8x7b": _mixtral(4096, 14336, 32, 32, 32_000),
    "mixtral-8x22b": _mixtral(6144, 16384, 56, 48, 32_768),
    "vit-s-16": _vit(384, 12, 6, 16),
    "vit-b-16": _vit(768, 12, 12, 16),
    "vit-l-16": _vit(1024, 24, 16, 16),
    "vit-h-14": _vit(1280, 32, 16, 14),
    "dit-s-2": _dit(384, 12, 6, 2),
    "dit-b-2": _dit(768, 12, 12, 2),
    "dit-l-2": _dit(1024, 24, 16, 2),
    "dit-xl-2": _dit(1152, 28, 16, 2),
}
"""config.json fields of the models known by name."""
