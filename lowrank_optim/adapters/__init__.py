"""Low-rank adapters: which parameters of a model are pairs, and what can be done to them besides training."""

from lowrank_optim.adapters.pairs import lora_pairs, update_scalings
from lowrank_optim.adapters.prune import prune_ranks_

__all__ = ["lora_pairs", "prune_ranks_", "update_scalings"]
