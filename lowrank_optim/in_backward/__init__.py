"""Updates inside backward: each parameter is updated, and its gradient freed, as soon as the gradient is complete."""

from lowrank_optim.in_backward.attach import update_in_backward
from lowrank_optim.in_backward.hooks import UpdateInBackward

__all__ = ["UpdateInBackward", "update_in_backward"]
