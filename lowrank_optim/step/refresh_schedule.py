"""When a subspace is refreshed: a pure function of the step and the gap, so that nothing else has to be saved."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_optim.groups.names import plain_name
from lowrank_optim.step.param_plan import ParamPlan


def stagger_offset(ordinal: int, count: int, gap: int) -> int:
    """How many steps before a multiple of the gap the low-rank parameter number `ordinal` of `count` is refreshed: in [0, gap)."""
    return ordinal * gap // max(count, 1)


def stagger_ordinals(plans: Mapping[Tensor, ParamPlan]) -> dict[Tensor, tuple[int, int]]:
    """Number and count of each low-rank parameter whose refreshes may be spread: by name where all have one, else by position."""
    low_rank = [param for param, plan in plans.items() if plan.space is not None]
    if all(plan.named for plan in plans.values()):
        low_rank.sort(key=lambda param: plain_name(plans[param].name))
    return {p: (i if plans[p].projector.staggers else 0, len(low_rank)) for i, p in enumerate(low_rank)}


def latest_refresh(step: int, gap: int, offset: int) -> int:
    """The last step at or before `step` (counted from 0) for which a refresh is scheduled.

    Refreshes are scheduled for step 0, when every parameter needs its first basis, and for all later steps s with
    s + offset ≡ 0 (mod gap). A refresh is due while the last successful one is older than the last scheduled one; so one that fails
    is tried again on the next step.
    """
    return max(step - (step + offset) % gap, 0)


def moment_steps(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> float:
    """The steps that the moments have seen; a reset starts them, and so their bias correction, again."""
    since = max(int(state["last_refresh"]), 0) if group["on_refresh"] == "reset" else 0
    return float(state["step"]) - since


def lengthen_gap(state: Mapping[str, Tensor], overlap: float, options: Mapping[str, Any]) -> None:
    """Q-GaLore's lazy refresh: remember how much of the old subspace the new one holds; refresh less often where it is much.

    Args:
        state: `overlaps`, the last ones, oldest first, −1 where there were none yet, and `gap`; both modified in place.
        overlap: ‖P_oldᵀP_new‖²/r, in [0, 1].
        options: `overlap_threshold` and `gap_factor`.
    """
    overlaps = state["overlaps"]
    overlaps.copy_(overlaps.roll(-1))
    overlaps[-1] = overlap
    if float(overlaps[0]) >= 0.0 and float(overlaps.mean()) >= options["overlap_threshold"]:
        state["gap"].fill_(int(int(state["gap"]) * options["gap_factor"]))
