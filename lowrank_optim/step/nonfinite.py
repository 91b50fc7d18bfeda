"""What happens when a gradient is not finite: the update of that parameter is masked out, counted, and warned of once.

Reading a flag costs nothing where the parameter lives on the CPU. On an accelerator it would make the host wait, so there the mask
stays on the device, and a total is copied back now and then without waiting.
"""

import math
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.sharding.dtensor import local_grad
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.param_plan import ParamPlan

POLL_EVERY = 100
"""Steps between two looks at the counters of an accelerator."""


def first_norms(
    groups: Iterable[Mapping[str, Any]], plans: Mapping[Tensor, ParamPlan], left_out: Container[int] = ()
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """A number that is finite where the gradient is, 0-d, for every dense parameter and every sharded one; and Σ x² of the lines of
    gradients whose rules measure them first of all (`Rule.lines_to_measure`): those are not read once more.

    Together: one launch where a backend can, and one message for all parameters that lie on the same processes. Groups of the numbers
    `left_out` have no such numbers.
    """
    norms: dict[Tensor, Tensor] = {}
    squares: dict[Tensor, Tensor] = {}
    grads: dict[Tensor, Tensor] = {}
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for number, group in enumerate(groups):
        if number in left_out or group["on_nonfinite"] == "propagate":
            continue
        for param in group["params"]:
            if param.grad is None:
                continue
            plan = plans[param]
            sharded = plan.sharding is not LOCAL and plan.sharding.matrix.splits()
            if sharded:
                found.setdefault((param.device, *plan.sharding.matrix.groups()), []).append(param)
            axis = plan.rule.lines_to_measure(group) if plan.space is None and plan.sharding is LOCAL else None
            if axis is not None and param.device.type == "cpu":
                squares[param] = sums = kernels.line_sums(plan.view(param.grad), axis, 2)
                norms[param] = sums.sum()
            elif sharded or plan.space is None:
                grads[param] = local_grad(param)
    if not grads:
        return norms, squares
    norms |= dict(zip(grads, kernels.norms(list(grads.values())), strict=True))
    for params in found.values():
        total = plans[params[0]].sharding.matrix.sum(torch.stack([norms[param].double() for param in params]))
        norms |= dict(zip(params, total.unbind(), strict=True))
    return norms, squares


class SkippedUpdates:
    """Counters of masked updates by parameter. Diagnostic: not part of the state."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._warned = False
        self._pending: tuple[Tensor, torch.Event] | None = None
        self._steps = 0

    def add(self, name: str, skipped: Tensor) -> None:
        """Count one update of parameter `name` where the 0-d bool `skipped` is true."""
        if name not in self._counts:
            self._counts[name] = torch.zeros((), dtype=torch.int64, device=skipped.device)
        self._counts[name] += skipped

    def check(self, seen: Tensor, plan: ParamPlan, policy: str, mask_on_device: bool) -> Literal[False] | Tensor | None:
        """Whether a gradient may be used: None for yes, False for no, or, where the host would have to wait, a 0-d bool.

        Args:
            seen: what shows whether the gradient is finite, or, 0-d, its norm on all processes.
            plan: of its parameter.
            policy: the option `on_nonfinite`.
            mask_on_device: do as for accelerators.
        """
        if policy == "propagate":
            return None
        norm = kernels.norm(seen) if seen.dim() else seen
        if seen.dim() and plan.sharding is not LOCAL:
            norm = plan.sharding.matrix.sum(norm)
        if policy == "skip" and (norm.device.type != "cpu" or mask_on_device):
            ok = torch.isfinite(norm)
            self.add(plan.name, ~ok)
            return ok
        if math.isfinite(norm):
            return None
        if policy == "raise":
            raise RuntimeError(
                f"the gradient of {plan.name} {plan.shape} holds NaN or infinity; the parameter is unchanged "
                '(on_nonfinite="raise"; "skip" leaves such updates out and counts them)'
            )
        self.add(plan.name, kernels.cpu_tensor(True, torch.bool))
        self.warn()
        return False

    def warn(self) -> None:
        """Warn, the first time."""
        if not self._warned:
            self._warned = True
            names = ", ".join(list(self.read())[:5])
            warnings.warn(
                f"skipped the update of {names}: the gradient holds NaN or infinity. The weights, moments and basis are as they "
                'were. Later ones are counted (optimizer.skipped_updates()) without a warning; on_nonfinite="raise" stops at the '
                "first one.",
                RuntimeWarning,
                stacklevel=5,
            )

    def poll(self) -> None:
        """Called once a step: look at accelerators' counters now and then, a copy behind, without waiting."""
        self._steps += 1
        if self._warned or not self._counts:
            return
        if self._pending is not None and self._pending[1].query():
            skipped, self._pending = int(self._pending[0]), None
            if skipped:
                self.warn()
        on_device = [count for count in self._counts.values() if count.device.type != "cpu"]
        if on_device and self._pending is None and self._steps % POLL_EVERY == 1:
            total = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
            total.copy_(torch.stack(on_device).sum(), non_blocking=True)
            event = torch.Event(on_device[0].device)
            event.record()
            self._pending = (total, event)

    def read(self) -> dict[str, int]:
        """Masked updates by parameter name, those with any; waits for the device."""
        counts = {name: int(count) for name, count in self._counts.items()}
        return {name: count for name, count in counts.items() if count}
