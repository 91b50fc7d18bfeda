"""Training layer by layer: updates inside backward, and which layers are trained when."""

from lowrank_optim.layerwise.in_backward import UpdateInBackward, update_in_backward

__all__ = ["UpdateInBackward", "update_in_backward"]
