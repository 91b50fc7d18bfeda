"""FRUGAL: a rule with moments on a part of each step's gradient, signSGD or SGD without state on all the rest."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.residuals.base import Residual
from lowrank_optim.residuals.gradient import NoResidual, SGDResidual, SignResidual
from lowrank_optim.rules import SGD, Lion, Rule, TorchAdam


class _Frugal(LowRankOptimizer):
    """What the three presets share: density, where the moments are, and what happens to the rest."""

    def __init__(
        self,
        params: Params,
        rule: Rule,
        lr: float | Tensor,
        weight_decay: float,
        residual: str,
        residual_lr_scale: float,
        options: Options,
    ) -> None:
        parts: dict[str, Residual] = {
            "sign": SignResidual(residual_lr_scale),
            "sgd": SGDResidual(residual_lr_scale),
            "none": NoResidual(),
        }
        if residual not in parts:
            raise ValueError(
                f"residual is {residual!r}; FRUGAL's are {', '.join(map(repr, parts))}, LowRankOptimizer takes others"
            )
        if not {"rank", "density"} & options.keys():
            options["density"] = 0.25
        if not {"projector", "coordinates", "blocks"} & options.keys():
            options["coordinates"] = "columns"
        options.setdefault("on_refresh", "reset")
        super().__init__(params, rule=rule, residual=parts[residual], lr=lr, weight_decay=weight_decay, **options)


class FrugalAdamW(_Frugal):
    """AdamW on a part of the gradient, signSGD on the rest: full-rank training with a fraction `density` of AdamW's state.

        R = project(G),   N = Adam(R),   W ← (1 − ηλ) W − η α (lift(N) + κ sign(G − lift R))

    The part is chosen anew every `update_proj_gap` steps:

    * `coordinates="columns"` (the default), "rows" or "entries": some of them at random;
    * `blocks="descending"`, "ascending", "random" or "mirror": whole tensors of a group in turn, the others wholly without state;
    * `projector="randomized_svd"`, "svd" or "random": a subspace, as GaLore's. The sign of G − lift R takes a matrix product more
      than GaLore's step has.

    Moments begin at 0 in each new part, so that the first step after a refresh has the size of the sign step, α·η
    (`on_refresh="reset"`; "keep" and "rotate" are possible where the part is no block).

    `match_reference=True` turns staggering off and takes the exact SVD; the formulas are the released code's already. Its random
    choices are torch's, ours the package's own.

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        residual: "sign", "sgd" (κ(G − lift R)) or "none" for what is outside the part.
        residual_lr_scale: κ; the paper takes 1 for pretraining, 0.1 for fine-tuning.
        **options: see `Options`; `density` is 0.25 unless a rank is given, `scale` (α) 1.

    Memory: density·8 bytes for each weight, and 4 bytes for each index of a column, row or entry.

    Paper: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", ICML 2025,
    arXiv:2411.07837.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> groups = lo.param_groups(model, density=0.5)
        >>> optimizer = lo.FrugalAdamW(groups, lr=1e-3, blocks="descending")
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        residual: str = "sign",
        residual_lr_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, TorchAdam(betas, eps), lr, weight_decay, residual, residual_lr_scale, options)


class FrugalLion(_Frugal):
    """Lion on a part of the gradient, signSGD on the rest. See `FrugalAdamW` for the options; half its moments."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        residual: str = "sign",
        residual_lr_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, Lion(betas), lr, weight_decay, residual, residual_lr_scale, options)


class FrugalSGD(_Frugal):
    """SGD with momentum on a part of the gradient, SGD without on the rest (`residual="sgd"`). See `FrugalAdamW` for the options.

    With `match_reference`, the momentum buffer starts as in the released code: at the first projected gradient, and at the weights
    themselves for dense parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        residual: str = "sgd",
        residual_lr_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, SGD(momentum, nesterov), lr, weight_decay, residual, residual_lr_scale, options)
