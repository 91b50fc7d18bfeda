"""Will it fit? Peak memory of model × optimizer × batch, found by running the real step on tensors without numbers.

`plan` is the whole interface for Python, `lowrank-optim plan` for the shell. Nothing in the package imports this folder.
"""

from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.memory_plan import MemoryPlan
from lowrank_optim.planner.planning import plan

__all__ = ["MemoryPlan", "PlanError", "plan"]
