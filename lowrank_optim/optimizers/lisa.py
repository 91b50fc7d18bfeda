"""LISA: AdamW on a few layers at a time, drawn at random."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim import kernels
from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.layer_sampling import draw_layers
from lowrank_optim.optimizers.layer_switching import LayerSwitching
from lowrank_optim.residuals.base import Residual
from lowrank_optim.rules import Adam
from lowrank_optim.sharding.dtensor import dense_sharding, local

Importance: TypeAlias = Callable[[int, list[Tensor]], float]
"""(number of a layer, its parameters) → its weight in the draw, at least 0."""


class LISAAdamW(LayerSwitching):
    """AdamW on `active_layers` layers at a time, drawn anew every `period` steps; embeddings, head and final norm all the time.

        layers awake in period k ~ a draw of γ distinct ones;   W ← (1 − ηλ) W − η Adam(G) in them, nothing in the others

    The groups come from `layer_groups(model)`; with a `rank`, the matrices of the layers that are awake are trained in subspaces, as
    by `GaLoreAdamW` (other residuals: `residual`). The draw depends on the seed and the number of the period only, so it is the same
    in every process, and a checkpoint taken in the middle of a period continues to the bit.

    The released code draws anew only at steps that are multiples of the period, also after a resume (until then it trains
    everything), keeps the moments of all layers, and draws by numpy's global generator; none of it is reproduced.

    Args:
        params: groups of `layer_groups`.
        lr: learning rate η.
        betas: decay rates of the moments.
        eps: ε.
        weight_decay: decoupled weight decay λ.
        active_layers: γ, the layers that are awake at a time.
        period: steps between two draws.
        sampling: "uniform"; "weight_norm", where a layer's probability to be drawn next is ∝ the Euclidean norm of its weights; or a
            function of (number of a layer, its parameters) that returns its weight in the draw.
        sleeping_state: "free" drops the state of layers that go to sleep, so that they wake with new moments; "cpu" keeps it in main
            memory, and they continue. Layers that are drawn again at once keep theirs.
        residual: what becomes of the gradient outside of subspaces, see `LowRankOptimizer`.
        **options: see `Options`.

    Raises:
        ValueError: no group has a layer; `active_layers` is above their number; a value is out of range.

    Memory: 8 bytes of moments for each parameter that is always on or awake, and gradients of the same; none for layers that sleep.
    Nothing is saved on the always-on part, which may be the larger one: see `describe_layers`, and `always_on` of `layer_groups`.

    With DDP: wrap the model first, then build the optimizer, and set `find_unused_parameters=True`. With reentrant activation
    checkpointing and frozen embeddings, call the model's `enable_input_require_grads()`. `torch.compile` compiles again for each
    new set of layers. `torch.distributed.checkpoint` loads a checkpoint in which other layers are awake with
    `lowrank_optim.distributed.match_checkpoint`.

    Paper: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024,
    arXiv:2403.17919.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
        >>> model = torch.nn.Sequential(*[block() for _ in range(6)])
        >>> optimizer = lo.LISAAdamW(lo.layer_groups(model), lr=1e-3, active_layers=2, period=5)
        >>> model(torch.randn(4, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> len(optimizer.awake), sum(p.grad is not None for p in model.parameters())
        (2, 8)
    """

    _group_options: ClassVar = {**LayerSwitching._group_options, "active_layers": 2, "sampling": "uniform"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        active_layers: int = 2,
        period: int = 20,
        sampling: str | Importance = "uniform",
        sleeping_state: str = "free",
        residual: str | Residual = "none",
        **options: Unpack[Options],
    ) -> None:
        active_layers = kernels.as_python(active_layers)
        if isinstance(active_layers, bool) or not isinstance(active_layers, int) or active_layers < 1:
            raise ValueError(f"active_layers is {active_layers!r}; it must be an int of at least 1")
        if not callable(sampling) and sampling not in ("uniform", "weight_norm"):
            raise ValueError(f"sampling is {sampling!r}; it must be 'uniform', 'weight_norm' or a function")
        self._importance = sampling if callable(sampling) else weight_norm if sampling == "weight_norm" else None
        schedule = {
            "layerwise": "lisa",
            "active_layers": active_layers,
            "period": period,
            "sampling": "function" if callable(sampling) else sampling,
            "sleeping_state": sleeping_state,
        }
        super().__init__(params, Adam(betas, eps), lr, weight_decay, residual, schedule, options)

    def _choose(self, period: int) -> Collection[int]:
        first, layers = self.param_groups[0], self.layers
        count = first["active_layers"]
        if count > len(layers):
            raise ValueError(
                f"active_layers is {count}, but the groups have {len(layers)} layer{'s' * (len(layers) != 1)}: "
                f"{', '.join(map(str, layers))}"
            )
        weights = None
        if self._importance is not None:
            members: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for group in self._layer_groups():
                members[group["layer"]] += group["params"]
            weights = [float(self._importance(layer, params)) for layer, params in members.items()]
        return [layers[i] for i in draw_layers(first["seed"], period, len(layers), count, weights)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_importance": self._importance}


@torch.no_grad()
def weight_norm(layer: int, params: list[Tensor]) -> float:
    """‖W‖ of all weights of a layer; 1 where they hold no numbers (meta tensors)."""
    if any(param.is_meta for param in params):
        return 1.0
    norms = []
    for param in params:
        norm = torch.linalg.vector_norm(local(param), dtype=kernels.compute_dtype(param.dtype))
        norms.append(dense_sharding(param).norm(norm.double()))
    return float(torch.linalg.vector_norm(torch.stack(norms)))
