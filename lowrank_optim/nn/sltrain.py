"""`sltrain_`: give the linear layers of a model sparse plus low-rank weights."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.decompositions import best_of_rank, widened
from lowrank_optim.nn.reparametrized import Patterns, TakenLayer, replace_layers, take_layers
from lowrank_optim.nn.sparse_low_rank import SparseLowRankLinear, SupportName, check_numbers
from lowrank_optim.nn.supports import ColumnSupport, Support, linear_indices, support_from_indices


def sltrain_(
    model: nn.Module,
    *,
    rank: int = 128,
    density: float = 0.03,
    alpha: float | None = None,
    init: Literal["fresh", "svd"] | None = None,
    support: SupportName = "random",
    rounds: int = 10,
    trainable_scaling: bool = False,
    save_projection: bool = False,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Give the linear layers of a model the weight W = s·B A + S, in place: low rank plus sparse, as SLTrain. Returns the model.

    B is m×r, A is r×n, S has ⌊density·m·n⌋ entries at fixed places. Weights, gradients and optimizer state have r·(m + n) + nnz
    numbers for m·n, in training from the first step on. Call it before the optimizer is built; any optimizer will do. `param_groups`
    knows the parameters: factors with half the weight decay each and values with the whole, so that W decays as a dense matrix.
    `merge_` gives plain layers back.

    Args:
        model: its plain `nn.Linear`s become `SparseLowRankLinear`s. Biases, hooks, device and type are kept; tied layers share their
            parameters; frozen weights stay frozen.
        rank: r, from 0 (S alone) to min(m, n).
        density: fraction of the entries that S has; 0 leaves B A alone.
        alpha: s = alpha/rank; None means s = 1. The paper has 32 for 60M parameters, 16 for 130M and 350M, 8 for 1B and 7B.
        init: must be given, since one of them drops the weights that the model has. "fresh": A and the values uniform in ±1/√n,
            B = 0, for training from scratch. "svd": close to the weights: L ← the best rank-r matrix for W − S, S ← W − L on the
            support, in turn, which makes ‖W − L − S‖ smaller each time; B and A are balanced.
        support: "random" (from the seed: nothing is stored but the seed; rows have nearly equal numbers of entries), "uniform" (every
            subset equally likely; stored in 2 bytes per entry, or 4 beyond 32768 columns), "residual" (with init="svd": the entries
            where W − L is largest, stored), "columns" (whole columns, as LOST: with "svd" those where W − L is largest, else drawn).
        rounds: of init="svd".
        trainable_scaling: s = tanh(θ) is trained, from θ = 1; without alpha.
        save_projection: x Aᵀ is saved for backward, b·N·rank bytes a layer for N tokens, and not computed again.
        seed: of supports and initial numbers, which are the same on every device and in every process.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: `init` is not given; a value out of range, with the layer's name; a pattern that matches nothing; no layer to
            take; a weight that is coded, sharded, tied to something that is no linear layer, or, unless init="fresh" with a "random"
            support, on the meta device.

    Memory: b·(r·(m + n) + nnz) bytes for each layer at b bytes a number. The passes make neither W nor its gradient, see
    `SparseLowRankLinear`. init="svd" needs some dense float64 matrices (float32 on
    accelerators) for one layer at a time.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
        >>> model = lo.nn.sltrain_(model, rank=32, density=0.03, alpha=32, init="fresh", include="0")
        >>> [(name, tuple(param.shape)) for name, param in model[0].named_parameters()]
        [('lora_A', (32, 256)), ('lora_B', (512, 32)), ('sparse_value', (3932,)), ('bias', (512,))]
        >>> optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None, weight_decay=0.1), rule="adam", lr=3e-3)

    Papers: Han et al., "SLTrain", arXiv:2406.02214; columns: "LOST", arXiv:2508.02668 (without its activation between the factors).
    """
    rank, density, alpha, rounds, seed = map(as_python, (rank, density, alpha, rounds, seed))
    if init not in ("fresh", "svd"):
        raise ValueError(
            f"init is {init!r}; 'fresh' draws new weights, for training from scratch (the weights of the model are dropped), 'svd' "
            "starts close to the weights of the model"
        )
    if support not in ("random", "uniform", "residual", "columns"):
        raise ValueError(f"support is {support!r}; valid values are 'random', 'uniform', 'residual' and 'columns'")
    if support == "residual" and init != "svd":
        raise ValueError("support='residual' is taken from the weights of the model and needs init='svd'")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; it must be an integer of at least 1")
    taken = take_layers(model, include, exclude, meta=init == "fresh" and support == "random", hint="use init='fresh'")
    for path, _, module in taken:
        check_numbers(path, module.out_features, module.in_features, rank, density, alpha, trainable_scaling)
        if init == "svd" and not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{path}.weight is not finite; it has no singular value decomposition")
    options: dict[str, Any] = {"rank": rank, "density": density, "alpha": alpha}
    options |= {"trainable_scaling": trainable_scaling, "save_projection": save_projection, "seed": seed}
    options["support"] = support
    replace_layers(model, taken, lambda layer: _make(layer, init, rounds, options))
    return model


def _make(layer: TakenLayer, init: str, rounds: int, options: dict[str, Any]) -> SparseLowRankLinear:
    old = layer.module.weight
    m, n = old.shape
    support = options["support"]
    new = SparseLowRankLinear(
        n,
        m,
        **options | {"support": "random" if support == "residual" else support, "position": layer.position},
        bias=False,
        device=old.device,
        dtype=old.dtype,
    )
    if init == "svd":
        _fit(new, old.detach(), rounds, support)
    for param in new.parameters():
        param.requires_grad_(old.requires_grad)
    return new


@torch.no_grad()
def _fit(layer: SparseLowRankLinear, weight: Tensor, rounds: int, support: str) -> None:
    """Factors and values that are close to a weight: alternating projection, ‖W − L − S‖ falls from round to round."""
    weight = widened(weight)
    entries, values = layer.entries, layer.sparse_value
    places = _chooser(entries, support)
    sparse = torch.zeros_like(weight)
    left, right = weight[:, :0], weight[:0]
    for _ in range(rounds):
        left, right = best_of_rank(weight - sparse, layer.rank)
        if entries is None:
            break
        rest = torch.addmm(weight, left, right, alpha=-1)
        entries = places(rest)
        index = linear_indices(entries, weight.device)
        found = rest.view(-1)[index]
        sparse.zero_().view(-1).scatter_(0, index, found)
    if entries is not None and values is not None:
        layer.set_support(entries)
        values.copy_(found)
    if layer.lora_A is not None and layer.lora_B is not None:
        root = layer.scale.to(weight).sqrt()
        layer.lora_B.copy_(left / root)
        layer.lora_A.copy_(right / root)


def _chooser(entries: Support | None, support: str) -> Callable[[Tensor], Support]:
    """The support for what the low-rank part leaves of a weight."""

    def fixed(rest: Tensor) -> Support:
        assert entries is not None  # asked only then
        return entries

    def largest(rest: Tensor) -> Support:
        index = rest.abs().view(-1).topk(fixed(rest).count).indices.sort().values
        return support_from_indices(rest.shape[0], rest.shape[1], index)

    def columns(rest: Tensor) -> Support:
        count = fixed(rest).count // rest.shape[0]
        index = rest.square().sum(0).topk(count).indices.sort().values
        return ColumnSupport(rest.shape[0], rest.shape[1], index.int())

    return {"residual": largest, "columns": columns}.get(support, fixed)
