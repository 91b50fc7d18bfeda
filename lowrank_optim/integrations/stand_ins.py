"""What the names of galore_torch and apollo_torch stand for while `compat` is installed: our optimizers, called as theirs are.

Arguments and defaults are those of the other packages. An argument that has no counterpart here raises, unless it has its default.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_optim import optimizers
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.galore import GaLoreAdafactor

__all__ = ["APOLLOAdamW", "GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "translated"]


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as apollo_torch names them, in the words of this package; all others as they are.

    `scale_front` says where a constant factor enters the limiter's ratio of two norms, from which it cancels.
    """
    given = dict(options)
    given.pop("scale_front", None)
    proj = given.pop("proj", "random")
    if proj not in ("random", "svd"):
        raise ValueError(f"proj is {proj!r}; valid values are 'random', 'svd'")
    if proj == "svd":
        given["projector"] = "svd"
    return given


def _check_fixed(instead: str, **given: tuple[Any, Any]) -> None:
    """Raise ValueError for an argument whose first value, what was given, is not the second, what it always is here."""
    for name, (value, fixed) in given.items():
        if value != fixed:
            raise ValueError(f"{name} is {value!r}; the optimizers of lowrank_optim know only {fixed!r}. {instead}")


class GaLoreAdamW(optimizers.GaLoreAdamW):
    """`lowrank_optim.GaLoreAdamW` with the arguments and defaults of galore_torch: ε = 1e-6, no decay."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        **options: Any,
    ) -> None:
        _check_fixed("Leave it out", correct_bias=(correct_bias, True))
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class GaLoreAdamW8bit(optimizers.GaLoreAdamW8bit):
    """`lowrank_optim.GaLoreAdamW8bit` with the arguments and defaults of galore_torch."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,  # not read by galore_torch either
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        _check_fixed(
            'Leave it out (an `optim` of a trainer without "paged")',
            amsgrad=(amsgrad, False),
            min_8bit_size=(min_8bit_size, 4096),
            percentile_clipping=(percentile_clipping, 100),
            block_wise=(block_wise, True),
            is_paged=(is_paged, False),
        )
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class APOLLOAdamW(optimizers.APOLLOAdamW):
    """`lowrank_optim.APOLLOAdamW` with the arguments, group keys and defaults of apollo_torch: ε = 1e-6, no decay."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        **options: Any,
    ) -> None:
        _check_fixed("Leave it out", correct_bias=(correct_bias, True))
        if disable_nl:
            options["limiter"] = None
        super().__init__(_with_our_keys(params), lr, betas, eps, weight_decay, **translated(options))


def _with_our_keys(params: Iterable[Any]) -> list[Any]:
    return [translated(group) if isinstance(group, Mapping) else group for group in params]
