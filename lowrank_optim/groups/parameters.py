"""The parameters of a model, each with what it is: a matrix, an embedding, a head, a vector."""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lowrank_optim.groups.names import Pattern, list_patterns, matches, names_itself
from lowrank_optim.groups.roles import Role, roles_of

ParamGroup: TypeAlias = dict[str, Any]

_LANGUAGE_HEADS = ("lm_head", "embed_out", "output_projection", "output_layer", "to_logits", "unembed", "output")

_OTHER_HEADS = ("classifier", "score", "qa_outputs", "head", "heads", "fc")

HEAD_NAMES = frozenset(_LANGUAGE_HEADS + _OTHER_HEADS)
"""Module names that mean an output head, as long as no repeated layer (a number in the path) contains the module."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

MATRIX_MODULES = (nn.Linear, *_CONVOLUTIONS)

Kind: TypeAlias = Literal["matrix", "dense", "no_decay"]
Place: TypeAlias = Literal["head", "embeddings", "other"]


@dataclass(frozen=True)
class FoundParameter:
    """One parameter of a model, under all its names, and what it is by default."""

    param: nn.Parameter
    names: tuple[str, ...]
    kind: Kind  # "matrix": low-rank by default; "dense": only if named; "no_decay": never
    layout: str  # of the matrix: "auto", "transposed" or "conv"
    role: Role  # what its module says of it
    place: Place = "other"  # tied weights: the head

    def matches(self, pattern: Pattern) -> bool:
        return any(matches(pattern, name) for name in self.names)

    def is_named_by(self, pattern: Pattern) -> bool:
        """Whether a pattern that matches is about this very tensor, not about a parent module or about everything."""
        return any(matches(pattern, name) and names_itself(pattern, name) for name in self.names)


def find_parameters(model: nn.Module) -> list[FoundParameter]:
    """Every parameter once, in the order of `model.named_parameters()`, classified by the modules that own it."""
    heads = head_weights(model)
    found: dict[int, FoundParameter] = {}
    # Duplicates are kept while walking: a tied weight is what its strictest owner says, and it answers to all its names.
    for path, module in model.named_modules(remove_duplicate=False):
        roles = roles_of(path, module)
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{path}.{name}" if path else name
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"parameter {full_name} has no shape yet (lazy module): run one forward pass first")
            kind, layout = _classify(module, name, param)
            if isinstance(module, nn.ParameterDict) and param.ndim > 1:
                kind = ADAPTER_ENTRIES.get(path.rpartition(".")[2], kind)
            role = roles.get(name, Role())
            kind = role.kind if name in roles else kind
            if kind == "matrix" and id(param) in heads:
                kind = "dense"
            embeds = "Embedding" in type(module).__name__ or isinstance(module, nn.Embedding)
            place: Place = "head" if id(param) in heads else "embeddings" if embeds else "other"
            if (known := found.get(id(param))) is None:
                found[id(param)] = FoundParameter(param, (full_name,), kind, layout, role, place)
                continue
            strictest: Kind = max(known.kind, kind, key=("matrix", "dense", "no_decay").index)
            place = min(known.place, place, key=("head", "embeddings", "other").index)
            found[id(param)] = replace(known, names=(*known.names, full_name), kind=strictest, place=place)
    return list(found.values())


def _classify(module: nn.Module, name: str, param: nn.Parameter) -> tuple[Kind, str]:
    """(kind, layout) of the parameter `name` that `module` holds directly."""
    class_name = type(module).__name__
    # Stacked experts have 2-D biases, nn.MultiheadAttention 3-D ones: the name tells, not the dimension.
    if param.ndim < 2 or "bias" in name.split("_"):
        return "no_decay", "auto"
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "matrix", "auto"
        if isinstance(module, _CONVOLUTIONS):
            return "matrix", "conv"
        # transformers.pytorch_utils.Conv1D, a Linear stored as (in, out). Recognised by name, so that transformers is not imported.
        if class_name == "Conv1D" and param.ndim == 2:
            return "matrix", "transposed"
    if "Norm" in class_name:  # nn.LayerNorm((C, H, W)) has a 3-D weight
        return "no_decay", "auto"
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "matrix", "auto"
    # Learned tokens and positions of vision models, (1, tokens, dim), are 3-D too but no stack of matrices.
    if param.ndim == 3 and param.shape[0] > 1 and "embed" not in f"{class_name}.{name}".lower():
        # transformers marks expert modules whose matrices are stored as (in, out) with this flag (GPT-OSS).
        return "matrix", "transposed" if getattr(module, "is_transposed", False) is True else "auto"
    return "dense", "auto"


ADAPTER_ENTRIES: dict[str, Kind] = {
    **dict.fromkeys(("lora_A", "lora_B"), "matrix"),
    **dict.fromkeys(("lora_E", "lora_diag", "ia3_l"), "no_decay"),
    **dict.fromkeys(("vblora_logits_A", "vblora_logits_B"), "dense"),
}
"""What tensors of two and more dimensions are that adapters keep in an `nn.ParameterDict` of this name: factors, gates, logits."""


def head_weights(model: nn.Module) -> set[int]:
    """`id` of the weights of output heads."""
    heads: list[nn.Module] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] in HEAD_NAMES and not any(part.isdigit() for part in parts):
            heads.append(module)
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):  # models without a head inherit the method
                continue
            if isinstance(head, nn.Module):
                heads.append(head)
    weights: set[int] = set()
    for head in heads:
        layers = [m for m in head.modules() if isinstance(m, MATRIX_MODULES) or type(m).__name__ == "Conv1D"]
        # The last layer alone makes the output: the first layers of a VGG classifier are ordinary large matrices.
        weights |= {id(param) for param in (layers[-1] if layers else head).parameters()}
    return weights


def list_names(entries: list[FoundParameter], limit: int = 12) -> str:
    """The names of parameters, collapsed, for an error message."""
    return list_patterns((entry.names[0] for entry in entries), limit)
