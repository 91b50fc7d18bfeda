"""Training layer by layer: updates inside backward, and which layers are trained when."""

from lowrank_optim.in_backward.hooks import UpdateInBackward, update_in_backward

__all__ = ["UpdateInBackward", "update_in_backward"]
