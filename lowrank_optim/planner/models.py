"""Which model is meant: a name, a config.json, a transformers config, or a module; and how it is built without numbers.

transformers is imported when a name or a config needs it; modules of any kind do without.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.simulation.shapes import META
from lowrank_optim.planner.simulation.simulate import default_dtype, without_numbers


def _llama(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int = 32_000, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }


def _like(base: Mapping[str, Any], model_type: str, **changes: Any) -> dict[str, Any]:
    return {**base, "model_type": model_type, **changes}


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


BUILT_IN: dict[str, dict[str, Any]] = {
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
    "mistral-7b": _like(_llama(4096, 14336, 32, 32), "mistral", num_key_value_heads=8, sliding_window=None),
    "qwen2.5-0.5b": _like(_llama(896, 4864, 24, 14, 151_936), "qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": _like(_llama(3584, 18944, 28, 28, 152_064), "qwen2", num_key_value_heads=4),
    "gemma-2b": _like(
        _llama(2048, 16384, 18, 8, 256_000), "gemma", num_key_value_heads=1, head_dim=256, tie_word_embeddings=True
    ),
    "gemma-7b": _like(
        _llama(3072, 24576, 28, 16, 256_000), "gemma", num_key_value_heads=16, head_dim=256, tie_word_embeddings=True
    ),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
"""config.json fields of the models known by name."""

NEEDED = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""Fields without which a config would silently mean transformers' default size, and the names that they have."""


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be built without numbers.

    build: on meta tensors, in a type (None: its own); `layers` asks for another number of layers, where `layers` is not None.
    batch: from (sequences, tokens in each) the model's input, or None where only an example can say.
    layers: repeated layers of a transformers config; None for modules.
    """

    name: str
    build: Callable[[torch.dtype | None, int | None], nn.Module]
    batch: Callable[[int, int], Any] | None
    layers: int | None


def resolve_model(model: Any) -> ModelChoice:
    """The model that an argument means.

    Raises:
        PlanError: an unknown name (with the nearest ones), a config that lacks fields, transformers missing.
    """
    if isinstance(model, nn.Module):
        batch = _token_batch if _takes_tokens(model) else None
        return ModelChoice(type(model).__name__, lambda dtype, layers: without_numbers(model, dtype), batch, None)
    if isinstance(model, (str, Path)):
        name = str(model)
        return _from_fields(_named_fields(name), Path(name).parent.name if name.endswith(".json") else _canonical(name))
    if isinstance(model, Mapping):
        return _from_fields(dict(model), str(model.get("model_type", "config")))
    if hasattr(model, "model_type") and hasattr(model, "to_dict"):
        return _from_config(model, model.model_type)
    raise PlanError(
        f"model is {type(model).__name__}; give an nn.Module, a transformers config, the path of a config.json, or a name: "
        f"{', '.join(BUILT_IN)}"
    )


def _canonical(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _named_fields(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json":
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"model {name!r} cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise PlanError(f"model {name!r} is no config: it holds a JSON {type(fields).__name__}, not an object")
        return fields
    known = _canonical(name)
    if known in BUILT_IN:
        return BUILT_IN[known]
    near = get_close_matches(known, BUILT_IN, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise PlanError(
        f"there is no model {name!r}: {hint}Known by name: {', '.join(BUILT_IN)}; or give the path of a config.json"
    )


def _from_fields(fields: dict[str, Any], name: str) -> ModelChoice:
    missing = [] if fields.get("model_type") else ["model_type"]
    missing += [field for field, names in NEEDED.items() if not any(alias in fields for alias in names)]
    if fields.get("model_type") != "gpt2" and not any(f in fields for f in ("intermediate_size", "n_inner", "ffn_dim")):
        missing.append("intermediate_size")
    if missing:
        raise PlanError(
            f"the config of {name} lacks {', '.join(missing)}; without them transformers would take the size of another model"
        )
    auto = _transformers().AutoConfig
    given = {
        key: value
        for key, value in fields.items()
        if key not in ("model_type", "architectures", "transformers_version")
    }
    try:
        return _from_config(auto.for_model(fields["model_type"], **given), name)
    except ValueError as error:
        raise PlanError(f"model_type {fields['model_type']!r} of {name}: {str(error).splitlines()[0][:200]}") from error


def _from_config(config: Any, name: str) -> ModelChoice:
    library = _transformers()

    def build(dtype: torch.dtype | None, layers: int | None) -> nn.Module:
        own = copy.deepcopy(config)
        own.use_cache = False
        if layers is not None:
            own.num_hidden_layers = layers
            if getattr(own, "layer_types", None):
                own.layer_types = own.layer_types[:layers]
        try:
            with default_dtype(dtype or torch.bfloat16), META:
                model = library.AutoModelForCausalLM.from_config(own, dtype=dtype or torch.bfloat16)
        except ValueError as error:
            raise PlanError(
                f"{name}: {str(error).splitlines()[0][:200]}; pass the model itself (an nn.Module)"
            ) from error
        trained: nn.Module = model.train()
        return trained

    positions = getattr(config, "n_positions", None)

    def batch(sequences: int, length: int) -> dict[str, Tensor]:
        if positions is not None and length > positions:
            raise PlanError(f"sequence_length is {length}, but {name} has {positions} learned positions")
        return _token_batch(sequences, length)

    return ModelChoice(name, build, batch, config.num_hidden_layers)


def _token_batch(sequences: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(sequences, length, dtype=torch.int64, device=META)
    return {"input_ids": tokens, "labels": tokens}


def _takes_tokens(model: nn.Module) -> bool:
    """Whether this is a language model of transformers, which is called with input_ids and labels."""
    return hasattr(model, "config") and callable(getattr(model, "get_output_embeddings", None))


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise PlanError(
            "models by name or config are built by transformers, which is not installed: pip install 'lowrank-optim[hf]'; "
            "or pass an nn.Module with an example_batch"
        ) from error
    return transformers
