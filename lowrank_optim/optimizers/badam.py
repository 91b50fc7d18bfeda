"""BAdam: AdamW on one block of layers after the other."""

from collections.abc import Collection
from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.kernels import as_python
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.layer_sampling import ORDERS, block_of_visit
from lowrank_optim.optimizers.layer_switching import LayerSwitching
from lowrank_optim.residuals.base import Residual
from lowrank_optim.rules import Adam


class BAdamW(LayerSwitching):
    """AdamW on one block at a time, `period` steps each: block coordinate descent with Adam as the inner solver.

        for each block in turn:   m = v = 0;   K times:   W ← (1 − ηλ) W − η Adam(G) in the block, nothing in the others

    The groups come from `layer_groups(model)`: a block is a layer, or what its `layers` and `as_layers` say. Groups that are always
    on keep their moments across blocks; the paper has none (`layer_groups(model, always_on=())` freezes embeddings and head). With a
    `rank`, the matrices of the block are trained in subspaces.

    Differences from the released code: every block gets exactly K steps (there, the first one K − 1); the weight decay of the groups
    is respected (there, the defaults of the inner optimizer replace it, and norms decay); `order="fixed"` starts anew only once;
    block, round and masters are in the checkpoint.

    Args:
        params: groups of `layer_groups`.
        lr: learning rate η.
        betas: decay rates of the moments.
        eps: ε.
        weight_decay: decoupled weight decay λ.
        period: K, the steps of each visit to a block.
        order: "random" (a new permutation in each round, by the seed), "ascending", "descending", or "fixed" (one block only).
        start_block: number of the layer that is first; None: the last for "descending", the first of the permutation for "random",
            else the first.
        master_weights: keep float32 copies of the bfloat16 or float16 weights that are being trained, `master` in the state; a
            block's are dropped with its moments.
        residual: what becomes of the gradient outside of subspaces, see `LowRankOptimizer`.
        **options: see `Options`.

    Raises:
        ValueError: no group has a layer; `start_block` is none of them; a value is out of range.

    Memory: 8 bytes of moments (and 4 of master weights) for each parameter of the block or always on, and gradients of the same.

    DDP, reentrant activation checkpointing and `torch.compile`: see `LISAAdamW`.

    Paper: Luo, Yu and Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models", NeurIPS 2024,
    arXiv:2404.02827.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
        >>> model = torch.nn.Sequential(*[block() for _ in range(3)])
        >>> optimizer = lo.BAdamW(lo.layer_groups(model), lr=1e-3, period=1, order="descending")
        >>> visits = []
        >>> for _ in range(4):
        ...     visits += optimizer.awake
        ...     model(torch.randn(4, 16)).square().mean().backward()
        ...     optimizer.step()
        >>> visits
        [2, 1, 0, 2]
    """

    _group_options: ClassVar = {**LayerSwitching._group_options, "order": "random", "start_block": None}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        period: int = 100,
        order: str = "random",
        start_block: int | None = None,
        master_weights: bool = False,
        residual: str | Residual = "none",
        **options: Unpack[Options],
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; valid values are {', '.join(map(repr, ORDERS))}")
        master_weights = as_python(master_weights)
        if not isinstance(master_weights, bool):
            raise ValueError(f"master_weights is {master_weights!r}; it must be True or False")
        schedule = {
            "layerwise": "badam",
            "period": period,
            "order": order,
            "start_block": start_block,
            "master_weights": master_weights,
        }
        super().__init__(params, Adam(betas, eps), lr, weight_decay, residual, schedule, options)

    def _choose(self, period: int) -> Collection[int]:
        first, layers = self.param_groups[0], self.layers
        start = first["start_block"]
        if start is not None and start not in layers:
            raise ValueError(f"start_block is {start!r}; the layers are {', '.join(map(str, layers))}")
        position = None if start is None else layers.index(start)
        return [layers[block_of_visit(first["order"], period, len(layers), position, first["seed"])]]

    @property
    def _restarts(self) -> bool:
        return bool(self.param_groups[0]["order"] != "fixed")
