"""The adapter layers of a model, as peft builds them (0.17 to 0.21), recognised by their attributes, so that peft is not imported."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowrank_optim.kernels.compute import CHUNK_ELEMENTS, compute_dtype, row_chunks
from lowrank_optim.sharding.gathered import find_gathered

PRODUCTS = ("Dora", "ALora", "Velora", "MiCA", "QALora")
"""Beginnings of the names of peft's variants whose layers compute with the product B A, and nothing else of A and B."""

FACTORS = (("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B"))
"""What peft's layers call them."""

COLUMNS = CHUNK_ELEMENTS
"""Elements that a part of `columns_of` may have."""


@dataclass(frozen=True)
class Factors:
    """The two factors of one adapter in one layer.

    layer: that holds them.
    path: its name in the model.
    adapter: name of the adapter.
    a, b: A (r×n) and B (m×r), or those of E experts.
    scaling: s.
    experts: E.
    why_not: what speaks against treating them as a pair; None if nothing does.
    """

    layer: nn.Module
    path: str
    adapter: str
    a: Tensor
    b: Tensor
    scaling: float
    experts: int
    why_not: str | None

    @property
    def is_embedding(self) -> bool:
        """Whether the layer keeps them as parameters of its own."""
        return self.adapter in getattr(self.layer, "lora_embedding_A", {})


def find_factors(model: nn.Module) -> Iterator[Factors]:
    """All adapters of all layers, those too whose factors are no pairs."""
    for path, layer in model.named_modules():
        scalings = getattr(layer, "scaling", None)
        if not isinstance(scalings, Mapping) or not hasattr(layer, "lora_A") or not hasattr(layer, "lora_B"):
            continue
        for adapter, scaling in scalings.items():
            factors = _factors(layer, adapter)
            if factors is not None:
                a, b, experts = factors
                yield Factors(layer, path, adapter, a, b, scaling, experts, _why_not(layer, adapter, a, b))


def base_of(layer: Any) -> Any:
    """The layer whose weights are W₀; None where there is none."""
    return getattr(layer, "base_layer", getattr(layer, "base", None))


def lone_factors(model: nn.Module) -> Iterator[str]:
    """The names of factors whose layer has no partner for them."""
    for path, layer in model.named_modules():
        if not isinstance(getattr(layer, "scaling", None), Mapping):
            continue
        for first, second in FACTORS:
            kept, others = (set(getattr(layer, each, {})) for each in (first, second))
            for here, adapters in ((first, kept - others), (second, others - kept)):
                yield from (f"{path}.{here}.{adapter}".lstrip(".") for adapter in sorted(adapters))


def columns_of(base: Any, rows: int, cols: int, like: Tensor) -> Iterator[Tensor]:
    """The columns of the weights of a linear layer, in parts (rows × some) and in the compute type of `like`.

    They are what unit vectors give, without the bias, so that the layer may keep its weights in any form. `like` has the type and the
    device of an input.
    """
    zero = base(like.new_zeros(1, cols))
    for part in row_chunks(cols, max(rows, cols), COLUMNS):
        unit = like.new_zeros(part.stop - part.start, cols)
        unit.diagonal(part.start).fill_(1.0)
        yield (base(unit) - zero).to(compute_dtype(like.dtype)).mT


def check_factors(model: nn.Module, factors: Iterable[Factors]) -> None:
    """Raise ValueError for factors that `fully_shard` has gathered: an optimizer has others, and what is written to them is lost."""
    gathered = find_gathered(model)
    for each in factors:
        for name, factor in (("A", each.a), ("B", each.b)):
            gathered.check(f"{name} of {each.path}", factor)


def linear_factors(model: nn.Module, adapter: str | None, refused: str) -> list[Factors]:
    """The factors of all layers, if these are linear and have one adapter each, or one of the name `adapter`.

    Args:
        model: with adapters.
        adapter: only this one; None takes all.
        refused: what such a layer cannot do, for messages: "{path} cannot …".

    Raises:
        ValueError: no adapters; a layer with several; a layer that is not linear, or whose factors are no pair; factors that
            `fully_shard` has gathered.
    """
    every = [each for each in find_factors(model) if adapter is None or each.adapter == adapter]
    if not every:
        raise ValueError("the model has no adapters" if adapter is None else f"the model has no adapter {adapter!r}")
    paths = [each.path for each in every]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} has several adapters; say which one by adapter=")
    for each in every:
        why = each.why_not
        if why is None and (each.is_embedding or each.experts > 1 or each.a.dim() != 2 or each.b.dim() != 2):
            why = "its layer is not linear"
        if why is not None:
            raise ValueError(f"{each.path} {refused}: {why}; leave it out of target_modules")
    check_factors(model, every)
    return every


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, int] | None:
    """A, B and the number of experts of an adapter; None where the layer has none of this name."""
    for first, second in FACTORS:
        kept, others = getattr(layer, first, {}), getattr(layer, second, {})
        if adapter in kept and adapter in others:
            a, b = (getattr(each, "weight", each) for each in (kept[adapter], others[adapter]))
            return a, b, int(getattr(layer, "num_experts", 1))
    return None


def _why_not(layer: Any, adapter: str, a: Tensor, b: Tensor) -> str | None:
    for gate in ("lora_diag", "lora_E"):
        if adapter in getattr(layer, gate, {}):
            return f"a gate ({gate}) stands between them"
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if variant != "NoneType" and not variant.startswith(PRODUCTS):
        return f"{variant} computes with more than their product"
    if a.shape[0] != b.shape[1]:
        return f"A is {tuple(a.shape)} and B {tuple(b.shape)}, which do not multiply"
    return None
