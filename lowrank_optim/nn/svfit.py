"""`svfit_`: train changes of the leading singular values of frozen weights."""

from torch import nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.adapted import DiagonalLinear
from lowrank_optim.nn.decompositions import leading_triplets
from lowrank_optim.nn.frozen_base import add_adapters_
from lowrank_optim.nn.low_rank import check_rank_option, resolved_rank
from lowrank_optim.nn.reparametrized import Patterns, matrix_of


class SVFitLinear(DiagonalLinear):
    """A frozen linear layer of which the r leading singular values change: W + U_r diag(d) V_rᵀ, for W = U Σ Vᵀ.

    Parameters: `shift` (r), d, 0 at the start. Frozen ones: `left` = U_r (m×r), `right` = V_rᵀ (r×n), `singular_values` (r), those
    of W. The base is as it was: a small change of a large singular value is not rounded away in 16 bits, since d stands alone.

    Args:
        base: an `nn.Linear` (whose weight may be a `QuantizedWeight`) or a Conv1D; `svfit_` freezes it.
        rank: r, an integer from 1 to min(m, n), or a fraction in (0, 1) of it.

    Raises:
        ValueError: another kind of layer; a rank out of range; a weight that is not finite.

    Memory: the base, and b·(r·(m + n) + 2r) bytes at b bytes a number; r are trained. Backward keeps x V_r (N×r for N tokens).

    Paper: Sun et al., "SVFit", arXiv:2409.05926.
    """

    converter = "lowrank_optim.nn.svfit_"

    def __init__(self, base: nn.Module, *, rank: int | float) -> None:
        super().__init__(base)
        rank = resolved_rank("", rank, self.out_features, self.in_features)
        left, values, right = leading_triplets(matrix_of(base), rank)
        self.keep_(left=left, right=right, singular_values=values)
        self.train_(shift=values.new_zeros(rank))


def svfit_(
    model: nn.Module,
    *,
    rank: int | float,
    freeze_rest: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Freeze the linear layers of a model and train changes of their leading singular values, in place. Returns the model.

        W = U Σ Vᵀ,    y = x Wᵀ + ((x V_r) ∘ d) U_rᵀ + b

    d has r numbers and starts at 0, so that the model starts as it was. Call it before the optimizer is built. `merge_` gives plain
    layers with W + U_r diag(d) V_rᵀ back.

    Args:
        model: its plain `nn.Linear`s (8-bit weights, too, as they are) and Conv1Ds become `SVFitLinear`s. Tied layers share d. On
            the meta device the layers have shapes alone: for planning, or to load a checkpoint of the adapted model.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each weight.
        freeze_rest: freeze all other parameters, too, biases and norms among them; False leaves those as they are.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank out of range, or a weight that is not finite, with the layer's name; a pattern that matches nothing; no
            layer to take; a weight that is sharded, or tied to something that is no such layer; a layer that has an adapter already.

    Memory: the weights, and b·(r·(m + n) + 2r) bytes a layer; gradients and optimizer state have r numbers for m·n. Under
    `fully_shard` all of it is sharded. While it runs, float64 (float32 on accelerators) singular vectors of one layer.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.svfit_(model, rank=16)
        >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
        [('0.shift', (16,)), ('2.shift', (16,))]

    Paper: Sun et al., "SVFit", arXiv:2409.05926.
    """
    rank = as_python(rank)
    check_rank_option(rank)
    return add_adapters_(model, lambda layer: SVFitLinear(layer.module, rank=rank), include, exclude, freeze_rest)
