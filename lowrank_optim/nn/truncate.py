"""Weights replaced by the best matrices of lower rank; they stay dense (Trained Rank Pruning).

`truncate_` does it once. `lowrank_optim.truncate_ranks` does it while a model is trained, and uses what stands here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank_optim import kernels
from lowrank_optim.groups.build import select_matrices
from lowrank_optim.groups.matrices import matrix_shape, matrix_view, resolve_rank
from lowrank_optim.groups.parameters import find_parameters
from lowrank_optim.kernels import WeightError, as_python
from lowrank_optim.kernels.compute import CHUNK_ELEMENTS, row_chunks
from lowrank_optim.nn.decompositions import leading
from lowrank_optim.nn.reparametrized import Patterns
from lowrank_optim.sharding.dtensor import dense_sharding, local, matrix_sharding
from lowrank_optim.sharding.gathered import put_shards_back

CONVOLUTIONS = ("channel", "spatial", "filter")
"""The matrices that convolutions are taken for: NC, VH and ND of the paper."""

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Their weights have the dimension of the inputs first."""


@dataclass(frozen=True)
class RankCut:
    """How many singular values σ₁ ≥ σ₂ ≥ … a matrix keeps; one of these is given.

    energy: the smallest k with Σ_{i≤k} σ_i² ≥ energy·Σσ_i².
    rank: the k largest; a float is a fraction of the short side.
    threshold: those with σ ≥ threshold, at least one.

    Of a zero matrix, none.

    Raises:
        ValueError: none or several are given, or one is out of range.
    """

    energy: float | None = None
    rank: int | float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("energy", "rank", "threshold") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            told = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
            raise ValueError(f"give one of energy, rank and threshold, which say how much is kept; got {told}")
        (name, value), *_ = given.items()
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "energy" and not (number and 0 < value <= 1):
            raise ValueError(f"energy is {value!r}; it must be a share in (0, 1]")
        if name == "rank" and not (number and (0 < value <= 1 if isinstance(value, float) else value >= 1)):
            raise ValueError(
                f"rank is {value!r}; it must be an int of at least 1, or a fraction of the short side in (0, 1]"
            )
        if name == "threshold" and not (number and 0 < value < float("inf")):
            raise ValueError(f"threshold is {value!r}; it must be a number above 0")

    def kept(self, values: Tensor) -> list[int]:
        """k of each matrix, from its singular values (N, d), largest first. The host waits once; a plan goes on with the most."""
        d = values.shape[-1]
        most = d if self.rank is None else min(resolve_rank(self.rank, d), d)
        with torch._C.DisableTorchFunction():  # in a plan, tensors say that they are on a device
            if values.is_meta:
                return [most] * len(values)
        counts = (values > 0).sum(-1).clamp_max(most)
        if self.energy is not None:
            sums = values.double().square().cumsum(-1)
            counts = torch.minimum(counts, (sums < self.energy * sums[:, -1:] * (1 - 1e-12)).sum(-1) + 1)
        if self.threshold is not None:
            counts = torch.minimum(counts, (values >= self.threshold).sum(-1).clamp_min(1))
        found: list[int] = counts.tolist()
        return found


def _truncated(stack: Tensor, cut: RankCut, shrinkage: float) -> tuple[Tensor, list[int]]:
    """`truncated_stack` of (N, m, n) in one piece."""
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    rounding = values[:, :1] * (torch.finfo(stack.dtype).eps * max(stack.shape[-2:]))
    values = (values - shrinkage).clamp_min(0.0)
    ranks = cut.kept(values)
    most = max(ranks)
    cut_away = (
        (values > rounding).logical_and_(leading(ranks, values).logical_not_()).any(-1) if not shrinkage else None
    )
    del rounding
    if cut_away is not None and not bool(cut_away.any()):
        return stack, ranks
    if len(stack) == 1:
        del cut_away
        return (left[..., :most] * values[:, None, :most]) @ right[:, :most], ranks
    values = values * leading(ranks, values)
    new = (left[..., :most] * values[:, None, :most]) @ right[:, :most]
    return (new if cut_away is None else torch.where(cut_away[:, None, None], new, stack)), ranks


@dataclass(frozen=True)
class KernelView:
    """Kernels as a matrix, or as a stack of them.

    groups: of the convolution. Kernels of another group see other channels, so that each group has matrices of its own.
    stack, rows, columns: the dimensions that each of these is made of. Dimension 0 are the groups, 1 and 2 the channels as the kernel
        has them (of one group), and the others its extent.
    """

    groups: int
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def of(self, kernel: Tensor) -> Tensor:
        """The matrix, or the stack of matrices."""
        parts: Tensor = kernel.unflatten(0, (self.groups, -1)).permute(self.stack + self.rows + self.columns)
        depth, height = len(self.stack), len(self.rows)
        parts = parts.flatten(depth + height).flatten(depth, depth + height - 1).flatten(0, depth - 1)
        return parts[0] if len(parts) == 1 else parts

    def back(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The kernels, of this shape, that a matrix or a stack stands for."""
        sizes, order = (self.groups, shape[0] // self.groups, *shape[1:]), self.stack + self.rows + self.columns
        parts = matrix.reshape([sizes[axis] for axis in order])
        return parts.permute([order.index(axis) for axis in range(len(order))]).flatten(0, 1)


@dataclass(frozen=True)
class DenseMatrix:
    """A weight of a model that is a matrix, or a stack of them.

    name: of the parameter.
    param: the parameter, sharded or not.
    layout: as in param groups: of a convolution, first dimension × the rest.
    view: of a convolution for which that is not the matrix, or None.
    """

    name: str
    param: Tensor
    layout: str
    view: KernelView | None = None

    def whole(self, error: WeightError | None = None) -> Tensor:
        """The matrix view of all of the weight, in the compute type, gathered from all processes; a new tensor or a view."""
        weight = kernels.joined(local(self.param).detach(), error)
        if self.view:
            kernel = dense_sharding(self.param).gather(weight, *range(-weight.dim(), 0))
            return self.view.of(kernel).to(kernels.compute_dtype(self.param.dtype))
        view, shape = matrix_view(weight, self.layout), matrix_shape(tuple(self.param.shape), self.layout)
        assert shape is not None
        sharding = matrix_sharding(self.param, self.layout, shape)
        return sharding.gather(view, *range(-len(shape), 0)).to(kernels.compute_dtype(self.param.dtype))

    def part(self, matrix: Tensor) -> Tensor:
        """What this process holds of a whole matrix, in the parameter's own shape."""
        if self.view:
            return dense_sharding(self.param).part(self.view.back(matrix, tuple(self.param.shape))).contiguous()
        shape = matrix_shape(tuple(self.param.shape), self.layout)
        assert shape is not None
        own = matrix_sharding(self.param, self.layout, shape).part(matrix)
        own = own.mT if self.layout == "transposed" else own
        return own.reshape(local(self.param).shape).contiguous()

    def write_(self, matrix: Tensor, rounding_key: int | None = None, error: WeightError | None = None) -> None:
        """Put a whole matrix into the weight, rounded to nearest, stochastically with a key, or with what that drops in `error`."""
        start = dense_sharding(self.param).start
        kernels.store_(local(self.param).detach(), self.part(matrix), rounding_key, start, error)


def parts_of(stack: Tensor) -> Iterator[slice]:
    """Slices of a stack (N, m, n) that are decomposed in one call: one matrix, or several small ones."""
    return row_chunks(len(stack), stack.shape[-2] * stack.shape[-1], CHUNK_ELEMENTS)


def truncated_stack(matrix: Tensor, cut: RankCut, shrinkage: float = 0.0) -> tuple[Tensor, list[int]]:
    """U_k max(Σ_k − shrinkage, 0) V_kᵀ and k, for M = U Σ Vᵀ, of a matrix or of each in a stack; k is that of shrunk values.

    With `shrinkage` ηλ, that is the proximal operator of ηλ‖·‖_*, and then the cut. A matrix of which nothing is cut stays as it is,
    where its other singular values are those of rounding; if that holds for all of them, `matrix` itself is returned.
    """
    stack = matrix if matrix.dim() > 2 else matrix.unsqueeze(0)
    # Depthwise kernels: what is not zero has rank 1, whatever the cut.
    if min(stack.shape[-2:]) == 1 and shrinkage == 0.0:
        return matrix, cut.kept(torch.linalg.vector_norm(stack, torch.inf, dim=(-2, -1)).unsqueeze(-1))
    made: Tensor | None = None
    ranks: list[int] = []
    for part in parts_of(stack):
        old = stack[part]
        new, found = _truncated(old, cut, shrinkage)
        ranks += found
        if new is not old and len(old) == len(stack):
            made = new
        elif new is not old:
            made = stack.clone() if made is None else made
            made[part] = new
    if made is None:
        return matrix, ranks
    return (made if matrix.dim() > 2 else made[0]), ranks


def take_matrices(
    model: nn.Module, include: Patterns, exclude: Patterns, convolutions: str = "channel"
) -> list[DenseMatrix]:
    """The weights that `param_groups` makes low-rank with these patterns; `convolutions` as of `truncate_`.

    Raises:
        TypeError: no nn.Module.
        ValueError: another view; a pattern matches nothing; a weight without numbers, not floating point, or stored in 8 bits; a
            convolution that does not have the view, or is tied to one that has another; there is none.
    """
    if convolutions not in CONVOLUTIONS:
        raise ValueError(f"convolutions is {convolutions!r}; valid values are {', '.join(map(repr, CONVOLUTIONS))}")
    gathered = put_shards_back(model)
    chosen = set(map(id, select_matrices(model, include, exclude)))
    found = [
        DenseMatrix(entry.names[0], entry.param, entry.layout)
        for entry in find_parameters(model)
        if id(entry.param) in chosen and matrix_shape(tuple(entry.param.shape), entry.layout) is not None
    ]
    if not found:
        raise ValueError("the model has no matrix to truncate; embeddings and output heads have to be named by include")
    owners: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        # Its own parameter: `.weight` may be computed, as of a spectral norm.
        if isinstance(module, PLAIN + TRANSPOSED):
            owners.setdefault(id(module._parameters.get("weight")), {})[path] = module
    found = [_viewed(matrix, owners.get(id(matrix.param), {}), convolutions) for matrix in found]
    for matrix in found:
        gathered.check(matrix.name, matrix.param)
        if hasattr(matrix.param, "codes"):
            raise ValueError(
                f"{matrix.name} is stored in 8 bits, where a truncated matrix would have its full rank again; exclude it, or call "
                "lowrank_optim.nn.dequantize_weights_(model) first"
            )
        if not matrix.param.is_floating_point():
            raise ValueError(f"{matrix.name} is {matrix.param.dtype}; floating-point weights are needed: exclude it")
        if matrix.param.is_meta:
            raise ValueError(f"{matrix.name} is on the meta device, and has no singular values")
    return found


def _viewed(matrix: DenseMatrix, owners: Mapping[str, nn.Module], convolutions: str) -> DenseMatrix:
    """A convolution as the matrices that `convolutions` names; other weights as they are."""
    views = [_view_of(matrix, module, convolutions) for module in owners.values()] or [
        _view_of(matrix, None, convolutions)
    ]
    if any(view != views[0] for view in views):
        raise ValueError(
            f"{matrix.name} is the weight of {', '.join(owners)}, which are different convolutions (groups, or transposed), so that "
            "its matrices are not the same for all of them: exclude it"
        )
    return views[0]


def _view_of(matrix: DenseMatrix, module: nn.Module | None, convolutions: str) -> DenseMatrix:
    """`_viewed` for one of the modules that hold it."""
    if matrix.layout != "conv":
        return matrix
    dims = matrix.param.dim()
    if convolutions == "spatial" and dims != 4:
        raise ValueError(
            f"{matrix.name} is {tuple(matrix.param.shape)}; convolutions='spatial' needs kernels of height and width: exclude it, "
            "or take convolutions='channel' or 'filter'"
        )
    groups = int(getattr(module, "groups", 1))
    outputs, inputs = (2, 1) if isinstance(module, TRANSPOSED) else (1, 2)
    extent = tuple(range(3, dims + 1))
    if convolutions == "spatial":
        return replace(matrix, view=KernelView(groups, (0,), (inputs, 3), (outputs, 4)))
    if convolutions == "filter":
        return replace(matrix, view=KernelView(groups, (0, outputs), (inputs,), extent))
    return matrix if groups == 1 else replace(matrix, view=KernelView(groups, (0,), (1,), (2, *extent)))


@kernels.no_autograd_no_autocast
def truncate_(
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | float | None = None,
    threshold: float | None = None,
    convolutions: str = "channel",
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Replace weights by the best matrices of lower rank, in place; they stay dense, and the model as fast as it was.

        W = U Σ Vᵀ   →   U_k Σ_k V_kᵀ,   ‖W − U_k Σ_k V_kᵀ‖² = Σ_{i>k} σ_i²

    A weight that has this rank already is not touched. To cut the model itself, call `lowrank_optim.nn.factorize_`; to do this while
    training, `lowrank_optim.truncate_ranks`.

    Args:
        model: its linear layers, Conv1Ds of transformers, convolutions and stacks of experts; no output heads and no embeddings.
        energy: in (0, 1]; k is the smallest for which Σ_{i≤k} σ_i² ≥ energy·Σσ_i². What is left has less energy, so that a second
            cut may cut again.
        rank: in place of it, k itself; a float in (0, 1] is a fraction of each short side.
        threshold: in place of it, the smallest singular value that is kept; at least one is.
        convolutions: which matrix the kernels a×c×h×w of a convolution from c to a channels are, and what of rank k does the same:

                view        matrix                    for 64×32×3×3     of rank k
                "channel"   a × (c·h·w)               one 64×288        k kernels c×h×w, then a 1×1 convolution
                "spatial"   (c·h) × (a·w)             one 96×192        k kernels h×1, then a kernels 1×w
                "filter"    c × (h·w), one a kernel   64 of 32×9        for each kernel, k kernels h×w on k mixtures of the channels

            With g groups, each group is a convolution of its own, from c/g to a/g channels: g matrices (of "filter", still a).
        include: patterns of the weights to take, as in `param_groups`.
        exclude: patterns of weights to leave alone.

    Returns:
        The model.

    Raises:
        TypeError: no nn.Module.
        ValueError: none or several of energy, rank and threshold, or one out of range; a pattern that matches nothing; a weight
            that is not finite, complex, stored in 8 bits, or on the meta device; "spatial" for kernels without height and width;
            kernels that are tied to other convolutions, for which they are other matrices. Nothing was changed.

    Memory: for one m×n matrix at a time, numbers of 4 bytes (8 for float64): m·d + d·n + d for its singular value decomposition, d
    the short side, k·m + m·n for what is left of it, and m·n for itself, unless the weight is stored so. Of a stack
    (experts, "filter", groups), small matrices are taken together, up to 2²⁰ numbers of them, and what is left of all of them is held
    until the last is done. A sharded weight (`fully_shard`) is gathered for it: call this on all processes.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = lo.nn.truncate_(torch.nn.Sequential(torch.nn.Linear(64, 32)), rank=4)
        >>> int(torch.linalg.matrix_rank(model[0].weight))
        4

    Paper: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020, arXiv:2004.14566.
    """
    cut = RankCut(*map(as_python, (energy, rank, threshold)))
    matrices = take_matrices(model, include, exclude, convolutions)
    for matrix in matrices:
        unfit = torch.isfinite(local(matrix.param)).logical_not().sum().float()
        if bool(dense_sharding(matrix.param).sum(unfit)):
            raise ValueError(f"{matrix.name} is not finite; it has no singular values")
    for matrix in matrices:
        old = matrix.whole()
        new, _ = truncated_stack(old, cut)
        if new is not old:
            matrix.write_(new)
    return model
