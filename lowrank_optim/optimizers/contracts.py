"""What the parts of an optimizer ask of each other: it of updates in backward, and those who look after its state of it."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.step.batching import Step
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.plans import Plans
from lowrank_optim.step.trained_param import TrainedParam


class Attachment(Protocol):
    """Hooks that step an optimizer's parameters while gradients are computed (`lowrank_optim.in_backward`)."""

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None once it does not exist any more."""

    @property
    def active(self) -> bool:
        """Whether parameters are updated in backward."""

    def check(self, plans: Mapping[Tensor, ParamPlan], groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise where these parameters, and the options of their groups, cannot be updated in backward."""

    def on_gradient(self, param: Tensor) -> None:
        """Take a gradient that was just accumulated."""

    def refuse_step_of(self, other: Optimizer) -> None:
        """Raise RuntimeError where another optimizer is about to step these parameters."""

    def finish_step(self) -> None:
        """Do what is left of a step."""

    def restart(self) -> None:
        """Forget the step that is under way: another state was loaded."""

    def refresh_hooks(self) -> None:
        """Look for parameters that are new, or train again."""

    def template(self, param: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Types and shapes of what is kept of unfinished steps in a checkpoint."""


class Watch(Protocol):
    """Who wants to know how far a step has come (`lowrank_optim.watch_step`)."""

    def begin(self) -> None:
        """A parameter is about to be updated."""

    def updated(self, *params: Tensor) -> None:
        """Parameters have been updated."""

    def follow(self, step: Step, params: tuple[Tensor, ...]) -> Step:
        """The step of these parameters, noted at its beginning and its end."""

    def end(self) -> None:
        """The step is over."""


class HasState(Protocol):
    """An optimizer with plans, as those see it who load, convert and lay out its state."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    _in_backward: Attachment | None

    @property
    def state(self) -> Any:
        """Of every parameter."""

    @property
    def plans(self) -> Plans:
        """How each parameter is trained."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where a complete group says what cannot be."""

    def is_trained(self, param: Tensor) -> bool:
        """Whether the optimizer trains this parameter now."""

    def may_begin(self, group: Mapping[str, Any]) -> bool:
        """Whether a parameter without state in a checkpoint begins afresh."""

    def trained(self, param: Tensor, changed: Any = None) -> TrainedParam:
        """One parameter in the step that comes."""

    def state_device(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.device:
        """Where a state tensor of this name belongs."""

    def followed(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter that was moved or converted."""
