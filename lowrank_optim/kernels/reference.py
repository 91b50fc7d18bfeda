"""The definitions of the operations (`schemas`), in torch ops, for any device: other backends are tested against these functions.

Those of the operations on codes are in `coded_reference`.

Three stages make a step (`W` m×n, gradient `G` m×n, low-rank matrices "tall": one row for every row or column of W):

    project    R = G B  (right)  or  Gᵀ B  (left)
    direct     moments and direction N from R, elementwise on small matrices
    apply      W ← keep·W − α·(left @ right + φ ⊙ E)

Arithmetic is float32 (float64 for float64 parameters) whatever the storage type. Low-precision operands are converted by chunks of
rows, so no operation allocates a float32 copy of a whole large matrix.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import adam_numbers, unpack_key
from lowrank_optim.kernels.compute import compute_dtype, masked_scalar, row_chunks, row_norms
from lowrank_optim.kernels.counter_rng import fill_gaussian_, unsigned_key
from lowrank_optim.kernels.dispatch import call, definition
from lowrank_optim.kernels.rounding import WeightError, in_float32, joined, split_, store_, weight_error


@cache
def has_bfloat16_units() -> bool:
    """Whether the CPU has matrix units for bfloat16 (AMX), and torch uses them.

    With AVX512-BF16 alone, products of bfloat16 matrices take 1.7 times as long as those of float32 ones.
    """
    test = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.backends.mkldnn.is_available() and test is not None and bool(test())


def _in_bfloat16(grad: Tensor, basis: Tensor) -> bool:
    """Whether a projection is one product of bfloat16 matrices: where precision allows it and it is faster."""
    short = grad.dtype == torch.bfloat16 and basis.dtype == torch.float32 and grad.device.type == "cpu"
    return short and torch.get_float32_matmul_precision() == "medium" and has_bfloat16_units()


@definition("project")
def project(grad: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R = G B on the right (m×r), R = Gᵀ B on the left (n×r), with float32 accumulation.

    Under `torch.set_float32_matmul_precision("medium")`, a bfloat16 gradient on a CPU with matrix units for bfloat16 is
    multiplied as it is: the basis is rounded to bfloat16, and R once, 2⁻⁹ each.

    Args:
        grad: (…, m, n), any floating type.
        basis: (…, n, r) on the right, (…, m, r) on the left; float32 or float64.
    """
    if grad.dtype == basis.dtype:
        return torch.matmul(grad if right else grad.mT, basis)
    if _in_bfloat16(grad, basis):
        return torch.matmul(grad if right else grad.mT, basis.to(grad.dtype)).to(basis.dtype)
    if grad.dim() > 2:
        return torch.stack([project(g, b, right) for g, b in zip(grad, basis, strict=True)])
    rows, cols = grad.shape
    if right:
        out = basis.new_empty(rows, basis.shape[-1])
        for chunk in row_chunks(rows, cols):
            torch.matmul(grad[chunk].to(basis.dtype), basis, out=out[chunk])
        return out
    out = basis.new_zeros(cols, basis.shape[-1])
    for chunk in row_chunks(rows, cols):
        out.addmm_(grad[chunk].to(basis.dtype).mT, basis[chunk])
    return out


@definition("adam_direct_")
def adam_direct_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    """Adam's moments and direction: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², N = (m/bc₁) / (√(v/bc₂) + ε), bcᵢ = 1 − βᵢᵗ.

    Args:
        grad: the (projected) gradient, in the compute type.
        exp_avg, exp_avg_sq: m and v, modified in place.
        scalars: β₁, β₂, ε, and t ≥ 1, the number of steps that the moments have seen with this one.
        ok: 0-d bool on the device. Where it is false, the moments stay as they are and N is 0 (`grad` must be finite: fill it with
            zeros). None means true.
    """
    weight1, beta2, weight2, root_factor, root_offset = adam_numbers(*scalars.tolist())
    if ok is None:
        exp_avg.lerp_(grad, weight1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=weight2)
    else:
        exp_avg.lerp_(grad, ok.to(grad.dtype) * weight1)
        exp_avg_sq.mul_(masked_scalar(ok, beta2, 1.0, grad.dtype)).addcmul_(grad, grad, value=weight2)
    # m / (bc₁/√bc₂ · √v + bc₁·ε): both corrections in the denominator, so that N takes one pass.
    direction = exp_avg_sq.sqrt().mul_(root_factor).add_(root_offset)
    torch.div(exp_avg, direction, out=direction)
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


@definition("adam_direct_with_norms_")
def adam_direct_with_norms_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `adam_direct_`, and ‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    direction: Tensor = call("adam_direct_", grad, exp_avg, exp_avg_sq, scalars, ok)
    return direction, *row_norms(direction, grad)


@definition("adam_dense_")
def adam_dense_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """As `adam_direct_` and `apply_dense_`: W ← keep·W − α·N, all contiguous and modified in place but the gradient."""
    *_, alpha, keep = scalars.tolist()
    key, (start, *_) = unpack_key(rounding)
    flat = [tensor.view(-1) for tensor in (weight, grad, exp_avg, exp_avg_sq)]
    rest = flat_error(weight_error(error, error_low))
    for chunk in row_chunks(weight.numel(), 1):
        w, g, m, v = (tensor[chunk] for tensor in flat)
        g = g.to(m.dtype) if ok is None else torch.where(ok, g.to(m.dtype), 0.0)
        direction = adam_direct_(g, m, v, scalars[:4], ok)
        own = rest and rest.at(chunk)
        write_(w, direction, alpha=alpha, keep=keep, ok=ok, rounding_key=key, start=start + chunk.start, error=own)


@definition("lion_direct_")
def lion_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    """Lion's direction and momentum: N = sign(β₁m + (1−β₁)g), m ← β₂m + (1−β₂)g; `ok` as in `adam_direct_`."""
    beta1, beta2 = scalars.tolist()
    direction = torch.lerp(exp_avg, grad, 1.0 - beta1).sign_()
    if ok is None:
        exp_avg.lerp_(grad, 1.0 - beta2)
        return direction
    exp_avg.lerp_(grad, ok.to(grad.dtype) * (1.0 - beta2))
    return direction.masked_fill_(~ok, 0.0)


@definition("sgd_direct_")
def sgd_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool) -> Tensor:
    """m ← μm + g; N = m, or g + μm (Nesterov); `ok` as in `adam_direct_`."""
    (momentum,) = scalars.tolist()
    exp_avg.mul_(momentum if ok is None else masked_scalar(ok, momentum, 1.0, grad.dtype)).add_(grad)
    direction = grad.add(exp_avg, alpha=momentum) if nesterov else exp_avg.clone()
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


@definition("rmsprop_direct_")
def rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    """v ← αv + (1−α)g²; N = g / (√v + ε); `ok` as in `adam_direct_`."""
    alpha, eps = scalars.tolist()
    exp_avg_sq.mul_(alpha if ok is None else masked_scalar(ok, alpha, 1.0, grad.dtype))
    exp_avg_sq.addcmul_(grad, grad, value=1.0 - alpha)
    direction = exp_avg_sq.sqrt().add_(eps)
    torch.div(grad, direction, out=direction)
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


@definition("apply_")
def apply_(
    weight: Tensor,  # modified in place
    left: Tensor,
    right: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    grad: Tensor | None,
    phi: Tensor | None,
    subtract_left: Tensor | None,
    subtract_right: Tensor | None,
    sign: bool,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """W ← keep·W − α·(left @ right + φ ⊙ E), one pass over W and one over the gradient that E is made of.

    Args:
        weight: (…, m, n) matrix view of the parameter, any floating type.
        left: (…, m, r) in the compute type.
        right: (…, r, n) in the compute type.
        scalars: α, the step size, and keep = 1 − ηλ, the factor of decoupled weight decay.
        keep: the factor as a 0-d tensor, in place of that number; it costs another pass over W.
        ok: 0-d bool on the device; where it is false, W stays as it is (`left @ right` and φ must then be 0, and G finite).
        rounding: key and row-major index of the first element in the whole parameter, so that the noise does not depend on shards;
            None rounds to nearest.
        grad, phi, subtract_left, subtract_right, sign: φ ⊙ E, see `ResidualTerm`; None leaves it out.
        error, error_low: of bfloat16 weights, see `rounding`: the operation is then that on float32 weights, some rows at a time.
    """
    rest = weight_error(error, error_low)
    if rest is not None:
        terms = (grad, phi, subtract_left, subtract_right, sign)
        in_float32(apply_, joined, split_, weight, rest, (left, right), (scalars, keep, ok, None), terms)
        return
    alpha, number = scalars.tolist()
    key, (start, *_) = unpack_key(rounding)
    residual = None
    if grad is not None and phi is not None:
        residual = ResidualTerm(grad, phi, ok, sign, subtract_left, subtract_right)
    factor: float | Tensor = number if keep is None else keep
    if ok is not None and not (isinstance(factor, float) and factor == 1.0):
        factor = masked_scalar(ok, factor, 1.0, left.dtype)
    if weight.dtype == left.dtype and residual is None:
        if isinstance(factor, Tensor):
            weight.mul_(factor)
            factor = 1.0
        multiply_add = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
        multiply_add(left, right, beta=factor, alpha=-alpha)
        return
    stack = (weight, left, right) if weight.dim() > 2 else (weight[None], left[None], right[None])
    for i, (w, a, b) in enumerate(zip(*stack, strict=True)):
        rows, cols = w.shape
        extra = None if residual is None else residual.matrix(i)
        for chunk in row_chunks(rows, cols):
            updated = w[chunk].to(a.dtype)  # the weight itself where the types are equal
            decay_(updated, factor)
            updated.addmm_(a[chunk], b, alpha=-alpha)
            if extra is not None:
                value, scale = extra.rows(chunk, a.dtype)
                updated.addcmul_(value, scale, value=-alpha)
            if w.dtype != a.dtype:
                store_(w[chunk], updated, key, start + i * w.numel() + chunk.start * cols)


@dataclass(frozen=True)
class ResidualTerm:
    """φ ⊙ E for `apply_`: E is the gradient G, sign(G), or sign(G − left @ right).

    Args:
        grad: (…, m, n), any floating type.
        scale: φ, broadcastable to it: (…, m, 1) for rows, (…, 1, n) for columns, (…, 1, 1) for the whole matrix; compute type.
        ok: 0-d bool on the device; where it is false, E is 0 (φ must be, too). None means true.
        sign: take the sign.
        left: (…, m, r) and `right` (…, r, n): what is subtracted before the sign is taken; None subtracts nothing.
    """

    grad: Tensor
    scale: Tensor
    ok: Tensor | None = None
    sign: bool = False
    left: Tensor | None = None
    right: Tensor | None = None

    def matrix(self, index: int) -> "ResidualTerm":
        """The term of one matrix of the stack."""
        if self.grad.dim() == 2:
            return self
        left, right = (None if t is None else t[index] for t in (self.left, self.right))
        return ResidualTerm(self.grad[index], self.scale[index], self.ok, self.sign, left, right)

    def rows(self, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """E and φ for some rows of a matrix."""
        value = self.grad[chunk].to(dtype)
        if self.ok is not None:
            value = torch.where(self.ok, value, 0.0)
        if self.left is not None and self.right is not None:
            value = torch.addmm(value, self.left[chunk], self.right, alpha=-1.0)
        scale = self.scale[chunk] if self.scale.shape[-2] > 1 else self.scale
        return (value.sign() if self.sign else value), scale


@definition("project_with_norms")
def project_with_norms(grad: Tensor, basis: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """R as in `project`, and ‖g_j‖² of every row (on the right) or column (on the left) of G, in one pass over G.

    Returns:
        R (…, d, r), and the squared norms (…, d, 1), d = m on the right and n on the left.
    """
    if grad.dim() > 2:
        pairs = [project_with_norms(g, b, right) for g, b in zip(grad, basis, strict=True)]
        return torch.stack([r for r, _ in pairs]), torch.stack([n for _, n in pairs])
    rows, cols = grad.shape
    lines = rows if right else cols
    together = not _in_bfloat16(grad, basis)
    out = basis.new_zeros(lines, basis.shape[-1]) if together else project(grad, basis, right)
    squares = basis.new_zeros(lines, 1)
    for chunk in row_chunks(rows, cols):  # the second read of a chunk comes from the cache
        part = grad[chunk].to(basis.dtype)
        if right:
            if together:
                torch.matmul(part, basis, out=out[chunk])
            squares[chunk] = torch.linalg.vector_norm(part, dim=1, keepdim=True).square_()
        else:
            if together:
                out.addmm_(part.mT, basis[chunk])
            squares += torch.linalg.vector_norm(part, dim=0).square_().unsqueeze(1)
    return out, squares


def decay_(weight: Tensor, keep: float | Tensor, ok: Tensor | None = None) -> None:
    """W ← keep·W where `ok` holds (or is None), in place; free for keep = 1."""
    if isinstance(keep, Tensor) or keep != 1.0:
        weight.mul_(keep if ok is None else masked_scalar(ok, keep, 1.0, compute_dtype(weight.dtype)))


@definition("apply_dense_")
def apply_dense_(
    weight: Tensor,  # modified in place
    direction: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """W ← keep·W − α·N for a direction of the weight's own shape; the arguments are those of `apply_`."""
    alpha, number = scalars.tolist()
    key, (start, *_) = unpack_key(rounding)
    factor, rest = number if keep is None else keep, weight_error(error, error_low)
    write_(weight, direction, alpha=alpha, keep=factor, ok=ok, rounding_key=key, start=start, error=rest)


def write_(
    weight: Tensor,  # modified in place
    direction: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None,
    rounding_key: int | None,
    start: int,
    error: WeightError | None = None,
) -> None:
    """`apply_dense_` with plain numbers, for chunks: `start` is the index of the first element."""
    if ok is not None:
        keep = masked_scalar(ok, keep, 1.0, direction.dtype)
    if weight.dtype == direction.dtype:
        decay_(weight, keep)
        weight.add_(direction, alpha=-alpha)
        return
    flat = weight.reshape(-1)  # a copy where the weight is not contiguous
    change, rest = direction.reshape(-1), flat_error(error)
    for chunk in row_chunks(flat.numel(), 1):
        own = rest and rest.at(chunk)
        updated = joined(flat[chunk], own).to(change.dtype).mul_(keep).add_(change[chunk], alpha=-alpha)
        store_(flat[chunk], updated, rounding_key, start + chunk.start, own)
    for tensor, copy in zip((weight, *(error or ())), (flat, *(rest or ())), strict=True):
        if tensor is not None and tensor.data_ptr() != copy.data_ptr():
            tensor.copy_(copy.view(tensor.shape))


def flat_error(error: WeightError | None) -> WeightError | None:
    """The errors of flattened weights: copies where they are not contiguous."""
    return error and error.map(lambda part: part.reshape(-1))


@definition("stochastic_round_")
def stochastic_round_(
    target: Tensor,
    value: Tensor,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """target ← value, rounded as in `store_`."""
    key, (start, *_) = unpack_key(rounding)
    store_(target, value, key, start, weight_error(error, error_low))


@definition("gaussian_")
def gaussian_(out: Tensor, key: Tensor) -> None:
    """Standard normal numbers, a function of key and position (`counter_rng.gaussian`)."""
    fill_gaussian_(out, unsigned_key(*key.tolist()))
