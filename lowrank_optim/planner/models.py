"""Which model is meant: a name, a config.json, a transformers config, or a module; and how it is built without numbers.

transformers is imported when a name or a config needs it; modules of any kind and diffusion transformers do without.
"""

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.planner import dit
from lowrank_optim.planner.catalog import BUILT_IN
from lowrank_optim.planner.errors import PlanError, did_you_mean
from lowrank_optim.planner.simulation.shapes import META
from lowrank_optim.planner.simulation.simulate import default_dtype, without_numbers

BASIC = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Fields that say the size of a language model."""

SIZES = (
    *BASIC,
    *("num_key_value_heads", "head_dim"),
    *("moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("image_size", "patch_size", "num_channels"),
)
"""Fields that say the size of any model. Where a config lacks one, transformers would silently take that of another model."""

ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "mlp_ratio"),
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
}
"""Other names that the fields have in configs."""

DEFAULT_LENGTH = 2048
"""Tokens in a sequence where nothing is said."""

_FOREIGN = ("model_type", "architectures", "transformers_version", "quantization_config", "dtype", "torch_dtype")
"""Fields of a config.json that say nothing about training from it."""


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be built without numbers.

    build: on meta tensors, in a type (None: its own); `layers` asks for another number of layers, where `layers` is not None.
    batch: from (samples, tokens in each) the model's input, or None where only an example can say.
    layers: repeated layers of a config; None for modules.
    width: the hidden size of a config.
    sample: what one sample is, such as "image of 3 x 224 x 224"; None for sequences of tokens.
    notes: what was taken out of a config, for the plan's assumptions.
    """

    name: str
    build: Callable[[torch.dtype | None, int | None], nn.Module]
    batch: Callable[[int, int], Any] | None
    layers: int | None
    width: int | None = None
    sample: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def layers_are_equal(self) -> bool:
        """Whether all repeated layers have as many parameters as the first ones, so that few of them stand for all."""
        if self.layers is None or self.layers < 4:
            return True
        two, three, all_of_them = (
            sum(p.numel() for p in self.build(None, layers).parameters()) for layers in (2, 3, self.layers)
        )
        return all_of_them == two + (self.layers - 2) * (three - two)

    def length(self, asked: int | None) -> int | None:
        """Tokens in a sequence: what was asked for, or the default; None for models that read no sequences.

        Raises:
            PlanError: a length was asked for where there are no tokens.
        """
        if self.batch is None or self.sample is not None:
            if asked is not None and self.sample is not None:
                raise PlanError(
                    f"sequence_length is {asked}, but a sample of {self.name} is one {self.sample}: leave it out; batch_size counts "
                    "samples"
                )
            return None
        return asked or DEFAULT_LENGTH


def resolve_model(model: Any) -> ModelChoice:
    """The model that an argument means.

    Raises:
        PlanError: an unknown name (with the nearest ones), a config that lacks fields or is of another kind, transformers missing.
    """
    if isinstance(model, nn.Module):
        batch = _token_batch if _takes_tokens(model) else None
        return ModelChoice(type(model).__name__, lambda dtype, layers: without_numbers(model, dtype), batch, None)
    if isinstance(model, (str, Path)):
        name, fields = _named_fields(str(model))
        return _from_fields(fields, name)
    if isinstance(model, Mapping):
        return _from_fields(dict(model), str(model.get("model_type", "config")))
    if hasattr(model, "model_type") and hasattr(model, "to_dict"):
        return _from_config(model, model.model_type)
    raise PlanError(
        f"model is {type(model).__name__}; give an nn.Module, a transformers config, the path of a config.json, or a name: "
        f"{', '.join(BUILT_IN)}"
    )


def _named_fields(text: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the config of a folder, a config.json, or a model that is known by name."""
    path = Path(text)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json":
        return path.resolve().parent.name if path.name == "config.json" else path.stem, _read(path)
    known = text.strip().lower().replace("_", "-").replace(" ", "-").rpartition("/")[2]
    if known in BUILT_IN:
        return known, BUILT_IN[known]
    raise PlanError(
        f"there is no model {text!r}: {did_you_mean(known, BUILT_IN)}Known by name: {', '.join(BUILT_IN)}; or give the path of a "
        "config.json, or of a folder with one (nothing is downloaded)"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"model {str(path)!r} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise PlanError(f"model {str(path)!r} is no config: it holds a JSON {type(fields).__name__}, not an object")
    return fields


def _from_fields(fields: Mapping[str, Any], name: str) -> ModelChoice:
    if "_class_name" in fields:
        raise PlanError(
            f"{name} is a config of diffusers ({fields['_class_name']}), which the planner does not build: build the model with "
            "diffusers within `with torch.device('meta')`, and pass it with an example_batch"
        )
    kind = fields.get("model_type")
    if kind == "dit":
        _refuse_missing(name, [field for field in dit.NEEDED if fields.get(field) is None])
        return _from_dit(fields, name)
    if not kind:
        _refuse_missing(name, ["model_type", *(field for field in BASIC if not _has(fields, field, {}))])
    library = _transformers()
    if kind not in library.CONFIG_MAPPING:
        hint = did_you_mean(str(kind), [*library.CONFIG_MAPPING, "dit"], cutoff=0.6)
        told = f": {hint}" if hint else "; plan the nn.Module itself, with an example_batch"
        raise PlanError(f"model_type {kind!r} of {name} is not known to transformers {library.__version__}{told}")
    made = library.CONFIG_MAPPING[kind]
    if "text_config" not in fields:  # what a part of a config leaves out is the default of its class
        _refuse_missing(name, [field for field in _sizes(made) if not _has(fields, field, made.attribute_map)])
    given = {key: value for key, value in fields.items() if key not in _FOREIGN}
    try:
        config = library.AutoConfig.for_model(kind, **given)
    except Exception as error:  # whatever its checks of single fields raise
        raise PlanError(f"the config of {name} ({kind}): {str(error).strip()[:300]}") from error
    notes = ("the config's quantization left out: weights in the type of the plan",) * ("quantization_config" in fields)
    return _from_config(config, name, notes)


def _sizes(made: Any) -> list[str]:
    """The fields of a class of configs that have a default, which is the size of one model; None follows from other fields."""
    arguments, names = inspect.signature(made).parameters, made.attribute_map
    own = {field: arguments.get(names.get(field, field)) for field in SIZES if names.get(field) not in SIZES}
    return [field for field, argument in own.items() if argument is not None and argument.default is not None]


def _has(fields: Mapping[str, Any], field: str, aliases: Mapping[str, str]) -> bool:
    names = (field, aliases.get(field, field), *ALIASES.get(field, ()))
    return any(name in fields for name in names)


def _refuse_missing(name: str, missing: list[str]) -> None:
    if missing:
        raise PlanError(
            f"the config of {name} lacks {', '.join(missing)}; without them transformers would take the size of another model"
        )


def _from_config(config: Any, name: str, notes: tuple[str, ...] = ()) -> ModelChoice:
    library = _transformers()
    if (text := config.get_text_config()) is not config:
        notes = (*notes, f"only the language model of {name} ({text.model_type}), not what it sees or hears")
        config = text
    kinds = library.models.auto.modeling_auto
    if config.model_type in kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto, sample = library.AutoModelForCausalLM, None
    elif config.model_type in kinds.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        auto, sample = library.AutoModelForImageClassification, _image(config, name)
    else:
        raise PlanError(
            f"{name} ({config.model_type}) is neither a language model nor an image classifier of transformers: pass the model "
            "itself (an nn.Module; one on the meta device will do) with an example_batch"
        )

    def build(dtype: torch.dtype | None, layers: int | None) -> nn.Module:
        own = copy.deepcopy(config)
        own.use_cache = False
        if layers is not None:
            own.num_hidden_layers = layers
            if getattr(own, "layer_types", None):
                own.layer_types = _some_of_each(own.layer_types, layers)
        try:
            with default_dtype(dtype or torch.bfloat16), META:
                model = auto.from_config(own, dtype=dtype or torch.bfloat16)
        except ValueError as error:
            raise PlanError(
                f"{name}: {str(error).splitlines()[0][:200]}; pass the model itself (an nn.Module)"
            ) from error
        trained: nn.Module = model.train()
        return trained

    def batch(sequences: int, length: int) -> dict[str, Tensor]:
        if positions is not None and length > positions:
            raise PlanError(f"sequence_length is {length}, but {name} has {positions} learned positions")
        return _token_batch(sequences, length)

    def images(count: int, length: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.zeros(count, *_image_shape(config), device=META),
            "labels": torch.zeros(count, dtype=torch.int64, device=META),
        }

    positions = getattr(config, "n_positions", None)
    made = batch if sample is None else images
    return ModelChoice(name, build, made, config.num_hidden_layers, config.hidden_size, sample, notes)


def _some_of_each(types: list[str], layers: int) -> list[str]:
    """The kinds of the first layers, the last of them replaced by kinds that only later layers have."""
    first = types[:layers]
    others = [kind for kind in dict.fromkeys(types) if kind not in first]
    return [*first[: max(0, layers - len(others))], *others][:layers]


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return config.num_channels, height, width


def _image(config: Any, name: str) -> str:
    needed = ("image_size", "num_channels", "hidden_size", "num_hidden_layers")
    if missing := [field for field in needed if not hasattr(config, field)]:
        raise PlanError(
            f"{name} ({config.model_type}) has no {', '.join(missing)}, which the planner needs: pass the model itself (an "
            "nn.Module) with an example_batch"
        )
    return f"image of {' x '.join(map(str, _image_shape(config)))}"


def _from_dit(fields: Mapping[str, Any], name: str) -> ModelChoice:
    size, patch, heads = fields["image_size"], fields["patch_size"], fields["num_attention_heads"]
    if size % patch or fields["hidden_size"] % heads:
        raise PlanError(
            f"the config of {name}: image_size {size} must be a multiple of patch_size {patch}, hidden_size "
            f"{fields['hidden_size']} of num_attention_heads {heads}"
        )

    def build(dtype: torch.dtype | None, layers: int | None) -> nn.Module:
        with default_dtype(dtype or torch.bfloat16), META:
            return dit.DiT(fields, fields["num_hidden_layers"] if layers is None else layers)

    def batch(count: int, length: int) -> dict[str, Tensor]:
        latents = torch.zeros(count, fields["num_channels"], size, size, device=META)
        numbers = torch.zeros(count, dtype=torch.int64, device=META)
        return {"latents": latents, "timesteps": numbers, "labels": numbers, "noise": latents}

    sample = f"latent of {fields['num_channels']} x {size} x {size}"
    return ModelChoice(name, build, batch, fields["num_hidden_layers"], fields["hidden_size"], sample)


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
