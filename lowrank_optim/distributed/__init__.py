"""Training on several processes: where the parts of sharded tensors lie, and the hook that makes DDP send R instead of G.

Light to import: `torch.distributed.tensor` and its kin are imported where a parameter needs them.
"""

from lowrank_optim.distributed.shards import HERE, Shards
from lowrank_optim.distributed.spread import WHOLE, Spread

__all__ = ["HERE", "WHOLE", "Shards", "Spread"]
