"""What the step of one parameter works on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_optim.optimizers.layout import Layout


@dataclass(frozen=True)
class Job:
    """One parameter in one step.

    state: the optimizer's state of the parameter, as it is stored.
    moments: the rule's tensors in the compute type: the state itself, or, where it is coded, decoded for this step.
    """

    param: Tensor
    group: Mapping[str, Any]
    layout: Layout
    state: dict[str, Tensor]
    moments: dict[str, Tensor]
