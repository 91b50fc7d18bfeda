"""Training on several processes: where the parts of sharded tensors lie, and the hook that makes DDP send R instead of G.

Light to import: `torch.distributed.tensor` and its kin are imported where a parameter needs them.
"""

from typing import TYPE_CHECKING, Any

from lowrank_optim.distributed.checkpoint_template import match_checkpoint

if TYPE_CHECKING:
    from lowrank_optim.distributed.ddp import LowRankHook

__all__ = [
    "LowRankHook",
    "match_checkpoint",
]


def __getattr__(name: str) -> Any:
    """`LowRankHook`, imported when it is first asked for: torch can be built without process groups."""
    if name == "LowRankHook":
        from lowrank_optim.distributed.ddp import LowRankHook

        return LowRankHook
    if name == "use_exact_sums":
        raise AttributeError("use_exact_sums is an option of every optimizer now: exact_sums=True")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
