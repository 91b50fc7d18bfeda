"""Backend "torch": operations that take many passes over their tensors, in torch operations that reuse a few buffers, and products
with sparse matrices by torch's own.

It serves every device, and comes after the compiled backends: for machines without a compiler, MPS, and GPUs without Triton. Its
results are those of the definitions: of coded moments to the bit, of products to the order of their sums.
"""

from lowrank_optim.kernels.dispatch import EVERY_DEVICE, Kernel, Loaded
from lowrank_optim.kernels.torch import sparse
from lowrank_optim.kernels.torch.coded_adam import coded_adam_dense_, coded_adam_direct_


def load() -> Loaded:
    """The backend, which is always there."""
    operations: dict[str, Kernel] = {"coded_adam_direct_": coded_adam_direct_, "coded_adam_dense_": coded_adam_dense_}
    products: dict[str, Kernel] = {
        "sltrain_forward": sparse.sltrain_forward,
        "sltrain_backward_input": sparse.sltrain_backward_input,
        "sampled_product": sparse.sampled_product,
    }
    about = "in place, in buffers that stay in the caches"
    return Loaded(frozenset({EVERY_DEVICE}), operations | products, about, partly=frozenset(products))
