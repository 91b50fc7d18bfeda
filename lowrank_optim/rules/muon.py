"""Muon (Jordan et al., 2024): momentum, orthogonalised; and NorMuon (Li et al., 2025), which divides its rows by their size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, MeanRule
from lowrank_optim.rules.orthogonal import COEFFICIENTS, Orthogonalization, gram_dtype, growth
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding

ADJUSTMENTS = ("original", "match_rms_adamw")
INNER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Muon(MeanRule):
    """N = s·U f(S) Vᵀ with m ← μm + (1−μ)R and U S Vᵀ = (1−μ)R + μm (Nesterov), or m.

    f is near 1: `ns_steps` of Newton–Schulz's iteration, as in `torch.optim.Muon`. In a subspace f is 1 (SUMO): m (mᵀm)^(−1/2) by the
    eigenvalues of the r×r Gram matrix; singular values below r·2⁻²³ of the largest are noise, and left out.
    The size s depends on the shape of the matrix, rows × cols, as torch's `adjust_lr_fn` says:

        "original", None       √max(1, rows/cols)
        "match_rms_adamw"      0.2·√max(rows, cols), of R in a subspace: the root mean square of Adam's N

    Weight decay is by η, not by ηs. The rule is for matrices: convolutions (out × the rest), stacks of experts (each for itself) and
    the matrices of fused layers, which `split` parts. Vectors are trained by the optimizer's `dense_rule`, if that is another one,
    else refused when it is built.

    Sharded rows or columns (FSDP2, tensor parallelism) are not gathered. Of a matrix that is split along one side, the Gram matrix of
    the other side is summed over the processes: d² numbers for each matrix and step. Newton–Schulz's polynomial is evaluated on it,
    in about 34·d³ float64 operations on every process. Where the other side is much longer, as in a wide matrix with split rows, each
    process first exchanges its part of the rows for a part of the columns, and back at the end, so that d is the shorter side; that
    sends two times m·n/p elements besides. With `split`, there are d² numbers for each block, and nothing is exchanged.

    Matrices that are split along both sides are refused. Moments in 8 or 4 bits are coded in rows: a matrix whose rows are split is
    not gathered, one whose columns are split is.

    The error of U f(S) Vᵀ, as its largest singular value, whatever the singular values of the matrix:

        inner_dtype    whole matrices    sharded ones    bytes of a number in the sum
        "float32"      3·10⁻⁵            2·10⁻⁷          8
        "bfloat16"     0.2               3·10⁻³          4, at most 5 `ns_steps`

    momentum, nesterov: μ, and whether the gradient counts once more.
    ns_coefficients, ns_steps: a, b, c of X ← aX + b(XXᵀ)X + c(XXᵀ)²X, and how often.
    ns_eps: the norm from which a matrix is normalised.
    adjust_lr_fn: see above.
    inner_dtype: of the products on whole matrices: "float32" (float64 for float64 parameters), "bfloat16" as in torch, or "float64".
    split: blocks of rows that are orthogonalised each for itself: how many equal ones, or their sizes: 3 or (4096, 1024, 1024) for
        queries, keys and values in one matrix.

    Memory: 4 bytes for each element of R (8 in float64).
    """

    name: ClassVar[str] = "muon"
    on_matrices: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    decays_last: ClassVar[bool] = False
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS
    ns_steps: int = 5
    ns_eps: float = 1e-7
    adjust_lr_fn: str | None = "original"
    inner_dtype: str = "float32"
    split: int | tuple[int, ...] | None = None

    # ----------------------------------------------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not isinstance(options["nesterov"], bool):
            raise ValueError(f"nesterov is {options['nesterov']!r}; it must be True or False")
        coefficients, steps = options["ns_coefficients"], options["ns_steps"]
        if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
            raise ValueError(f"ns_coefficients is {coefficients!r}; it must be three numbers, a, b and c")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
            raise ValueError(f"ns_steps is {steps!r}; it must be an int from 1 to 99")
        if not float(options["ns_eps"]) > 0.0:
            raise ValueError(f"ns_eps is {options['ns_eps']!r}; it must be above 0")
        if options["adjust_lr_fn"] not in (*ADJUSTMENTS, None):
            raise ValueError(
                f"adjust_lr_fn is {options['adjust_lr_fn']!r}; valid values are {', '.join(map(repr, ADJUSTMENTS))} and None"
            )
        if options["inner_dtype"] not in INNER_DTYPES:
            raise ValueError(
                f"inner_dtype is {options['inner_dtype']!r}; valid values are {', '.join(map(repr, INNER_DTYPES))}"
            )
        split = options["split"]
        sizes = split if isinstance(split, (tuple, list)) else () if split is None else (split,)
        if (split is not None and not sizes) or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(
                f"split is {split!r}; it must be None, a number of equal blocks of rows, or the sizes of the blocks"
            )

    def check_matrix(
        self, shape: tuple[int, ...], side: str | None, sharding: ParamSharding, options: Mapping[str, Any]
    ) -> None:
        split, rows = options["split"], shape[-2]
        if split is not None and side not in (None, "right"):
            raise ValueError(
                f'is projected on its {side} side, so that R has no rows of its own for split={split!r}: use proj_type="right", '
                "or no split"
            )
        if isinstance(split, int) and rows % split:
            raise ValueError(
                f"has {rows} rows, which split={split} does not divide; give the sizes of the blocks, such as "
                f"split=({rows - rows // split}, {rows // split}), or the other parameters a group of their own"
            )
        if isinstance(split, (tuple, list)) and sum(split) != rows:
            raise ValueError(
                f"has {rows} rows, and the blocks of split={split!r} have {sum(split)}; give sizes that add up, or the other "
                "parameters a group of their own"
            )
        if not sharding.reduced.splits(-2, -1):
            return
        if sharding.reduced.splits(-2) and sharding.reduced.splits(-1):
            raise ValueError(
                "is split along both its rows and its columns, so that no Gram matrix is a sum over processes: use fully_shard or "
                "tensor parallelism along one dimension, or another rule for it"
            )
        dtype, steps = gram_dtype(INNER_DTYPES[options["inner_dtype"]], torch.device("cpu")), options["ns_steps"]
        if side is None and growth(options["ns_coefficients"], steps, dtype) > 0.1:
            raise ValueError(
                f"is sharded, and {steps} steps of Newton–Schulz on its Gram matrix in {dtype} let rounding errors grow too far: "
                "use fewer ns_steps" + (', or inner_dtype="float32"' if dtype == torch.float32 else "")
            )

    # --------------------------------------------------------------------------------------------------------- direction

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        if context.sharding.reduced.numel(grad) == 0:  # a tensor whose turn it is not (FRUGAL's blocks)
            return Direction(grad)
        momentum, moment = float(options["momentum"]), state["exp_avg"]
        moment.lerp_(grad, _share(1.0 - momentum, grad, context.ok))
        seen = grad.lerp(moment, momentum) if options["nesterov"] else moment
        blocks = list(_blocks(seen, options["split"], context))
        matrix = self._sized(
            [self._orthogonal(block, options, context) for block, _ in blocks], state, options, context
        )
        factors = [_size(options["adjust_lr_fn"], rows, seen, context) for _, rows in blocks]
        for block, factor in zip(matrix, factors, strict=True):
            block.mul_(factor)
        whole = matrix[0] if len(matrix) == 1 else torch.cat(matrix, -2)
        return Direction(whole if context.ok is None else torch.where(context.ok, whole, 0.0))

    def _orthogonal(self, block: Tensor, options: Mapping[str, Any], context: Context) -> Tensor:
        """U f(S) Vᵀ of a block of rows, a tensor of its own."""
        inner = INNER_DTYPES[options["inner_dtype"]]
        orthogonalize = Orthogonalization(
            exact=_in_subspace(block, context),
            coefficients=tuple(options["ns_coefficients"]),
            steps=options["ns_steps"],
            eps=float(options["ns_eps"]),
            inner=inner if inner == torch.bfloat16 else torch.promote_types(inner, block.dtype),
        )
        return orthogonalize(block, context.sharding.reduced, exchange=options["split"] is None)

    def _sized(
        self, blocks: list[Tensor], state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> list[Tensor]:
        """What becomes of the orthogonal blocks; nothing, here."""
        return blocks


@dataclass(frozen=True)
class NorMuon(Muon):
    """Muon's O = U f(S) Vᵀ, every row divided by its size, and the whole brought back to its norm.

        v_i ← β₂ v_i + (1−β₂) mean_j O_ij²,   Ô_i = O_i / (√v_i + 10⁻⁸),   N = s·Ô ‖O‖/‖Ô‖

    Row i of R is an output neuron of a dense matrix; in a subspace, it is one of the longer side, and v does not depend on the basis.
    Every matrix of a stack, and every block of `split`, has a norm of its own. Sharded, it sends two numbers more for each block, and
    row sums if columns are split.

    beta2: β₂.

    Memory: Muon's, and 4 bytes for each row.

    Paper: Li et al., "NorMuon: Making Muon More Efficient and Scalable", 2025, arXiv:2510.05491.
    """

    name: ClassVar[str] = "normuon"
    state_lies: ClassVar[Mapping[str, str]] = {"exp_avg_sq_row": "rows"}
    beta2: float = 0.95

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not 0.0 <= options["beta2"] < 1.0:
            raise ValueError(f"beta2 is {options['beta2']!r}; it must be in [0, 1)")

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        rows = torch.zeros(shape[:-1], dtype=dtype, device=device)
        return {**super().init(shape, options, dtype, device), "exp_avg_sq_row": rows}

    def _sized(
        self, blocks: list[Tensor], state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> list[Tensor]:
        sharding, squares = context.sharding.reduced, state["exp_avg_sq_row"]
        means = torch.cat([sharding.mean(block.square(), -1) for block in blocks], -1)
        squares.lerp_(means, _share(1.0 - float(options["beta2"]), means, context.ok))
        sizes = (squares.sqrt() + 1e-8).unsqueeze(-1).split([block.shape[-2] for block in blocks], -2)
        scaled = [block / size for block, size in zip(blocks, sizes, strict=True)]
        norms = [torch.linalg.vector_norm(each, dim=(-2, -1), keepdim=True) for each in (*blocks, *scaled)]
        before, after = sharding.norm(torch.stack(norms), -2, -1).chunk(2)
        return [each.mul_(old / new.clamp_min(1e-30)) for each, old, new in zip(scaled, before, after, strict=True)]


def _share(weight: float, grad: Tensor, ok: Tensor | None) -> Tensor | float:
    """The weight of a new number in a mean; 0 where the gradient is to be ignored."""
    return weight if ok is None else kernels.scalar(weight, grad.dtype, grad.device) * ok


def _in_subspace(grad: Tensor, context: Context) -> bool:
    """Whether R is smaller than the matrix."""
    if context.dense:
        return False
    sharding = context.sharding
    return sharding.reduced.whole_shape(grad)[-1] != sharding.matrix.whole_shape(context.weight)[-1]


def _blocks(matrix: Tensor, split: int | Sequence[int] | None, context: Context) -> Iterator[tuple[Tensor, int]]:
    """The local rows of each block, and how many rows it has on all processes."""
    sharding = context.sharding.reduced
    rows, start = sharding.whole_shape(matrix)[-2], sharding.offset(-2) if context.sharding is not LOCAL else 0
    if split is None:
        yield matrix, rows
        return
    sizes = [rows // split] * split if isinstance(split, int) else list(split)
    end = 0
    for size in sizes:
        first, end = end, end + size
        own = slice(*(min(max(edge - start, 0), matrix.shape[-2]) for edge in (first, end)))
        yield matrix[..., own, :], size


def _size(adjustment: str | None, rows: int, reduced: Tensor, context: Context) -> float:
    """s of a block of this many rows of R."""
    cols = context.sharding.reduced.whole_shape(reduced)[-1]
    if adjustment == "match_rms_adamw":
        return float(0.2 * max(rows, cols) ** 0.5)
    shape = context.sharding.matrix.whole_shape(context.weight)
    height = rows if context.dense or rows < context.sharding.reduced.whole_shape(reduced)[-2] else shape[-2]
    return float(max(1.0, height / shape[-1]) ** 0.5)
