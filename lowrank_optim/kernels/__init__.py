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
    apply_call,
    apply_dense_,
    folded_adam_dense_call,
    lion_direct_,
    no_factors,
    project,
    project_with_norms,
    rmsprop_direct_,
    sgd_direct_,
    store_,
)
from lowrank_optim.kernels.arguments import pack_key, pack_scalars, unpack_key
from lowrank_optim.kernels.coded_reference import decode_adam, encode_adam
from lowrank_optim.kernels.compute import (
    cache_elements,
    compute_dtype,
    is_known,
    line_sums,
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
from lowrank_optim.kernels.folded_reference import fold_means
from lowrank_optim.kernels.host import (
    PlainModes,
    as_python,
    check_no_class,
    cpu_tensor,
    no_autograd_no_autocast,
    outside_graph,
)
from lowrank_optim.kernels.reference import ResidualTerm, decay_
from lowrank_optim.kernels.rounding import WeightError, joined, stochastic_round
from lowrank_optim.kernels.sparse_reference import low_rank, token_rows

__all__ = [
    "AdamNumbers",
    "Loaded",
    "PlainModes",
    "ResidualTerm",
    "Unavailable",
    "WeightError",
    "adam_dense_call",
    "adam_direct_",
    "adam_direct_call",
    "apply_",
    "apply_call",
    "apply_dense_",
    "as_python",
    "backends",
    "batches",
    "cache_elements",
    "call",
    "check_no_class",
    "compute_dtype",
    "cpu_tensor",
    "decay_",
    "decode_adam",
    "definition",
    "encode_adam",
    "fold_means",
    "folded_adam_dense_call",
    "is_known",
    "is_watched",
    "joined",
    "line_sums",
    "lion_direct_",
    "low_rank",
    "masked_scalar",
    "no_autograd_no_autocast",
    "no_factors",
    "norm",
    "norms",
    "outside_graph",
    "pack_key",
    "pack_scalars",
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
    "token_rows",
    "unpack_key",
]
