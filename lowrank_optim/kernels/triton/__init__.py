"""Backend "triton"."""

from lowrank_optim.kernels.dispatch import Loaded, Unavailable


def load() -> Loaded:
    raise Unavailable("it is not built.")
