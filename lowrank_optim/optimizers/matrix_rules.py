"""What optimizers share whose matrices have a rule of their own, beside AdamW for the other parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.matrices import is_low_rank
from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.rules import Adam, Rule


class MatrixRuleOptimizer(LowRankOptimizer):
    """Groups that name the rule, or have a rank, are trained by it, all others by AdamW.

    Args:
        params: groups, at least one of which names a rule or has a rank.
        rule: of the matrices.
        lr: learning rate.
        adamw_lr: that of the groups trained by AdamW that name none; None takes `lr`.
        betas, eps: of AdamW.
        weight_decay: decoupled weight decay.
        **options: see `Options`.

    Raises:
        ValueError: no group says which parameters the rule trains.
    """

    def __init__(
        self,
        params: Params,
        *,
        rule: Rule,
        lr: float | Tensor,
        adamw_lr: float | Tensor | None,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **options: Unpack[Options],
    ) -> None:
        groups: Any = list(params) if not isinstance(params, Tensor) else [params]
        says = {key for group in [options, *groups] if isinstance(group, dict) for key in group}
        if self.matrix_options and says.isdisjoint(("rule", "rank", "density")):
            kind, told = type(self).__name__, f"rule={rule.name!r}"
            if len(self.matrix_options) > 1:
                told = f"**lo.{kind}.matrix_options"
            raise ValueError(
                f"no group says which parameters are trained by {type(rule).__name__}: {kind}(lo.param_groups(model, {told})) "
                f'gives it the matrices of the layers; in groups of your own, say {{"params": …, "rule": {rule.name!r}}}'
            )
        if adamw_lr is not None:
            groups = [_with_rate(group, rule.name, adamw_lr, options) for group in groups]
        super().__init__(groups, rule=rule, dense_rule=Adam(betas, eps), lr=lr, weight_decay=weight_decay, **options)


def _with_rate(group: Any, name: str, lr: float | Tensor, options: Mapping[str, Any]) -> Any:
    """A group with this learning rate, if AdamW trains it and it has none."""
    if not isinstance(group, dict):
        return group
    rule = group.get("rule", name if is_low_rank({**options, **group}) else "adam")
    return {"lr": lr, **group} if getattr(rule, "name", rule) == "adam" else group
