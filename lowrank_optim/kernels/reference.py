"""The definition of every operation, in torch ops, for any device: other backends are tested against these functions.

Three stages make a step (`W` m×n, gradient `G` m×n, low-rank matrices "tall": one row for every row or column of W):

    project    R = G B  (right)  or  Gᵀ B  (left)
    direct     moments and direction N from R, elementwise on small matrices
    apply      W ← keep·W − α·(left @ right + φ ⊙ E)

Arithmetic is float32 (float64 for float64 parameters) whatever the storage type. Low-precision operands are converted by chunks of
rows, so no operation allocates a float32 copy of a whole large matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import random_bits

CHUNK_ELEMENTS = 1 << 20
"""Elements that a float32 working copy of a low-precision matrix may have (4 MiB)."""

CACHE_ELEMENTS = 1 << 17
"""Elements of a chunk for each thread of the CPU: few enough for its caches, and so many that calls of torch cost little."""

NORM_RUN = 256
"""Elements whose norm is taken in a low-precision type; tensors of fewer than its square are converted."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that arithmetic on a parameter of this type is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_scalar(ok: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """0-d tensor on the device: `value` where `ok` holds, else `otherwise`; in `dtype`, which torch.where on two numbers is not."""
    return torch.where(ok, scalar(value, dtype, ok.device), scalar(otherwise, dtype, ok.device))


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d tensor on the device, made there: a copy from the host would wait."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def row_chunks(rows: int, cols: int, elements: int | None = None) -> Iterator[slice]:
    """Slices of rows that together cover a rows×cols matrix, each of at most `elements` elements (at least one row)."""
    size = max(1, (CHUNK_ELEMENTS if elements is None else elements) // max(cols, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def cache_elements(device: torch.device) -> int:
    """Elements of a chunk that is read and written by dozens of operations: on the CPU so few that they stay in the caches."""
    return min(CACHE_ELEMENTS * torch.get_num_threads(), CHUNK_ELEMENTS) if device.type == "cpu" else CHUNK_ELEMENTS


def is_known(condition: Tensor) -> bool:
    """Whether the host knows that a condition holds for all elements: not where it would have to wait for a device."""
    return condition.device.type == "cpu" and bool(condition.all())


def norm(tensor: Tensor) -> Tensor:
    """‖tensor‖, 0-d, in the compute type, in one pass and without a copy of a whole large tensor in that type.

    Large bfloat16 tensors on the CPU: the norms of runs of 256 elements, summed in float32, are rounded to bfloat16 on their way;
    the error of the result is a few parts in 10⁵ (and no sum over- or underflows for it).
    """
    dtype = compute_dtype(tensor.dtype)
    total: Tensor
    if tensor.dtype == dtype or tensor.device.type != "cpu" or tensor.numel() < NORM_RUN**2:
        total = torch.linalg.vector_norm(tensor, dtype=dtype)
        return total
    flat = tensor.reshape(-1)
    if tensor.dtype == torch.bfloat16:
        whole = flat.numel() - flat.numel() % NORM_RUN
        runs = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_RUN), dim=-1).to(dtype)
        parts = torch.cat([runs, flat[whole:].to(dtype)])
    else:
        chunks = row_chunks(flat.numel(), 1)
        parts = torch.stack([torch.linalg.vector_norm(flat[chunk].to(dtype)) for chunk in chunks])
    total = torch.linalg.vector_norm(parts)
    return total


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


def project(grad: Tensor, basis: Tensor, side: str) -> Tensor:
    """R = G B for side "right" (m×r), R = Gᵀ B for side "left" (n×r), with float32 accumulation.

    Under `torch.set_float32_matmul_precision("medium")`, a bfloat16 gradient on a CPU with matrix units for bfloat16 is
    multiplied as it is: the basis is rounded to bfloat16, and R once, 2⁻⁹ each.

    Args:
        grad: (…, m, n), any floating type.
        basis: (…, n, r) for "right", (…, m, r) for "left"; float32 or float64.
        side: "right" or "left".
    """
    if grad.dtype == basis.dtype:
        return torch.matmul(grad if side == "right" else grad.mT, basis)
    if _in_bfloat16(grad, basis):
        return torch.matmul(grad if side == "right" else grad.mT, basis.to(grad.dtype)).to(basis.dtype)
    if grad.dim() > 2:
        return torch.stack([project(g, b, side) for g, b in zip(grad, basis, strict=True)])
    rows, cols = grad.shape
    if side == "right":
        out = basis.new_empty(rows, basis.shape[-1])
        for chunk in row_chunks(rows, cols):
            torch.matmul(grad[chunk].to(basis.dtype), basis, out=out[chunk])
        return out
    out = basis.new_zeros(cols, basis.shape[-1])
    for chunk in row_chunks(rows, cols):
        out.addmm_(grad[chunk].to(basis.dtype).mT, basis[chunk])
    return out


def adam_direct_(
    grad: Tensor,
    exp_avg: Tensor,  # modified in place
    exp_avg_sq: Tensor,  # modified in place
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    ok: Tensor | None = None,
) -> Tensor:
    """Adam's moments and direction: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², N = (m/bc₁) / (√(v/bc₂) + ε), bcᵢ = 1 − βᵢᵗ.

    Args:
        grad: the (projected) gradient, in the compute type.
        step: t ≥ 1, the number of steps that the moments have seen with this one.
        ok: 0-d bool on the device. Where it is false, the moments stay as they are and N is 0 (`grad` must be finite: fill it with
            zeros). None means true.
    """
    bc1, bc2 = 1.0 - beta1**step, 1.0 - beta2**step
    if ok is None:
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    else:
        exp_avg.lerp_(grad, ok.to(grad.dtype) * (1.0 - beta1))
        exp_avg_sq.mul_(masked_scalar(ok, beta2, 1.0, grad.dtype)).addcmul_(grad, grad, value=1.0 - beta2)
    # m / (bc₁/√bc₂ · √v + bc₁·ε): both corrections in the denominator, so that N takes one pass.
    direction = exp_avg_sq.sqrt().mul_(bc1 / bc2**0.5).add_(bc1 * eps)
    torch.div(exp_avg, direction, out=direction)
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


def row_norms(direction: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    above: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    below: Tensor = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    return above, below


def lion_direct_(
    grad: Tensor,
    exp_avg: Tensor,  # modified in place
    *,
    beta1: float,
    beta2: float,
    ok: Tensor | None = None,
) -> Tensor:
    """Lion's direction and momentum: N = sign(β₁m + (1−β₁)g), m ← β₂m + (1−β₂)g; `ok` as in `adam_direct_`."""
    direction = torch.lerp(exp_avg, grad, 1.0 - beta1).sign_()
    if ok is None:
        exp_avg.lerp_(grad, 1.0 - beta2)
        return direction
    exp_avg.lerp_(grad, ok.to(grad.dtype) * (1.0 - beta2))
    return direction.masked_fill_(~ok, 0.0)


def sgd_direct_(
    grad: Tensor,
    exp_avg: Tensor,  # modified in place
    *,
    momentum: float,
    nesterov: bool = False,
    ok: Tensor | None = None,
) -> Tensor:
    """m ← μm + g; N = m, or g + μm (Nesterov); `ok` as in `adam_direct_`."""
    exp_avg.mul_(momentum if ok is None else masked_scalar(ok, momentum, 1.0, grad.dtype)).add_(grad)
    direction = grad.add(exp_avg, alpha=momentum) if nesterov else exp_avg.clone()
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


def rmsprop_direct_(
    grad: Tensor,
    exp_avg_sq: Tensor,  # modified in place
    *,
    alpha: float,
    eps: float,
    ok: Tensor | None = None,
) -> Tensor:
    """v ← αv + (1−α)g²; N = g / (√v + ε); `ok` as in `adam_direct_`."""
    exp_avg_sq.mul_(alpha if ok is None else masked_scalar(ok, alpha, 1.0, grad.dtype))
    exp_avg_sq.addcmul_(grad, grad, value=1.0 - alpha)
    direction = exp_avg_sq.sqrt().add_(eps)
    torch.div(grad, direction, out=direction)
    return direction if ok is None else direction.masked_fill_(~ok, 0.0)


def apply_(
    weight: Tensor,  # modified in place
    left: Tensor,
    right: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
    start: int = 0,
    residual: "ResidualTerm | None" = None,
) -> None:
    """W ← keep·W − α·(left @ right + φ ⊙ E), one pass over W and one over the gradient that E is made of.

    Args:
        weight: (…, m, n) matrix view of the parameter, any floating type.
        left: (…, m, r) in the compute type.
        right: (…, r, n) in the compute type.
        alpha: the step size.
        keep: 1 − ηλ, the factor of decoupled weight decay; a 0-d tensor costs another pass over W.
        ok: 0-d bool on the device; where it is false, W stays as it is (`left @ right` and φ must then be 0, and G finite).
        rounding_key: round bfloat16 weights stochastically with this key; None rounds to nearest.
        start: row-major index of the first element in the whole parameter, so that the noise does not depend on shards.
        residual: the part of the update that is not low-rank; None leaves it out.
    """
    if ok is not None and not (isinstance(keep, float) and keep == 1.0):
        keep = masked_scalar(ok, keep, 1.0, left.dtype)
    if weight.dtype == left.dtype and residual is None:
        if isinstance(keep, Tensor):
            weight.mul_(keep)
            keep = 1.0
        multiply_add = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
        multiply_add(left, right, beta=keep, alpha=-alpha)
        return
    stack = (weight, left, right) if weight.dim() > 2 else (weight[None], left[None], right[None])
    for i, (w, a, b) in enumerate(zip(*stack, strict=True)):
        rows, cols = w.shape
        extra = None if residual is None else residual.matrix(i)
        for chunk in row_chunks(rows, cols):
            updated = w[chunk].to(a.dtype)  # the weight itself where the types are equal
            decay_(updated, keep)
            updated.addmm_(a[chunk], b, alpha=-alpha)
            if extra is not None:
                value, scale = extra.rows(chunk, a.dtype)
                updated.addcmul_(value, scale, value=-alpha)
            if w.dtype != a.dtype:
                store_(w[chunk], updated, rounding_key, start + i * w.numel() + chunk.start * cols)


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


def project_with_norms(grad: Tensor, basis: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """R as in `project`, and ‖g_j‖² of every row ("right") or column ("left") of G, in one pass over G.

    Returns:
        R (…, d, r), and the squared norms (…, d, 1), d = m for "right" and n for "left".
    """
    if grad.dim() > 2:
        pairs = [project_with_norms(g, b, side) for g, b in zip(grad, basis, strict=True)]
        return torch.stack([r for r, _ in pairs]), torch.stack([n for _, n in pairs])
    rows, cols = grad.shape
    lines = rows if side == "right" else cols
    together = not _in_bfloat16(grad, basis)
    out = basis.new_zeros(lines, basis.shape[-1]) if together else project(grad, basis, side)
    squares = basis.new_zeros(lines, 1)
    for chunk in row_chunks(rows, cols):  # the second read of a chunk comes from the cache
        part = grad[chunk].to(basis.dtype)
        if side == "right":
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


def apply_dense_(
    weight: Tensor,  # modified in place
    direction: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
    start: int = 0,
) -> None:
    """W ← keep·W − α·N for a direction of the weight's own shape; the other arguments are those of `apply_` and `store_`."""
    if ok is not None:
        keep = masked_scalar(ok, keep, 1.0, direction.dtype)
    if weight.dtype == direction.dtype:
        decay_(weight, keep)
        weight.add_(direction, alpha=-alpha)
        return
    flat = weight.reshape(-1)  # a copy where the weight is not contiguous
    change = direction.reshape(-1)
    for chunk in row_chunks(flat.numel(), 1):
        updated = flat[chunk].to(change.dtype).mul_(keep).add_(change[chunk], alpha=-alpha)
        store_(flat[chunk], updated, rounding_key, start + chunk.start)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


def store_(target: Tensor, value: Tensor, rounding_key: int | None, start: int = 0) -> None:
    """target ← value, rounded to the target's type: to nearest, or stochastically with a key.

    Args:
        target: modified in place; for stochastic rounding, bfloat16.
        value: float32, same shape.
        rounding_key: from `counter_rng.make_key`; None rounds to nearest.
        start: global index of the first element, so that the noise does not depend on chunks or shards.
    """
    if rounding_key is not None:
        positions = torch.arange(start, start + value.numel(), device=value.device).view(value.shape)
        value = stochastic_round(value, rounding_key, positions)
    target.copy_(value)


def stochastic_round(value: Tensor, key: int, positions: Tensor) -> Tensor:
    """float32 values on the bfloat16 grid, each rounded up with a probability equal to its distance from the lower neighbour.

    A bfloat16 is the upper half of a float32:

        | s | eeeeeeee | mmmmmmm | xxxxxxxxxxxxxxxx |
        |<--- kept: bfloat16 --->|<--- dropped ---->|

    Adding a uniform 16-bit integer to the dropped half carries into the kept half with probability x / 2**16. The sum is an integer
    addition on the bits, so it works across exponents and for both signs (away from or towards zero in magnitude). Expectation over
    keys is the value itself. Infinities and NaNs are left alone; finite values within one step of the largest bfloat16 can become
    infinite, as in rounding to nearest.
    """
    noise = random_bits(key, positions).bitwise_and_(0xFFFF).to(torch.int32)
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value)
