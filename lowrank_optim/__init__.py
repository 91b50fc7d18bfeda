"""Memory-efficient optimizers for PyTorch: the public names, nothing else."""

from lowrank_optim._version import __version__

__all__ = ["__version__"]
