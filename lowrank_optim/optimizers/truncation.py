"""`truncate_ranks`: the weights of a model in training are brought to lower rank every few steps (Trained Rank Pruning)."""

import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.groups.names import list_patterns
from lowrank_optim.kernels import as_python
from lowrank_optim.kernels.counter_rng import PURPOSE_TRUNCATION, make_key
from lowrank_optim.nn.decompositions import nuclear_subgradient
from lowrank_optim.nn.reparametrized import Patterns
from lowrank_optim.nn.truncate import DenseMatrix, RankCut, parts_of, take_matrices, truncated_stack
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.sharding.dtensor import is_sharded, local, local_grad
from lowrank_optim.step.param_step import kept_error

STEP, LAST, RANKS = "truncation_step", "truncation_last", "truncation_ranks"
"""Keys of the first param group: the steps since the handle was made, how many they were at the last truncation, and the rank of each
matrix then (a list of a stack), −1 where it is not known."""

Ranks: TypeAlias = int | list[int]

MODES = ("decoupled", "gradient")


def truncate_ranks(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | float | None = None,
    threshold: float | None = None,
    period: int = 20,
    nuclear_weight: float = 0.0,
    mode: str | None = None,
    match_reference: bool = False,
    convolutions: str = "channel",
    include: Patterns = None,
    exclude: Patterns = None,
) -> "RankTruncation":
    """Bring the weights of a model to lower rank after every `period`-th step of its optimizer (Trained Rank Pruning, TRP).

        W = U Σ Vᵀ   →   U_k max(Σ_k − ηλ, 0) V_kᵀ

    The training loop does not change. A model that was trained so loses little when it is factorised afterwards
    (`lowrank_optim.nn.factorize_`). Weights stay dense; between two truncations they may have any rank.

    λ = `nuclear_weight` draws singular values towards 0:

        "decoupled"   they shrink by ηλ at each truncation, before the cut: the proximal operator of ηλ‖W‖_*, η the learning rate
                      of the parameter. So it does not go through Adam, which would divide it by √v.
        "gradient"    the step after a truncation sees G + λ U_k V_kᵀ, the smallest subgradient of λ‖W‖_*: the paper's form, for SGD.
                      Each matrix of a stack has its own k; directions that are rounding errors (of the weight's type) are left out.

    With `match_reference=True` the numbers are those of the released code: "gradient", and truncation before the forward pass of
    steps 0, period, 2·period, …, so that the last step is not followed by one. Convolutions with groups are an exception: the
    released code takes all groups for one matrix. Hooks on the model and on its layers see forward
    passes in training mode; where there was none, the weights are truncated before the optimizer's step. The released code counts
    steps anew in each epoch.

    Two things to know. Momentum and weight decay take the weights out of the set of rank k at once, and an energy cut at every step
    freezes small directions: a gradient has to bring them above the cut within one period. And the last step of a run is followed
    by a truncation only if its number is a multiple of the period; `lowrank_optim.nn.truncate_(model, …)` makes one at any time.

    Args:
        optimizer: any of torch, or of this package. Only weights that it trains are truncated, and only while they are.
        model: of the weights: linear layers, Conv1Ds of transformers, convolutions and stacks.
        energy: in (0, 1]; k is the smallest for which Σ_{i≤k} σ_i² ≥ energy·Σσ_i². The paper takes 0.98 every 20 steps, its code
            0.9 in every step.
        rank: in place of energy, k itself; a float in (0, 1] is a fraction of each short side.
        threshold: in place of energy, the smallest singular value that is kept; at least one is.
        period: steps between two truncations.
        nuclear_weight: λ ≥ 0; the released code takes 3e-4.
        mode: "decoupled" or "gradient"; None takes "gradient" with `match_reference`, else "decoupled".
        match_reference: see above.
        convolutions: which matrix the kernels a×c×h×w of a convolution are: "channel", a × (c·h·w) (the paper's NC), "spatial",
            (c·h) × (a·w) (its VH), or "filter", a matrix c × (h·w) for each kernel (its ND); with groups, those of each group by
            themselves, as `lowrank_optim.nn.truncate_` says.
        include: patterns of the weights to take, as in `param_groups`; the paper leaves out the first two layers and 1×1
            convolutions.
        exclude: patterns of weights to leave alone.

    Returns:
        A handle: `ranks()` says what the last truncation found, `remove()` ends it. Also a context manager that removes itself.

    Raises:
        TypeError: no optimizer of torch, no nn.Module.
        ValueError: none or several of energy, rank and threshold; a value out of range; a pattern that matches nothing; no weight
            that the optimizer trains; a weight stored in 8 bits; "spatial" for kernels without height and width; `match_reference`
            with "decoupled", or with sharded weights.
        RuntimeError: the optimizer has such a handle already; "gradient" with `update_in_backward`, which frees gradients before.

    State: numbers of steps, and the ranks, plain numbers in `optimizer.param_groups[0]`, so that a resumed run is exact. Call this
    function before or after `load_state_dict`.

    Memory: no state. At a truncation, for one m×n matrix at a time, numbers of 4 bytes (8 for float64 weights): m·d + d·n + d for its
    singular value decomposition, d the short side, k·m + m·n for what is left of it, and m·n for itself, unless the weight is stored
    so. Of a stack (experts, "filter", groups), small matrices are taken together, up to 2²⁰ numbers of them, and what is left of all
    of them is held until the last is done. "gradient" takes as much in the step after it, while gradients are there. A sharded matrix
    (`fully_shard`, tensor parallel) is gathered for it: call this on all processes. The host waits for the singular values.
    `lowrank_optim.plan` counts it, for a function that builds the optimizer and calls this one, but not what LAPACK takes besides on
    a CPU: a copy of the matrix and three to six times d² numbers. `lowrank_optim.describe(optimizer)` says that it is on.

    A matrix that is not finite is left alone and counted (`handle.skipped`). Weights that the optimizer rounds stochastically, or
    whose errors it keeps (`weight_error_bits`), are written so here, too. bfloat16 weights have rank k up to their rounding.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = lo.truncate_ranks(optimizer, model, rank=4, period=2)
        >>> for _ in range(2):
        ...     model(torch.randn(8, 64)).square().mean().backward()
        ...     optimizer.step()
        >>> handle.ranks()
        {'0.weight': 4}

    Paper: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020, arXiv:2004.14566; first as
    "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv:1812.02402.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    cut = RankCut(*map(as_python, (energy, rank, threshold)))
    period, nuclear_weight = as_python(period), as_python(nuclear_weight)
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"period is {period!r}; it must be an int of at least 1 (steps)")
    number = isinstance(nuclear_weight, int | float) and not isinstance(nuclear_weight, bool)
    if not number or not 0 <= nuclear_weight < float("inf"):
        raise ValueError(f"nuclear_weight is {nuclear_weight!r}; it must be a finite number of at least 0")
    if mode not in (None, *MODES):
        raise ValueError(f"mode is {mode!r}; valid values are {', '.join(map(repr, MODES))}")
    if match_reference and mode == "decoupled":
        raise ValueError(
            'match_reference is True, and the released code adds to gradients: leave mode out, or use "gradient"'
        )
    handle = RankTruncation(
        optimizer,
        _trained(optimizer, take_matrices(model, include, exclude, convolutions)),
        cut,
        period,
        float(nuclear_weight),
        mode or ("gradient" if match_reference else "decoupled"),
        match_reference,
    )
    handle.attach(model)
    return handle


def _trained(optimizer: Optimizer, matrices: list[DenseMatrix]) -> list[DenseMatrix]:
    """Those that the optimizer has in its groups."""
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    found = [matrix for matrix in matrices if id(matrix.param) in own]
    if not found:
        names = ", ".join(matrix.name for matrix in matrices[:5])
        raise ValueError(
            f"the optimizer has none of the matrices of this model ({names}, …): build it with the parameters of the model as it is "
            "now, and name matrices that it trains by include"
        )
    return found


class RankTruncation:
    """What `truncate_ranks` returns.

    Attributes:
        skipped: how many truncations were left out because a matrix was not finite, by its name.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        matrices: list[DenseMatrix],
        cut: RankCut,
        period: int,
        nuclear_weight: float,
        mode: str,
        match_reference: bool,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)  # which holds the hooks, and they this handle
        self._matrices, self._cut, self.period = matrices, cut, period
        self.nuclear_weight, self.mode, self._from_start = nuclear_weight, mode, match_reference
        self._hooks: list[RemovableHandle] = []
        self.skipped: dict[str, int] = {}

    def attach(self, model: nn.Module) -> None:
        """Register the hooks; raises before anything changes."""
        optimizer = self._require_optimizer()
        for hook in optimizer._optimizer_step_post_hooks.values():
            if isinstance(getattr(hook, "__self__", None), RankTruncation):
                raise RuntimeError(
                    "the ranks of this optimizer's weights are truncated already; call remove() on that handle"
                )
        self._refuse_in_backward(optimizer)
        if self._from_start and any(is_sharded(matrix.param) for matrix in self._matrices):
            raise ValueError(
                "match_reference is True and weights are sharded (DTensor), which are gathered before a forward pass could truncate "
                "them; leave it out, or train without fully_shard"
            )
        optimizer.param_groups[0].setdefault(STEP, 0)
        optimizer.param_groups[0].setdefault(LAST, -1)
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        if self.mode == "gradient" and (self.nuclear_weight or self._from_start):
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self._from_start:
            params = {id(matrix.param) for matrix in self._matrices}
            owners = [m for m in model.modules() if any(id(p) in params for p in m.parameters(recurse=False))]
            self._hooks += [m.register_forward_pre_hook(ForwardHook(self)) for m in (model, *owners)]

    def ranks(self) -> dict[str, int]:
        """The rank that the last truncation left each matrix, by name; of a stack, the largest. Empty before the first one."""
        known = self._require_optimizer().param_groups[0].get(RANKS) or []
        pairs = zip(self._matrices, known, strict=False)
        return {matrix.name: _largest(rank) for matrix, rank in pairs if _largest(rank) >= 0}

    def remove(self) -> None:
        """End it; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        optimizer = self._optimizer()
        for name in (STEP, LAST, RANKS):
            if optimizer is not None:
                optimizer.param_groups[0].pop(name, None)

    @property
    def description(self) -> str:
        """What `describe` says of it."""
        cut = next(f"{name} {value:g}" for name, value in vars(self._cut).items() if value is not None)
        pull = f", nuclear_weight {self.nuclear_weight:g} ({self.mode})" if self.nuclear_weight else ""
        names = list_patterns(matrix.name for matrix in self._matrices)
        return f"ranks truncated to {cut} every {self.period} steps{pull}: {names}"

    @property
    def heavy_steps(self) -> tuple[str, ...]:
        """Steps in a row that take memory of their own, for the planner, which calls `make_due` before the first."""
        after = self.mode == "gradient" and self.nuclear_weight and not self._from_start
        return ("step with a truncation", *(["step after a truncation"] if after else []))

    @property
    def has_numbers(self) -> bool:
        """Whether weights have numbers; in a plan they have none, and are truncated before the step, where that is no matter."""
        with torch._C.DisableTorchFunction():  # in a plan, tensors say that they are on a device
            return not any(matrix.param.is_meta for matrix in self._matrices)

    def make_due(self) -> None:
        """Let so many steps have passed that the next one has a truncation."""
        group = self._require_optimizer().param_groups[0]
        group[STEP], group[LAST] = self.period - (not self._from_start), -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _require_optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this handle does not exist any more")
        return optimizer

    def _refuse_in_backward(self, optimizer: Optimizer) -> None:
        if self.mode == "gradient" and getattr(optimizer, "_in_backward", None) is not None:
            raise RuntimeError(
                'mode is "gradient", which adds to gradients before the step, but update_in_backward frees them before: use '
                'mode="decoupled", or call remove() on the handle of update_in_backward'
            )

    # -------------------------------------------------------------------------------------------------------------- hooks

    def truncate_if_due(self) -> None:
        """Truncate, unless it is not time, or was done already."""
        if self.is_due:
            self._truncate()

    @property
    def is_due(self) -> bool:
        """Whether it is time to truncate, and was not done yet."""
        steps = self._number(STEP, 0)
        return steps % self.period == 0 and self._number(LAST, -1) != steps

    @kernels.no_autograd_no_autocast
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        """Add λ U_k V_kᵀ to the gradients of the step after a truncation."""
        self._refuse_in_backward(optimizer)
        if self._from_start:
            self.truncate_if_due()
        if not self.nuclear_weight or self._number(LAST, -1) != self._number(STEP, 0):
            return
        known = optimizer.param_groups[0].get(RANKS) or []
        for matrix, rank in zip(self._matrices, known, strict=False):
            if _largest(rank) > 0 and matrix.param.grad is not None:
                pull = _pull(matrix.whole(), rank, matrix.param.dtype)
                local_grad(matrix.param).add_(matrix.part(pull), alpha=self.nuclear_weight)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        optimizer.param_groups[0][STEP] = self._number(STEP, 0) + 1
        if not self._from_start:
            self.truncate_if_due()

    def _number(self, name: str, default: int) -> int:
        return int(self._require_optimizer().param_groups[0].get(name, default))

    # --------------------------------------------------------------------------------------------------------- truncation

    @kernels.no_autograd_no_autocast
    def _truncate(self) -> None:
        """Truncate every matrix that is trained now, and write the ranks down."""
        optimizer = self._require_optimizer()
        groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
        for matrix in self._matrices:
            if id(matrix.param) not in groups:
                raise RuntimeError(
                    f"{matrix.name} is not in the optimizer any more (sharded, or replaced, since truncate_ranks was called): call "
                    "remove() on the handle, and truncate_ranks again"
                )
        ranks = [self._truncate_one(optimizer, matrix, groups[id(matrix.param)]) for matrix in self._matrices]
        optimizer.param_groups[0] |= {RANKS: ranks, LAST: self._number(STEP, 0)}

    def _truncate_one(self, optimizer: Optimizer, matrix: DenseMatrix, group: Mapping[str, Any]) -> Ranks:
        """The rank that is left, those of the matrices of a stack, or −1 for one that is left alone."""
        param = matrix.param
        if not param.requires_grad:
            return -1
        error = key = None
        if isinstance(optimizer, LowRankOptimizer):
            error = kept_error({n: local(t) for n, t in optimizer.state.get(param, {}).items()})
            if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
                plan = optimizer.plan_of(param)
                key = make_key(group["seed"], plan.index, self._number(STEP, 0), PURPOSE_TRUNCATION)
        whole = matrix.whole(error)
        if not bool(torch.isfinite(whole).all()):
            self.skipped[matrix.name] = self.skipped.get(matrix.name, 0) + 1
            return -1
        size = float(group["lr"]) * float(group.get("lr_factor", 1.0))
        new, ranks = truncated_stack(whole, self._cut, size * self.nuclear_weight if self.mode == "decoupled" else 0.0)
        if new is not whole:
            matrix.write_(new, key, error)
        return ranks if whole.dim() > 2 else ranks[0]


class ForwardHook:
    """Truncates before a forward pass in training; a copy of the model, or one that is pickled, keeps a hook that does nothing."""

    def __init__(self, handle: RankTruncation | None = None) -> None:
        self._handle = handle

    def __call__(self, module: nn.Module, _: object) -> None:
        """Called by torch before the module's forward."""
        handle = self._handle
        if handle is not None and module.training and torch.is_grad_enabled() and handle.is_due and handle.has_numbers:
            handle.truncate_if_due()

    def __reduce__(self) -> tuple[type["ForwardHook"], tuple[()]]:
        return ForwardHook, ()


def _largest(ranks: Ranks) -> int:
    """The rank of a matrix, or the largest of a stack."""
    return ranks if isinstance(ranks, int) else max(ranks)


def _pull(matrix: Tensor, ranks: Ranks, precision: torch.dtype) -> Tensor:
    """U_k V_kᵀ of a matrix, or of each in a stack with its own k: the smallest subgradient of the nuclear norm."""
    stack = matrix if matrix.dim() > 2 else matrix.unsqueeze(0)
    each = [ranks] * len(stack) if isinstance(ranks, int) else ranks
    made = [nuclear_subgradient(stack[part], each[part], precision) for part in parts_of(stack)]
    whole = made[0] if len(made) == 1 else torch.cat(made)
    return whole if matrix.dim() > 2 else whole[0]
