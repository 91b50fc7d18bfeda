"""Operations of an optimizer step on plain tensors. Imports only torch.

Callers use the names exported here. Each operation is a `torch.ops.lowrank_optim` (`schemas`), whose backend is chosen by the device
of its tensors (`dispatch`); the definition in torch ops (`reference`) serves every device.
"""

from lowrank_optim.kernels.api import (
    AdamNumbers,
    adam_dense_call,
    adam_direct_,
    adam_direct_call,
    apply_,
    apply_dense_,
    lion_direct_,
    project,
    project_with_norms,
    rmsprop_direct_,
    sgd_direct_,
    store_,
)
from lowrank_optim.kernels.arguments import key_of, numbers, words
from lowrank_optim.kernels.coded_reference import decode_adam, encode_adam
from lowrank_optim.kernels.compiling import outside_graph
from lowrank_optim.kernels.compute import (
    cache_elements,
    compute_dtype,
    is_known,
    masked_scalar,
    norm,
    row_chunks,
    row_norms,
    scalar,
)
from lowrank_optim.kernels.dispatch import (
    Loaded,
    Unavailable,
    backends,
    batches,
    call,
    definition,
    is_watched,
    norms,
    run_many,
)
from lowrank_optim.kernels.host import as_python, host_tensor
from lowrank_optim.kernels.plain import plain_arithmetic
from lowrank_optim.kernels.reference import ResidualTerm, decay_, stochastic_round

__all__ = [
    "AdamNumbers",
    "Loaded",
    "ResidualTerm",
    "Unavailable",
    "adam_dense_call",
    "adam_direct_",
    "adam_direct_call",
    "apply_",
    "apply_dense_",
    "as_python",
    "backends",
    "batches",
    "cache_elements",
    "call",
    "compute_dtype",
    "decay_",
    "decode_adam",
    "definition",
    "encode_adam",
    "host_tensor",
    "is_known",
    "is_watched",
    "key_of",
    "lion_direct_",
    "masked_scalar",
    "norm",
    "norms",
    "numbers",
    "outside_graph",
    "plain_arithmetic",
    "project",
    "project_with_norms",
    "rmsprop_direct_",
    "row_chunks",
    "row_norms",
    "run_many",
    "scalar",
    "sgd_direct_",
    "stochastic_round",
    "store_",
    "words",
]
