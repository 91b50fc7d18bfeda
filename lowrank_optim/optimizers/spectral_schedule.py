"""`SpectralSchedule`: what Sparse Spectral Training does between two steps, beside any optimizer."""

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowrank_optim.groups.names import list_patterns
from lowrank_optim.kernels import PlainModes, as_python
from lowrank_optim.nn.spectral_linear import check_mixture
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.optimizers.spectral_layers import (
    PARAMETERS,
    VECTORS,
    SpectralLayer,
    layers_of,
    put_parameters_back,
    renew,
    settle_values,
    settle_vectors,
)
from lowrank_optim.sharding.dtensor import local
from lowrank_optim.step.refresh_schedule import stagger_offset


class SpectralSchedule:
    """The rest of Sparse Spectral Training (SST) for layers of `lowrank_optim.nn.spectral_`: call `step` after each optimizer step.

    Each step: Σ ← max(Σ, 0), and the vectors that are trained get length 1. Every `period` steps: the vectors are written back,
    `rank` triplets are drawn anew, with p_i = mixture/d + (1 − mixture) Σ_i/ΣΣ one after another, and the optimizer's state of the
    vectors begins afresh. Every `iterations` draws, before the draw: [U, Σ, V] ← SVD(U Σ Vᵀ), and the state of Σ begins afresh, too.
    The weight U Σ Vᵀ is the same before and after a draw and a decomposition. With `stagger`, each of L layers does all this at steps
    of its own, period/L apart, so that no step decomposes all weights; only the first draw then comes earlier.

    Changes of vectors in the t-th of the first `warmup` steps after a draw are multiplied by t/warmup, and so are those of Σ after a
    decomposition: a linear warm-up of the learning rate, of these parameters alone. A vector that a step has made zero or not finite
    is taken back to what it was.

    Args:
        model: with layers that `spectral_` made; layers none of whose parameters the optimizer holds are left alone.
        optimizer: any that makes its state at a parameter's first step, or any of this package.
        period: steps between two draws.
        iterations: draws between two decompositions; None: ⌈d/rank⌉ of each layer.
        warmup: steps, at most `period`; 0 has no warm-up. The model begins with one.
        mixture: share of the uniform part in the draws, in [0, 1]; None: that of the layers, with which `spectral_` made the first.
        stagger: whether layers have their draws at different steps; the paper has them at the same.

    Raises:
        TypeError: no nn.Module, or no torch.optim.Optimizer.
        ValueError: a value out of range; a model without such layers; an optimizer that holds none of their parameters, or makes its
            state when it is built (Adagrad); parameters whose ranks are split over processes (tensor parallelism).

    Memory: during a step a copy of the vectors that are trained, b·r·(m + n) bytes a layer at b bytes a number; with
    `update_in_backward` all the time. While it decomposes, about 3 m×n matrices of float64 (float32 on accelerators), for one layer
    at a time.

    `lowrank_optim.plan` counts both where a function builds the optimizer and attaches the schedule.

    With `update_in_backward`: attach it first, then make the schedule, and load a checkpoint into the schedule last. With DDP the
    schedule runs in every process; fully_shard splits the parameters that are trained, while each process holds the buffers whole:
    make and call the schedule on all processes.

    A run resumes to the bit from the state dicts of model, optimizer and schedule.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = lo.nn.spectral_(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)), rank=4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        >>> schedule = lo.SpectralSchedule(model, optimizer, period=10, warmup=2)
        >>> before = model[0].active.tolist()
        >>> for _ in range(10):
        ...     model(torch.randn(8, 32)).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        ...     optimizer.zero_grad()
        >>> model[0].active.tolist() == before
        False

    Paper: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arXiv:2405.15481.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        period: int = 200,
        iterations: int | None = None,
        warmup: int = 20,
        mixture: float | None = None,
        stagger: bool = False,
    ) -> None:
        period, iterations, warmup, mixture = map(as_python, (period, iterations, warmup, mixture))
        _check_numbers(period, iterations, warmup, mixture, stagger)
        self.optimizer = optimizer
        self.period, self.iterations, self.warmup, self.mixture = period, iterations, warmup, mixture
        self.stagger = stagger
        self.steps = 0
        self._model, self._layers = model, layers_of(model, optimizer)
        self._handle: RemovableHandle | None = None
        self._old: dict[tuple[str, str], Tensor] = {}
        self._remember()
        own = weakref.ref(self)  # an optimizer keeps no schedule alive that is not attached

        def before_step(*_: Any) -> None:
            schedule = own()
            if schedule is not None and not schedule._in_backward:
                schedule._remember()

        optimizer.register_step_pre_hook(before_step)

    def step(self) -> None:
        """Do what is due after a step of the optimizer.

        Raises:
            RuntimeError: the schedule is attached, so that the optimizer calls it; a weight to be decomposed is not finite.
        """
        if self._attached:
            raise RuntimeError("the schedule is attached: optimizer.step() calls it; leave schedule.step() out")
        self._advance()

    def attach(self) -> RemovableHandle:
        """Let each `optimizer.step()` call it, so that a trainer's loop need not; `remove()` of what is returned ends that."""
        if self._attached:
            raise RuntimeError("the schedule is attached already")
        self._handle = self.optimizer.register_step_post_hook(self._advance)
        return self._handle

    @property
    def _attached(self) -> bool:
        return self._handle is not None and self._handle.id in (self._handle.hooks_dict_ref() or {})

    @property
    def description(self) -> str:
        """What `describe` says of it."""
        names = list_patterns(layer.path for layer in self._layers)
        return f"triplets drawn every {self.period} steps, weights decomposed after some draws: {names}"

    @property
    def heavy_steps(self) -> tuple[str, ...]:
        """Steps in a row that take memory of their own, for the planner, which calls `make_due` before the first."""
        return ("step with a decomposition",)

    def make_due(self) -> None:
        """Let so many steps have passed that the next one decomposes all weights, which takes what the largest one takes."""
        self.stagger = False
        self.steps = self.period * math.lcm(*map(self._iterations, self._layers)) - 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the options: plain numbers."""
        return {"steps": self.steps, **self._options}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as a saved schedule would. Load the model first.

        Raises:
            ValueError: the saved one has other options, or keys are missing.
        """
        given = {name: as_python(state_dict.get(name)) for name in ("steps", *self._options)}
        steps = given.pop("steps")
        if given != self._options or isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"the state is {dict(state_dict)}; this schedule has {self._options}, and needs steps besides"
            )
        self._remember()  # which may raise
        self.steps = steps

    @property
    def _options(self) -> dict[str, Any]:
        names = ("period", "iterations", "warmup", "stagger")
        first = [layer.modules[0] for layer in self._layers]
        mixtures = [self._mixture(layer) for layer in self._layers]
        return {name: getattr(self, name) for name in names} | {"mixtures": mixtures, "seeds": [m.seed for m in first]}

    # ------------------------------------------------------------------------------------------------------ after each step

    @property
    def _in_backward(self) -> bool:
        """Whether parameters change before the optimizer's step begins."""
        return getattr(self.optimizer, "_in_backward", None) is not None

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep copies of the parameters as they are before a step."""
        put_parameters_back(self._model, self._layers)
        for layer in self._layers:
            for name in PARAMETERS if self.warmup else VECTORS:
                self._old[layer.path, name] = local(layer.param(name)).clone()

    def _advance(self, *_: Any) -> None:
        put_parameters_back(self._model, self._layers)
        steps, self.steps = self.steps, self.steps + 1
        with PlainModes():
            for number, layer in enumerate(self._layers):
                if not layer.trained:
                    continue
                early = stagger_offset(number, len(self._layers), self.period) if self.stagger else 0
                draws, since = divmod(steps + early, self.period)
                self._settle(layer, draws, since, steps)
                if since + 1 == self.period:
                    again = (draws + 1) % self._iterations(layer) == 0
                    changed = renew(layer, draws + 1, self._mixture(layer), again)
                    _reset(self.optimizer, [layer.param(name) for name in changed])
        self._old.clear()
        if self._in_backward:
            self._remember()

    def _settle(self, layer: SpectralLayer, draws: int, since: int, steps: int) -> None:
        """Lengths, signs and warm-up after a step, the one after `since` others since draw number `draws`, and `steps` in all."""
        since_round = draws % self._iterations(layer) * self.period + since
        for name in VECTORS:
            settle_vectors(layer.param(name), self._old.get((layer.path, name)), self._share(min(since, steps)))
        values = layer.param("sigma")
        settle_values(values, self._old.get((layer.path, "sigma")), self._share(min(since_round, steps)))

    def _iterations(self, layer: SpectralLayer) -> int:
        """Draws between two decompositions of a layer."""
        first = layer.modules[0]
        return self.iterations or -(-first.sigma.numel() // first.rank)

    def _mixture(self, layer: SpectralLayer) -> float:
        """The share of the uniform part in a layer's draws."""
        return layer.modules[0].mixture if self.mixture is None else self.mixture

    def _share(self, since: int) -> float:
        """What warm-up leaves of a step that comes after `since` others."""
        return min(1.0, (since + 1) / self.warmup) if self.warmup else 1.0


def _reset(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Let the optimizer's state of some parameters begin afresh."""
    if isinstance(optimizer, LowRankOptimizer):
        optimizer.reset_state(param for param in params if param in optimizer.plans)
        return
    for param in params:
        if param in optimizer.state:
            optimizer.state[param].clear()


def _check_numbers(period: Any, iterations: Any, warmup: Any, mixture: Any, stagger: Any) -> None:
    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not whole(period, 1):
        raise ValueError(f"period is {period!r}; it must be an integer of at least 1 (steps)")
    if iterations is not None and not whole(iterations, 1):
        raise ValueError(f"iterations is {iterations!r}; it must be an integer of at least 1 (draws), or None")
    if not whole(warmup, 0):
        raise ValueError(f"warmup is {warmup!r}; it must be an integer of at least 0 (steps)")
    if warmup > period:
        raise ValueError(
            f"warmup is {warmup}, longer than the period of {period} steps, so that it would never end; take {period} or less"
        )
    if mixture is not None:
        check_mixture(mixture)
    if not isinstance(stagger, bool):
        raise ValueError(f"stagger is {stagger!r}; it must be True or False")
