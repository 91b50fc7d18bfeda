"""Adam on coded moments, some rows at a time, in place.

The definition makes some sixty new tensors for every chunk. On a CPU new memory is cold, and takes four times as long as a buffer
that is in the cache. Here four buffers hold all that comes between the codes before and after the step.

Every operation is one of the definition, rounded once. Only products with powers of two, which are exact, have other places.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.kernels import compute
from lowrank_optim.kernels.arguments import unpack_key
from lowrank_optim.kernels.coded_reference import LEVELS, block_factors
from lowrank_optim.kernels.counter_rng import consecutive_halves, turn_offset
from lowrank_optim.kernels.nibbles import pack_nibbles, unpack_nibbles
from lowrank_optim.kernels.reference import flat_error, write_
from lowrank_optim.kernels.rounding import weight_error

BUFFERS = 4


class Buffer:
    """Room for a float32 matrix (rows, cols) whose rows are filled up to whole blocks, or for random words."""

    def __init__(self, memory: Tensor, rows: int, cols: int, width: int) -> None:
        self.memory, self.cols, blocks = memory, cols, -(-cols // width)
        self.blocks = memory[: rows * blocks * width].view(rows, blocks, width)
        self.padded = self.blocks.view(rows, -1)
        self.used = self.padded if cols == blocks * width else self.padded[:, :cols]

    def greatest(self) -> Tensor:
        """The greatest element of each block (rows, blocks)."""
        if self.used is not self.padded:
            self.padded[:, self.cols :] = 0.0
        return self.blocks.amax(-1)

    def words(self) -> Tensor:
        """The same memory as two rows of int32."""
        return self.memory.view(torch.int32).view(2, -1)


@dataclass(frozen=True)
class Step:
    """What is the same for all rows.

    adam: β₁, β₂, ε and t.
    noise: key or None, turn, and the position of the first element.
    ok: 0-d bool that only the device knows; None means true.
    one: 1.0 on the device.
    """

    adam: tuple[float, float, float, float]
    noise: tuple[int | None, int, int]
    ok: Tensor | None
    bits: int
    one: Tensor


class Rows(NamedTuple):
    """Some rows of a matrix: views of the operation's tensors, and what the step needs besides.

    col_scale: of the columns, and its reciprocal; or None.
    first: row-major index of the first element.
    """

    tensors: list[Tensor]
    buffers: list[Buffer]
    col_scale: tuple[Tensor, Tensor] | None
    first: int


def coded_adam_direct_(
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    direction = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if _is_off(ok):
        return direction.zero_()
    step = _step(scalars.tolist(), noise, ok, bits, grad.device)
    for rows in _rows_of(grad, col_scale, block, grad, direction, ratio, ratio_scale, root, root_scale):
        g, out, *codes = rows.tensors
        out.copy_(_direct(g, codes, rows, step))
        _encode_(codes, rows, step)
    return direction


def coded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    bits: int,
    block: int,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    rest = flat_error(weight_error(error, error_low))
    if _is_off(ok):
        return
    *adam, alpha, keep = scalars.tolist()
    step = _step(adam, noise, ok, bits, weight.device)
    key, (start, *_) = unpack_key(rounding)
    for rows in _rows_of(weight, col_scale, block, weight, grad, ratio, ratio_scale, root, root_scale):
        w, g, *codes = rows.tensors
        direction = _direct(g, codes, rows, step)
        own = rest and rest.part(rows.first, w)
        write: dict[str, Any] = {"alpha": alpha, "keep": keep, "ok": step.ok, "rounding_key": key, "error": own}
        write_(w, direction.to(compute.compute_dtype(w.dtype)), start=start + rows.first, **write)
        _encode_(codes, rows, step)


def _is_off(ok: Tensor | None) -> bool:
    """Whether the host can read that nothing is to change."""
    return is_read(ok) and not bool(ok)


def is_read(ok: Tensor | None) -> bool:
    """Whether the host reads it without waiting."""
    return ok is not None and ok.device.type == "cpu"


def _step(adam: list[float], noise: Tensor | None, ok: Tensor | None, bits: int, device: torch.device) -> Step:
    key, (turn, start) = unpack_key(noise)
    beta1, beta2, eps, t = adam
    return Step(
        (beta1, beta2, eps, t),
        (key, turn, start),
        None if is_read(ok) else ok,
        bits,
        torch.ones((), device=device),
    )


def _rows_of(like: Tensor, col_scale: Tensor | None, block: int, *tensors: Tensor) -> Iterator[Rows]:
    """Rows that together cover tensors (…, rows, ·), as many at a time as stay in the caches; `like` is (…, rows, cols)."""
    if like.numel() == 0:
        return
    rows, cols = like.shape[-2] if like.dim() > 1 else 1, like.shape[-1]
    stacks = [tensor.reshape(-1, rows, tensor.shape[-1]) for tensor in tensors]
    columns = None
    if col_scale is not None:
        scales = col_scale.expand(*like.shape[:-2], 1, cols).reshape(-1, cols)
        columns = list(zip(scales, scales.reciprocal(), strict=True))
    chunks = list(compute.row_chunks(rows, cols, compute.cache_elements(like.device)))
    width, most = min(block, cols), chunks[0].stop
    size = most * (cols + -cols % width)
    # Random words are made 256 pairs at a time.
    memory = like.new_empty(BUFFERS, size + size % 2 + 1024, dtype=torch.float32)
    sizes = {chunk.stop - chunk.start for chunk in chunks}
    buffers = {size: [Buffer(row, size, cols, width) for row in memory] for size in sizes}
    for i, matrices in enumerate(zip(*stacks, strict=True)):
        for chunk in chunks:
            own = None if columns is None else columns[i]
            views = [matrix[chunk] for matrix in matrices]
            yield Rows(views, buffers[chunk.stop - chunk.start], own, (i * rows + chunk.start) * cols)


def _direct(grad: Tensor, codes: list[Tensor], rows: Rows, step: Step) -> Tensor:
    """Leaves m and √v in the first two buffers, and returns the direction, which is the third."""
    (m, v, direction, spare), (ratio, ratio_scale, root, root_scale) = rows.buffers, codes
    beta1, beta2, eps, t = step.adam
    _decode_(v, root, root_scale, False, step)
    if rows.col_scale is not None:
        v.used.mul_(rows.col_scale[0])
    _decode_(m, ratio, ratio_scale, True, step)
    m.used.mul_(v.used)
    v.used.square_()

    g = grad if grad.dtype == torch.float32 and step.ok is None else spare.used.copy_(grad)
    if step.ok is not None:
        g.masked_fill_(~step.ok, 0.0)
    m.used.lerp_(g, 1.0 - beta1)
    v.used.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    v.used.sqrt_()

    bc1, bc2 = 1.0 - beta1**t, 1.0 - beta2**t
    torch.mul(v.used, bc1 / bc2**0.5, out=direction.used).add_(bc1 * eps)
    torch.div(m.used, direction.used, out=direction.used)
    return direction.used if step.ok is None else direction.used.masked_fill_(~step.ok, 0.0)


def _decode_(out: Buffer, codes: Tensor, scale: Tensor, signed: bool, step: Step) -> None:
    """Decoded rows, not yet multiplied with the scale of their columns."""
    levels = LEVELS[step.bits, signed]
    x = out.used.copy_(codes if step.bits == 8 else unpack_nibbles(codes, out.cols))
    if signed:
        (x if step.bits == 8 else x.sub_(8.0)).mul_(1.0 / levels)
    else:
        x.add_(1.0)
        scale = scale / levels  # a power of two
    out.blocks.mul_(scale.unsqueeze(-1))


def _encode_(codes: list[Tensor], rows: Rows, step: Step) -> None:
    """Store m and √v, the first two buffers."""
    (m, root, spare, noise), (ratio, ratio_scale, root_codes, root_scale) = rows.buffers, codes
    m.used.div_(root.used)
    if not compute.is_known(root.used.amin() > 0.0):
        m.used.copy_(torch.where(root.used > 0.0, m.used, 0.0))

    if rows.col_scale is not None:
        root.used.mul_(rows.col_scale[1])
    _to_levels_(root, root.greatest(), root_scale, False, step)
    key, turn, start = step.noise
    if key is not None:
        _add_noise_(root, spare, noise, key, turn, start + rows.first, step.one)
    _store_(root_codes, root.used.round_().clamp_min_(1.0), False, step)

    torch.abs(m.used, out=spare.used)
    _to_levels_(m, spare.greatest(), ratio_scale, True, step)
    _store_(ratio, m.used.round_(), True, step)


def _to_levels_(x: Buffer, greatest: Tensor, scale: Tensor, signed: bool, step: Step) -> None:
    """x ← x·(L/s) with the scale s of its block, which is stored."""
    new, factors = block_factors(greatest, LEVELS[step.bits, signed])
    x.blocks.mul_(factors.unsqueeze(-1))
    if not compute.is_known(new == new):
        x.used.copy_(x.used.nan_to_num(nan=0.0))
    scale.copy_(new if step.ok is None else torch.where(step.ok, new, scale))


def _add_noise_(y: Buffer, spare: Buffer, noise: Buffer, key: int, turn: int, start: int, one: Tensor) -> None:
    """y ← y + ρ(1 − 2⁻¹⁹ y), y ≥ 0; see `coded_reference._round_stochastically_`."""
    rows, cols = y.used.shape
    halves = consecutive_halves(key, start, rows * cols, y.used.device, spare.words())
    noise.used.copy_(halves.add_(turn_offset(turn) - (1 << 15)).view(rows, cols)).add_(0.5)
    torch.add(one, y.used, alpha=-(2.0**-19), out=spare.used)
    y.used.add_(noise.used.mul_(spare.used), alpha=2.0**-16)


def _store_(codes: Tensor, level: Tensor, signed: bool, step: Step) -> None:
    """Levels as codes, which begin at 0 for the lowest unsigned level and, in 4 bits, at 1 for −7."""
    if step.bits == 4:
        new = pack_nibbles(level.add_(8.0 if signed else -1.0).to(torch.int8).view(torch.uint8))
        codes.copy_(new if step.ok is None else torch.where(step.ok, new, codes))
        return
    # Torch converts float32 to int8 several at a time, and to uint8 one by one.
    target = codes.view(torch.int8) if step.ok is None else torch.empty_like(codes, dtype=torch.int8)
    target.copy_(level if signed else level.sub_(129.0))
    new = (target if signed else target.bitwise_xor_(-128)).view(codes.dtype)
    if step.ok is not None:
        codes.copy_(torch.where(step.ok, new, codes))
