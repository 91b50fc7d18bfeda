"""SaRA: AdamW on the entries of each matrix whose weights are smallest, all others frozen."""

from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.matrices import is_low_rank
from lowrank_optim.groups.names import plain_name
from lowrank_optim.groups.options import Options
from lowrank_optim.kernels import as_python
from lowrank_optim.kernels.counter_rng import PURPOSE_PENALTY, choose, make_key
from lowrank_optim.nn.decompositions import nuclear_subgradient
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.projectors import Basis, SmallestWeights
from lowrank_optim.rules import TorchAdam
from lowrank_optim.step.trained_param import TrainedParam

SMALLEST_SIDE = 65
FEWEST_ENTRIES = 101
"""What a matrix has to have for the low-rank term, as in the released code: sides above 64, more than 100 chosen entries."""


class SaRAAdamW(LowRankOptimizer):
    """AdamW on the entries of each matrix whose weights are smallest; the others stay as they are, to the bit.

        idx = the entries with the smallest |w|, or those with |w| < τ
        R = G[idx],   N = Adam(R),   W[idx] ← (1 − ηλ) W[idx] − η α N

    The entries are chosen from the weights when the optimizer is built, once more at the first step (other weights may have been
    loaded by then), and never again. At step `shrink_at`, those that have grown are left: |w| ≥ τ, or, with a density, above the
    largest magnitude that was chosen in their matrix. The moments of the others stay as they are.

    The low-rank term adds the gradient of λ_r‖W∘M‖_* to R, M the mask of the chosen entries, in each step for one matrix:

        R ← R + λ_r (U Vᵀ)[idx],   U Σ Vᵀ = W∘M

    It is drawn by the seed and the number of the step among the matrices with sides above 64; one with no more than 100 entries is
    left out when it is drawn. One of n matrices in a step is a penalty of λ_r/n on each, as in the paper.

    A weight that layers share has one set of entries, whichever of its names a pattern gives. Embedding tables and output heads, tied
    or not, are trained as a whole unless a pattern names them.

    Parameters that are no matrices, and groups without density, are trained by AdamW. To train the chosen entries alone, as the
    released code does but for vectors, leave all other groups out.

    With `match_reference=True` the numbers are the same: the formulas are those of the released code's masked variant. That one
    masks vectors, too, and keeps the moments of all entries. The variant that its README recommends is no reference: it takes the
    absolute value of the weights that it trains, and its low-rank term has no effect.

    Args:
        params: groups with a density, such as `lo.param_groups(model, density=0.1)` makes, or, with a threshold,
            `lo.param_groups(model, density=1.0)`. Where nothing gives a density or a rank, it is 0.1, and 1.0 with a threshold.
        lr: η. The released code takes 1e-3·exp(−350 τ).
        betas, eps, weight_decay: as for `torch.optim.AdamW`; the decay is of the chosen entries only.
        threshold: τ > 0, 2e-3 in the paper; None takes the density. A matrix without an entry below it is frozen.
        shrink_at: the number of steps T after which entries that have grown are left; the paper takes half of the run. None never.
        low_rank_weight: λ_r ≥ 0, 5e-4 in the paper. Also a group option, which may change while training.
        **options: see `Options`. `projector`, `coordinates`, `blocks`, `cautious` and `cautious_decay` are not possible;
            `on_refresh` is "rotate", or "reset" to begin the moments anew at T.

    Raises:
        ValueError: a threshold together with a density below 1, or a rank; a value out of range; another projector.

    Memory: 12 bytes for each chosen entry, 8 of moments and 4 of index. With `state_bits=8`, 2 of moments: 256 entries of any rows
    and columns share a scale, so that those with much smaller gradients than others follow badly. Gradients are those of all weights
    until they are used; `update_in_backward` frees each at once, and keeps R alone between micro-batches. The low-rank term takes
    the singular value decomposition of one matrix in a step, of m·d + d·n + d numbers, which on a CPU is slow: seconds for
    thousands of rows and columns. `lowrank_optim.SmallestWeights` says what choosing takes.

    Sharded matrices (`fully_shard`): each is gathered when its entries are chosen, and in the low-rank term its chosen entries. All
    processes keep all indices and moments.

    Paper: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025,
    arXiv:2409.06633.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.SaRAAdamW(lo.param_groups(model, density=0.1), lr=1e-3)
        >>> optimizer.state[model.weight]["indices"].shape, optimizer.state[model.weight]["exp_avg"].shape
        (torch.Size([204]), torch.Size([204, 1]))
    """

    _group_options: ClassVar[Mapping[str, Any]] = {"low_rank_weight": 0.0}
    _drawn: tuple[int, Tensor | None] | None = None  # a step, and the matrix that has the low-rank term in it

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        threshold: float | None = None,
        shrink_at: int | None = None,
        low_rank_weight: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        every: dict[str, Any] = {"on_refresh": "rotate", "low_rank_weight": low_rank_weight, **options}
        for name in ("projector", "coordinates", "blocks"):
            if every.pop(name, None) is not None:
                raise ValueError(
                    f"{name} is {dict(options)[name]!r}, but SaRAAdamW trains the entries with the smallest weights; leave it out, "
                    "or use lowrank_optim.GaLoreAdamW, FrugalAdamW or LowRankOptimizer"
                )
        if shrink_at is not None:
            shrink_at = as_python(shrink_at)
            if not isinstance(shrink_at, int) or isinstance(shrink_at, bool) or shrink_at < 1:
                raise ValueError(f"shrink_at is {shrink_at!r}; it must be None, or an int of at least 1 (steps)")
            if every.get("update_proj_gap", shrink_at) != shrink_at:
                raise ValueError(
                    f"shrink_at is {shrink_at!r} and update_proj_gap {every['update_proj_gap']!r}, which says the same; give one"
                )
            every["update_proj_gap"] = shrink_at
        if not {"rank", "density"} & every.keys():
            every["density"] = 0.1 if threshold is None else 1.0
        every["projector"] = SmallestWeights(as_python(threshold), shrinks=shrink_at is not None)
        super().__init__(params, rule=TorchAdam(betas, eps), lr=lr, weight_decay=weight_decay, **every)

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        check_low_rank_weight(options["low_rank_weight"])
        projector = self.parts.of(options).projector
        if not is_low_rank(options):
            return
        if not isinstance(projector, SmallestWeights):
            raise ValueError(
                f"projector is {options['projector']!r} in a group, but SaRAAdamW trains the entries with the smallest weights; "
                "leave it out, or use lowrank_optim.GaLoreAdamW, FrugalAdamW or LowRankOptimizer"
            )
        if projector.threshold is None:
            return
        if options["density"] != 1.0:
            name = "rank" if options["density"] is None else "density"
            raise ValueError(
                f"threshold is {projector.threshold!r} and {name} {options[name]!r}, which both say how many entries are trained; "
                "with a threshold, build the groups with lowrank_optim.param_groups(model, density=1.0)"
            )

    def _enter(self, params: list[Tensor]) -> None:
        for number, group in enumerate(self.param_groups):  # which may be edited between two steps
            check_low_rank_weight(group["low_rank_weight"], f" in param group {number}, which was edited")
        super()._enter(params)

    def trained(
        self, param: Tensor, changed: tuple[Mapping[str, Any], Any, dict[str, Tensor]] | None = None
    ) -> TrainedParam:
        """As in `LowRankOptimizer`, with the low-rank term where the parameter is drawn for it."""
        trained = super().trained(param, changed)
        weight = float(trained.group["low_rank_weight"])
        drawn = weight and trained.plan.space is not None and self._draw(int(trained.state["step"])) is param
        if drawn and trained.state["indices"].shape[-1] >= FEWEST_ENTRIES:
            trained.pull = partial(low_rank_pull, -weight if trained.group["maximize"] else weight)
        return trained

    def _draw(self, step: int) -> Tensor | None:
        """The matrix that has the low-rank term in this step; None where there are none."""
        if self._drawn is None or self._drawn[0] != step:
            plans = [(param, plan) for param, plan in self.plans.items() if isinstance(plan.projector, SmallestWeights)]
            able = [(p, plan) for p, plan in plans if plan.space and not plan.space.batch]
            able = [(p, plan) for p, plan in able if min(plan.space.shape) >= SMALLEST_SIDE]  # type: ignore[union-attr]
            if all(plan.named for _, plan in able):
                able.sort(key=lambda pair: plain_name(pair[1].name))
            found = None
            if able:
                key = make_key(self.param_groups[0]["seed"], 0, step, PURPOSE_PENALTY)
                found = able[int(choose(key, len(able), 1, torch.device("cpu")))][0]
            self._drawn = step, found
        return self._drawn[1]

    def _end_step(self) -> None:
        super()._end_step()
        self._drawn = None


def check_low_rank_weight(weight: Any, where: str = "") -> None:
    """Raise ValueError for something else than a finite number of at least 0; `where` it was found is part of the message."""
    number = isinstance(weight, (Real, Tensor)) and not isinstance(weight, bool)
    if not number or not 0.0 <= float(weight) < float("inf"):
        raise ValueError(f"low_rank_weight is {weight!r}{where}; it must be a finite number of at least 0")


def low_rank_pull(weight: float, basis: Basis, matrix: Tensor) -> Tensor:
    """λ (U Vᵀ)[idx] for U Σ Vᵀ = W∘M, as R: the subgradient of λ‖W∘M‖_* at the chosen entries.

    Args:
        weight: λ.
        basis: the chosen entries.
        matrix: W, or the local part of it.
    """
    values = basis.project(matrix)  # of all processes
    inner: Any = getattr(basis, "inner", basis)
    whole = torch.zeros(inner.shape, dtype=values.dtype, device=values.device)
    places = inner.places
    whole[places] = values.squeeze(-1).nan_to_num(nan=0.0)
    return weight * nuclear_subgradient(whole)[places].unsqueeze(-1)
