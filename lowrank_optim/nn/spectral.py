"""`spectral_`: give the linear layers of a model their singular value decompositions for weights."""

from typing import Any

import torch
from torch import nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.plain_layers import kind_of
from lowrank_optim.nn.reparametrized import Patterns, TakenLayer, matrix_of, replace_layers, take_layers
from lowrank_optim.nn.spectral_linear import SpectralLinear, check_active, check_mixture


def spectral_(
    model: nn.Module,
    *,
    rank: int = 64,
    enhanced: bool = True,
    tangent: bool = False,
    save_projection: bool = False,
    mixture: float = 0.5,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Give the linear layers of a model the weight W = U Σ Vᵀ, in place: Sparse Spectral Training. Returns the model.

    All d = min(m, n) triplets are kept, so the model computes what it did. All values Σ are trained; of the vectors, those of `rank`
    triplets at a time. A `SpectralSchedule` beside the optimizer draws them, keeps vectors at length 1, and decomposes anew:

        model = lo.nn.spectral_(model, rank=64)
        optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None, weight_decay=0.1), rule="adam", lr=1e-3)
        schedule = lo.SpectralSchedule(model, optimizer)
        …
        optimizer.step(); schedule.step()

    The first triplets are drawn with p_i = mixture/d + (1 − mixture) Σ_i/ΣΣ, as later ones are. Call it before the optimizer is
    built. `param_groups` knows the parameters: values decay, vectors do not. `merge_` gives plain layers back. A checkpoint of the
    plain model loads: weights are decomposed.

    Args:
        model: its plain `nn.Linear`s and Conv1Ds of transformers become `SpectralLinear`s. Biases, hooks, device and type are kept;
            tied layers share their parameters; frozen weights stay frozen. On the meta device it gets layers without numbers.
        rank: triplets whose vectors are trained at a time; d or more trains all. The paper has 64 up to 1.3B parameters.
        enhanced: leave the factor Σ_i out of the gradients of vectors, as the paper; False gives the true gradients.
        tangent: take the part along the vector out of its gradient, so that moments have none of it.
        save_projection: P = x V is saved for backward, b·N·d bytes a layer for N tokens, and not computed again.
        mixture: share of the uniform part in the draws, in [0, 1]; the paper has ½.
        seed: of the draws, which are the same on every device and in every process.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank below 1; a mixture that is no share; a pattern that matches nothing; no layer to take; a weight that is
            not finite, coded, sharded or tied to a layer of another kind.

    Memory: weights take more than dense ones, b·(d·(m + n) + d) bytes a layer at b bytes a number, twice as much for square layers.
    Gradients are b·(r·(m + n) + d), two moments of c bytes 2c·(r·(m + n) + d), and forward and backward cost up to twice the
    operations. So a square layer saves at most half of what dense AdamW takes with weights, gradients and moments in one type,
    whatever the rank: 4096², r = 256, all in bfloat16: 79.7 MB in place of 134 MB. While it runs, some float64 matrices (float32 on
    accelerators) of one layer.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> model = lo.nn.spectral_(model, rank=8, include="0")
        >>> [(name, tuple(param.shape)) for name, param in model[0].named_parameters()]
        [('sigma', (64,)), ('u_active', (256, 8)), ('v_active', (64, 8)), ('bias', (256,))]

    Paper: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arXiv:2405.15481.
    """
    rank, mixture, seed = map(as_python, (rank, mixture, seed))
    check_active(rank)
    check_mixture(mixture)
    taken = take_layers(model, include, exclude, ("linear", "conv1d"), meta=True)
    for path, _, module in taken:
        if not module.weight.is_meta and not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{path}.weight is not finite; it has no singular value decomposition")
    options: dict[str, Any] = {
        "rank": rank,
        "enhanced": enhanced,
        "tangent": tangent,
        "save_projection": save_projection,
    }
    options |= {"mixture": mixture, "seed": seed}
    replace_layers(model, taken, lambda layer: _make(layer, options))
    return model


def _make(layer: TakenLayer, options: dict[str, Any]) -> SpectralLinear:
    old = layer.module
    m, n = matrix_of(old).shape
    with torch.device("meta"):
        new = SpectralLinear(n, m, **options, position=layer.position, bias=False, dtype=old.weight.dtype)
    new.plain_class = type(old) if kind_of(old) == "conv1d" else nn.Linear
    new.to_empty(device=old.weight.device)
    if not old.weight.is_meta:
        new.set_weight(matrix_of(old))
    for param in new.parameters():
        param.requires_grad_(old.weight.requires_grad)
    return new
