"""Operations of an optimizer step on plain tensors. Imports only torch.

Callers use the names exported here; which backend runs them is decided here and nowhere else. At present there is one: the
reference, in torch ops, for every device.
"""

from lowrank_optim.kernels.reference import (
    ResidualTerm,
    adam_direct_,
    apply_,
    apply_dense_,
    compute_dtype,
    decay_,
    masked_scalar,
    norm,
    project,
    project_with_norms,
    row_chunks,
    scalar,
    stochastic_round,
    store_,
)

__all__ = [
    "ResidualTerm",
    "adam_direct_",
    "apply_",
    "apply_dense_",
    "compute_dtype",
    "decay_",
    "masked_scalar",
    "norm",
    "project",
    "project_with_norms",
    "row_chunks",
    "scalar",
    "stochastic_round",
    "store_",
]
