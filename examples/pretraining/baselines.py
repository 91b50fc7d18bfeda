"""What the low-rank optimizers are compared with: torch's AdamW with one rate or two, and torch's Muon with AdamW beside it.

All see the same parameters as the low-rank methods: what is low-rank there is a matrix of Muon's here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import lowrank_optim as lo


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` on the groups that have a `rank`, `torch.optim.AdamW` on the others, as one optimizer.

    Both work on the state and the groups of this one, so that schedulers, checkpoints and `lowrank_optim.state_bytes` see an ordinary
    optimizer. Muon's updates are scaled to the root mean square of AdamW's (0.2·√max(m, n)), so that AdamW's learning rates fit.

    Args:
        groups: of `lowrank_optim.param_groups`; the rank itself does not matter.
        lr, weight_decay: of all groups that have none of their own.
        betas: of AdamW; Muon's momentum is 0.95, its default.

    Raises:
        RuntimeError: this torch has no Muon.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"muon needs torch 2.9 or newer, which has torch.optim.Muon; this is {torch.__version__}"
            )
        matrices = [group for group in groups if group.get("rank") is not None]
        others = [group for group in groups if group.get("rank") is None]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Bound anew in every step, for load_state_dict replaces both.
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    groups = lo.param_groups(model, rank=None, weight_decay=weight_decay)
    return AdamW(groups, lr=lr, betas=betas)


MATRIX_RATE = 0.25


def adamw_split(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """AdamW with the rates of GaLore and Fira: the matrices of the layers see a quarter of the rate (their α) and the full decay.

    This is GaLore at full rank. Beside it one sees what a low-rank method owes to its two rates and what to its subspace.
    """
    groups = lo.param_groups(model, rank=1, weight_decay=weight_decay)
    for group in groups:
        if group["rank"] is not None:
            group |= {"lr": MATRIX_RATE * lr, "weight_decay": weight_decay / MATRIX_RATE}
    return AdamW(groups, lr=lr, betas=betas)


def muon(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    groups = lo.param_groups(model, rank=1, weight_decay=weight_decay)
    return MuonWithAdamW(groups, lr, betas, weight_decay)


BASELINES: dict[str, Callable[[nn.Module, float, tuple[float, float], float], Optimizer]] = {
    "adamw": adamw,
    "adamw_split": adamw_split,
    "muon": muon,
}
