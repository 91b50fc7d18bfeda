"""`loldu_`: train changes of the diagonal between the triangular factors of frozen weights."""

from torch import nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.adapted import DiagonalLinear
from lowrank_optim.nn.decompositions import leading_ldu
from lowrank_optim.nn.frozen_base import add_adapters_
from lowrank_optim.nn.low_rank import check_rank_option, resolved_rank
from lowrank_optim.nn.reparametrized import Patterns, matrix_of


class LoLDULinear(DiagonalLinear):
    """A frozen linear layer of which the r first pivots change: W + P L_r diag(d) U_r, for W = P L D U.

    P is a permutation (partial pivoting), L unit lower and U unit upper triangular, D diagonal. Parameters: `shift` (r), d, 0 at the
    start. Frozen ones: `left` = P L_r (m×r, entries of at most 1), `right` = U_r (r×n), `diagonal` (r), that of D.

    Args:
        base: an `nn.Linear` (whose weight may be a `QuantizedWeight`) or a Conv1D; `loldu_` freezes it.
        rank: r, an integer from 1 to min(m, n), or a fraction in (0, 1) of it.

    Raises:
        ValueError: another kind of layer; a rank out of range; a weight that is not finite, or that has a pivot of 0 among the r
            first (the row of U would be infinite).

    Memory: the base, and b·(r·(m + n) + 2r) bytes at b bytes a number; r are trained. Backward keeps x U_rᵀ (N×r for N tokens).

    Paper: Shi et al., "LoLDU", arXiv:2410.13618, without its trained factor of the whole diagonal, which a learning rate can be.
    """

    converter = "lowrank_optim.nn.loldu_"

    def __init__(self, base: nn.Module, *, rank: int | float) -> None:
        super().__init__(base)
        rank = resolved_rank("", rank, self.out_features, self.in_features)
        left, diagonal, right = leading_ldu(matrix_of(base), rank)
        self.keep_(left=left, right=right, diagonal=diagonal)
        self.train_(shift=diagonal.new_zeros(rank))


def loldu_(
    model: nn.Module,
    *,
    rank: int | float,
    freeze_rest: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Freeze the linear layers of a model and train changes of the diagonal of their LDU, in place. Returns the model.

        W = P L D U,    y = x Wᵀ + ((x U_rᵀ) ∘ d) (P L_r)ᵀ + b

    d has r numbers and starts at 0, so that the model starts as it was. An LDU takes a small part of the time of singular vectors;
    its rows are no orthonormal ones, and those of late pivots are large. Call it before the optimizer is built. `merge_` gives plain
    layers with W + P L_r diag(d) U_r back.

    Args:
        model: its plain `nn.Linear`s (8-bit weights, too, as they are) and Conv1Ds become `LoLDULinear`s. Tied layers share d. On
            the meta device the layers have shapes alone: for planning, or to load a checkpoint of the adapted model.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each weight.
        freeze_rest: freeze all other parameters, too, biases and norms among them; False leaves those as they are.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank out of range, a weight that is not finite or has a pivot of 0, with the layer's name; a pattern that
            matches nothing; no layer to take; a weight that is sharded, or tied to something that is no such layer; a layer that has
            an adapter already.

    Memory: the weights, and b·(r·(m + n) + 2r) bytes a layer; gradients and optimizer state have r numbers for m·n. Under
    `fully_shard` all of it is sharded. While it runs, two float64 (float32 on accelerators) copies of one weight, and an
    m×m permutation.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.loldu_(model, rank=16, include="2")
        >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
        [('2.shift', (16,))]

    Paper: Shi et al., "LoLDU", arXiv:2410.13618.
    """
    rank = as_python(rank)
    check_rank_option(rank)
    return add_adapters_(model, lambda layer: LoLDULinear(layer.module, rank=rank), include, exclude, freeze_rest)
