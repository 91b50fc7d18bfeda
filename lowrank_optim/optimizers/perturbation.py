"""Gradients at weights that are pushed along the optimizer's own momentum: LoRA-MGPO, and SAM at the cost of one gradient."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowrank_optim.kernels import compute_dtype
from lowrank_optim.kernels.compute import norm
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.optimizers.owners import owner
from lowrank_optim.rules.joint import JointRule
from lowrank_optim.rules.pair_gradients import GradientPairRule
from lowrank_optim.sharding.dtensor import is_sharded

MOMENTA = ("exp_avg", "momentum_buffer")
"""How optimizers call a running mean of gradients."""


class MomentumPerturbation:
    """What `perturb_by_momentum` returns.

    off(): a context in which the weights are θ, for evaluation and for checkpoints of model and optimizer.
    remove(): the weights are θ from now on.
    """

    def __init__(self, optimizer: Optimizer, perturb: float, names: dict[Tensor, str]) -> None:
        self.perturb = perturb
        self._optimizer, self._names = optimizer, names
        self._kept: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._off = 0
        self._push()
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The weights are θ within, to the bit; loaded weights are kept."""
        self._restore()
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1
            if self._hooks and not self._off:
                self._push()

    def remove(self) -> None:
        """Take the hooks away, and give the weights back as θ, to the bit; those that were written meanwhile stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for param in [param for param, version in self._versions.items() if param._version != version]:
            del self._versions[param]
        self._restore()
        self._kept.clear()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(each) for each in (*args, *kwargs.values())):
            raise RuntimeError(
                "step(closure) would compute gradients at the weights themselves; with perturb_by_momentum call backward, then step()"
            )
        self._restore()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._off:
            self._push()

    @torch.no_grad()
    def _restore(self) -> None:
        """θ̃ → θ, from copies: subtracting what was added would leave rounding errors."""
        changed = [name for p, name in self._names.items() if p in self._versions and p._version != self._versions[p]]
        if changed:
            raise RuntimeError(
                f"{changed[0]} was written while it was perturbed (a loaded checkpoint, an average swapped in, updates in backward), "
                "so that there is no telling what it is without. Write weights within `with handle.off():`, or call remove(), which "
                "leaves it as it was written"
            )
        for param in self._versions:
            param.copy_(self._kept[param])
        self._versions.clear()

    @torch.no_grad()
    def _push(self) -> None:
        """θ → θ̃ = θ + ρ m/‖m‖, with one norm for all parameters; nothing where there is no momentum yet."""
        found = {p: m for p, name in self._names.items() if (m := _momentum(self._optimizer, p, name)) is not None}
        if not found:
            return
        device, wide = next(iter(found)).device, any(m.dtype == torch.float64 for m in found.values())
        norms = [norm(m).to(device, torch.float64 if wide else torch.float32) for m in found.values()]
        size = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.where(size > 0.0, self.perturb / size, 0.0)
        for param, momentum in found.items():
            if param not in self._kept or self._kept[param].dtype != param.dtype:
                self._kept[param] = torch.empty_like(param, requires_grad=False)
            self._kept[param].copy_(param)
            dtype = compute_dtype(param.dtype)
            moved = momentum.view(param.shape).to(dtype) * factor.to(param.device, dtype)
            param.copy_(param.to(dtype) + moved)
            self._versions[param] = param._version


def perturb_by_momentum(
    optimizer: Optimizer, perturb: float = 0.05, *, params: Iterable[Tensor] | None = None
) -> MomentumPerturbation:
    """Compute gradients at θ̃ = θ + ρ m/‖m‖, and update θ: sharpness-aware training with one gradient a step.

    m is the running mean of gradients that the optimizer keeps anyway (`exp_avg` of Adam, `momentum_buffer` of SGD), ‖m‖ its norm
    over all parameters together. Between two steps the parameters hold θ̃. They are θ within `with handle.off():`; evaluate, save
    and load there. A resumed run that is perturbed again after model and optimizer were loaded is exact.

    Args:
        optimizer: of the package (AdamW on dense parameters or pairs, RiemannianAdamW, …), or torch's AdamW, Adam or SGD with
            momentum.
        perturb: ρ, a length of all parameters together.
        params: only these; None takes all that require a gradient. For adapters they are few.

    Returns:
        A handle: `off()`, `remove()`.

    Raises:
        ValueError: ρ out of range; a parameter, by name, that is sharded, trained in a subspace, or whose optimizer keeps no momentum
            of its gradients (AltLoRA, LoRA-RITE and coded moments).
        RuntimeError: updates in backward; later on, `step(closure)`, or weights that were written outside of `off()`.

    Memory: a copy of the parameters.

    Paper: LoRA-MGPO, the later versions of Chang et al., 2025, arXiv:2502.14538, where ρ follows the size of gradients besides.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> a, b = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.zeros(64, 4))
        >>> optimizer = lo.LoRAOptimizer(lo.lora_pairs([(a, b, 2.0)]), lr=1e-3)
        >>> handle = lo.perturb_by_momentum(optimizer, 0.05)
        >>> (2.0 * (b @ a) - 1.0).square().mean().backward()
        >>> optimizer.step()
        >>> with handle.off():
        ...     saved = {"a": a.detach().clone(), "b": b.detach().clone()}
        >>> round(float(torch.cat([(a - saved["a"]).flatten(), (b - saved["b"]).flatten()]).norm().detach()), 6)
        0.05
    """
    if isinstance(perturb, bool) or not isinstance(perturb, (int, float)) or not 0.0 < perturb < math.inf:
        raise ValueError(f"perturb is {perturb!r}; it must be a positive number")
    known = _names(optimizer)
    wanted = [p for p in known if p.requires_grad] if params is None else list(params)
    for param in wanted:
        if param not in known:
            raise ValueError(f"a parameter {tuple(param.shape)} of params is not trained by this optimizer")
        _check(optimizer, param, known[param])
    _check_momentum(optimizer, wanted)
    return MomentumPerturbation(optimizer, float(perturb), {param: known[param] for param in wanted})


def _check_momentum(optimizer: Optimizer, wanted: Sequence[Tensor]) -> None:
    """torch's SGD and RMSprop keep none by default."""
    chosen = {id(param) for param in wanted}
    for group in optimizer.param_groups:
        if group.get("momentum") == 0 and not chosen.isdisjoint(map(id, group["params"])) and "rule" not in group:
            raise ValueError(
                f"{type(optimizer).__name__} has momentum=0, so that there is none to perturb along; give it a momentum"
            )


def _names(optimizer: Optimizer) -> dict[Tensor, str]:
    """Every parameter of the optimizer, with a name for messages."""
    names: dict[Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names", [f"{number}.{place}" for place in range(len(group["params"]))])
        names.update(zip(group["params"], given, strict=True))
    return names


def _check(optimizer: Optimizer, param: Tensor, name: str) -> None:
    """Raise where a parameter cannot be pushed along its momentum."""
    why = "it is sharded (DTensor)" if is_sharded(param) else None
    if why is None and isinstance(optimizer, LowRankOptimizer):
        plan = optimizer.plan_of(param)
        if plan.space is not None:
            why = "its moments lie in a subspace (its group has a rank)"
        elif isinstance(plan.rule, JointRule) and not isinstance(plan.rule, GradientPairRule):
            why = f"the momentum of {type(plan.rule).__name__} is not one of gradients"
    if why is not None:
        raise ValueError(f"{name} cannot be perturbed along its momentum: {why}; leave it out by params=")
    if owner(param) is not None:
        raise RuntimeError(
            f"{name} is updated in backward, where perturbed weights would be updated; call remove() on that handle"
        )


def _momentum(optimizer: Optimizer, param: Tensor, name: str) -> Tensor | None:
    """The running mean of gradients of a parameter; None before its first step.

    Raises:
        ValueError: its optimizer keeps none in a form that can be added to it.
    """
    state = optimizer.state.get(param)
    if not state:
        return None
    for key in MOMENTA:
        held = state.get(key)
        if isinstance(held, Tensor) and held.is_floating_point() and held.numel() == param.numel():
            return held
    raise ValueError(
        f"{name} cannot be perturbed along its momentum: {type(optimizer).__name__} keeps no running mean of its gradients (it has "
        f"{', '.join(map(str, state)) or 'nothing'}); leave it out by params="
    )
