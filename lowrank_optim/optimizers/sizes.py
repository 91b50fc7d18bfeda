"""How much memory an optimizer's state takes."""

from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.sharding.dtensor import local


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Exact bytes of an optimizer's state by kind (`exp_avg`, `basis`, `step`, …), for any torch optimizer.

    Of sharded state, the bytes that this process holds.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> lo.state_bytes(lo.GaLoreAdamW([weight], rank=4))
        {'basis': 512, 'exp_avg': 1024, 'exp_avg_sq': 1024, 'last_refresh': 8, 'step': 4}
    """
    total: dict[str, int] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value = local(value)
                total[name] = total.get(name, 0) + value.numel() * value.element_size()
    return dict(sorted(total.items()))
