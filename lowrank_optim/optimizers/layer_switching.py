"""Training some layers at a time: what LISA and BAdam share.

`LayerSwitching` switches whole layers on and off between two steps: `requires_grad`, gradients and optimizer state. Which layers, a
subclass says. Everything that a resumed run needs stands in the param groups as plain numbers (`awake`, `born`, `steps`), or in the
state as tensors.
"""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.groups.layer_report import describe_layers
from lowrank_optim.groups.options import Options, plain_options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.residuals.base import Residual
from lowrank_optim.rules import Rule
from lowrank_optim.step.init_state import init_state

_log = logging.getLogger("lowrank_optim")

SLEEPING_STATE = ("free", "cpu")


class LayerSwitching(LowRankOptimizer):
    """The base of optimizers that train some layers at a time, built from `layer_groups`.

    Layers that sleep have `requires_grad=False`, no gradient and no state on their device; they neither change nor decay. The switch
    is made when the optimizer is built and at the end of each step that ends a period, so that the next backward computes the
    gradients of the right layers. Groups whose `layer` is None are always on.

    Args:
        params: groups with a key `layer`.
        rule, lr, weight_decay, residual: as for `LowRankOptimizer`.
        schedule: period, and what else says which layers are trained when; goes into every group, and so into checkpoints.
        options: see `Options`.
    """

    # Keys of every group besides those of LowRankOptimizer. A period's number is steps // period.
    _group_options: ClassVar[Mapping[str, Any]] = {
        "layer": None,  # number of the layer; None: always on
        "awake": False,  # whether the layer is trained now
        "born": 0,  # number of the period in which the layer's state was made
        "steps": 0,  # steps that the optimizer has taken
        "layerwise": "",  # name of the method
        "sleeping_state": "free",
        "master_weights": False,
        "period": 1,
    }
    _built = False

    def __init__(
        self,
        params: Params,
        rule: Rule,
        lr: float | Tensor,
        weight_decay: float,
        residual: str | Residual,
        schedule: Mapping[str, Any],
        options: Options,
    ) -> None:
        schedule = plain_options(schedule)
        period = schedule["period"]
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"period is {period!r}; it must be an int of at least 1 (steps)")
        settings = {**schedule, **options}
        super().__init__(params, rule=rule, residual=residual, lr=lr, weight_decay=weight_decay, **settings)
        if not self.layers:
            found = [f"group {i}: {_shown(group)}" for i, group in enumerate(self.param_groups)]
            raise ValueError(
                f"{type(self).__name__} trains some layers at a time, but no group has a layer; build the groups with "
                f"lowrank_optim.layer_groups(model). The groups are: {'; '.join(found)}"
            )
        awake = self._choose(0)
        self._built = True
        self._switch(awake)
        _log.info("%s:\n%s", type(self).__name__, describe_layers(self))

    @abstractmethod
    def _choose(self, period: int) -> Collection[int]:
        """The layers that are awake in the period of this number."""

    @property
    def _restarts(self) -> bool:
        """Whether a layer that is chosen again without a pause starts with new state."""
        return False

    @property
    def layers(self) -> list[int]:
        """The numbers of all layers."""
        return sorted({group["layer"] for group in self._layer_groups()})

    @property
    def awake(self) -> list[int]:
        """The numbers of the layers that are trained now."""
        return sorted({group["layer"] for group in self._layer_groups() if group["awake"]})

    def release(self) -> None:
        """Give every layer `requires_grad=True` again, to hand the model to another optimizer; this one is not stepped any more."""
        for group in self._layer_groups():
            for param in group["params"]:
                param.requires_grad_(param.is_floating_point())

    def _layer_groups(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["layer"] is not None)

    # ------------------------------------------------------------------------------------------------------------- switch

    def _end_step(self) -> None:
        super()._end_step()
        steps = self.param_groups[0]["steps"] + 1
        for group in self.param_groups:
            group["steps"] = steps
        period, position = divmod(steps, self.param_groups[0]["period"])
        if position == 0:
            self._switch(self._choose(period))

    def _switch(self, awake: Collection[int]) -> None:
        """Put all other layers to sleep, then wake these: in this order, so that old and new state never exist together."""
        for group in self._layer_groups():
            if group["layer"] not in awake or self._restarts:
                self._put_to_sleep(group)
        for group in self._layer_groups():
            if group["layer"] in awake and not group["awake"]:
                self._wake(group)
        self._tell_hooks()

    def _put_to_sleep(self, group: dict[str, Any]) -> None:
        group["awake"] = False
        for param in group["params"]:
            param.requires_grad_(False)
            param.grad = None
            state = self.state.pop(param, {})
            if state and group["sleeping_state"] == "cpu":
                self.state[param] = {name: tensor.cpu() for name, tensor in state.items()}

    def _wake(self, group: dict[str, Any]) -> None:
        group["awake"] = True
        period = group["steps"] // group["period"]
        for param in group["params"]:
            param.requires_grad_(param.is_floating_point())
            if parked := self.state.get(param):
                self.state[param] = {
                    name: tensor if self.plans[param].is_on_host(name) else tensor.to(param.device)
                    for name, tensor in parked.items()
                }
            else:
                group["born"] = period
                self.state[param] = init_state(param, group, self.plans[param])

    def _tell_hooks(self) -> None:
        """Let updates inside backward find the parameters that were woken."""
        if self._in_backward is not None:
            self._in_backward.refresh_hooks()

    def _admits(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        if self._is_trained(group):
            return True
        # Somebody has set `requires_grad` in a layer that sleeps.
        if "asleep" not in self.plans.warned:
            self.plans.warned.add("asleep")
            warnings.warn(
                f"{self.plans[param].name} has a gradient, but its layer sleeps: something has set requires_grad=True. The "
                "gradient is dropped and the layer sleeps again; later ones do so without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        param.grad = None
        param.requires_grad_(False)
        return False

    def may_begin(self, group: Mapping[str, Any]) -> bool:
        return group["layer"] is None  # those of layers that are awake have some

    def _is_trained(self, group: Mapping[str, Any]) -> bool:
        return group["layer"] is None or group["awake"]

    # -------------------------------------------------------------------------------------------------------------- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch: always on, or of a layer that the optimizer knows. New layers need a new optimizer."""
        layer = kernels.as_python(param_group.get("layer"))
        if self._built and layer is not None and layer not in self.layers:
            raise ValueError(
                f"layer is {layer!r} in a param group that is added later; the layers that take turns are those that the optimizer "
                f"was built with: {', '.join(map(str, self.layers))}. Build a new optimizer"
            )
        awake, steps = self.awake, self.param_groups[0]["steps"] if self.param_groups else 0
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["steps"] = steps
        if layer is None:
            return
        if self._built:
            self._put_to_sleep(group)
        else:
            for param in group["params"]:
                self.state.pop(param, None)
        if layer in awake:
            self._wake(group)
            self._tell_hooks()

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        layer = options["layer"]
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise ValueError(
                f"layer is {layer!r} in a param group; it must be an int of at least 0, or None (always on)"
            )
        for name in self._group_options:
            if name not in ("layer", "awake", "born", "steps") and options[name] != self.defaults[name]:
                raise ValueError(
                    f"{name} is {options[name]!r} in a param group, {self.defaults[name]!r} in the optimizer; it cannot differ"
                )
        if options["sleeping_state"] not in SLEEPING_STATE:
            raise ValueError(
                f"sleeping_state is {options['sleeping_state']!r}; valid values are {', '.join(map(repr, SLEEPING_STATE))}"
            )
        if options["master_weights"] and options["stochastic_rounding"]:
            raise ValueError(
                "master_weights and stochastic_rounding are both True; the weights are rounded from their float32 masters, so "
                "choose one"
            )

    def followed(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        # A float32 weight needs no master: the rounded weights count, as if others had been loaded.
        state = super().followed(param, {**group, "awake": True})
        return state if self._is_trained(group) else {name: tensor.cpu() for name, tensor in state.items()}

    def state_template(self, param: Tensor, saved: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        if not self._is_trained(group) and (not saved or group["sleeping_state"] == "free"):
            return {}
        return super().state_template(param, saved, {**group, "awake": True})

    def state_device(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.device:
        return super().state_device(name, param, group) if self._is_trained(group) else torch.device("cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, and with it which layers are awake and how many steps of the period are done.

        Raises:
            ValueError: as for `LowRankOptimizer`; the optimizer and `requires_grad` of the parameters are as they were.
        """
        super().load_state_dict(state_dict)
        for group in self._layer_groups():
            for param in group["params"]:
                param.requires_grad_(group["awake"] and param.is_floating_point())
                param.grad = param.grad if group["awake"] else None
        self._tell_hooks()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_built": True}


def _shown(group: Mapping[str, Any]) -> str:
    names = list(group.get("param_names", []))
    count = len(group["params"])
    listed = f" ({', '.join(names[:2])}{', …' if count > 2 else ''})" if names else ""
    return f"{count} parameter{'s' * (count != 1)}{listed}"
