"""Arguments for every operation, to run backends on (`comparison`).

`lowrank-optim doctor` runs the short list made here (`quick_cases`); the tests build long ones from the same functions. A case makes
its arguments anew each time, on the CPU, from a seeded generator of its own.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels import arguments
from lowrank_optim.kernels.checks import code_dtype, coded_shapes
from lowrank_optim.kernels.comparison import Arguments, Case
from lowrank_optim.kernels.counter_rng import make_key, random_bits

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEY, ROUNDING_KEY = make_key(3, 1, 4, 4), make_key(3, 1, 4, 2)
Shape = tuple[int, ...]


# -------------------------------------------------------------------------------------------------------------------- tensors


def draw(seed: int, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
    """Normal numbers whose rows span four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64)
    rows = torch.rand((*shape[:-1], 1), generator=generator, dtype=F64) if shape else torch.ones((), dtype=F64)
    return (x * 10 ** (4 * rows - 3)).to(dtype)


def positive(seed: int, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
    """Numbers from 0.1 to 2.1."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator, dtype=F64) + 0.1).to(dtype)


def as_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values as a "plain" tensor, "unaligned" (one element into its storage), a "window" of a larger matrix with rows of
    unit stride, "transposed" (column by column), or "strided" (every second column).
    """
    if layout == "unaligned":
        out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    elif layout == "plain" or tensor.dim() < 2:
        return tensor.contiguous()
    elif layout == "transposed":
        return tensor.mT.contiguous().mT
    elif layout in ("window", "strided"):
        *batch, rows, cols = tensor.shape
        step = 2 if layout == "strided" else 1
        out = tensor.new_full((*batch, rows + 2, step * cols + 5), 777.0)[..., 1 : rows + 1, 3 : 3 + step * cols : step]
    else:
        raise ValueError(f"layout is {layout!r}; valid: plain, unaligned, window, transposed, strided")
    return out.copy_(tensor)


def spoiled(tensor: Tensor, fill: str) -> Tensor:
    """With NaN, infinities, zeros or extreme magnitudes among the elements ("plain": as it is); modified in place."""
    flat = tensor.view(-1)
    last = max(flat.numel() - 1, 0)
    if fill == "nonfinite" and flat.numel():
        for at, value in ((0, torch.nan), (last // 2, torch.inf), (last, -torch.inf)):
            flat[at] = value
    elif fill == "zeros":
        flat.zero_()
    elif fill == "tiny":
        flat.mul_(1e-35)
    elif fill == "huge":
        flat.mul_(torch.finfo(tensor.dtype).max / max(float(flat.abs().max()) if flat.numel() else 1.0, 1e-30))
    elif fill == "ties":  # between two levels
        flat.copy_((flat * 4).round() / 2)
    elif fill == "halfway" and tensor.dtype == F32:  # between two numbers of bfloat16 and of float16, in turn
        bits = flat.view(torch.int32)
        bits[0::2] = bits[0::2] & ~0xFFFF | 0x8000
        bits[1::2] = bits[1::2] & ~0x1FFF | 0x1000
    return tensor


def codes_of(seed: int, shape: Shape, bits: int, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales such as a few steps leave behind; the first block of the first row is all zero."""
    generator = torch.Generator().manual_seed(seed)
    code_shape, scale_shape = coded_shapes(shape, bits, block)
    low, high = (-127, 128) if bits == 8 and signed else (0, 256)
    codes = torch.randint(low, high, code_shape, generator=generator)
    if bits == 4:
        half = torch.randint(1 if signed else 0, 16, (2, *code_shape), generator=generator)
        if shape[-1] % 2 and codes.numel():
            half[1, ..., -1] = 0
        codes = half[0] | half[1] << 4
    scale = positive(seed + 1, scale_shape) * 0.3
    if scale.numel():
        scale.view(-1)[0] = 0.0
    return codes.to(code_dtype(bits, signed)), scale


def _col_scale(kind: str | None, shape: Shape) -> Tensor | None:
    if kind is None:
        return None
    return positive(11, (shape[-1],) if kind == "shared" else (*shape[:-2], 1, shape[-1]))


def _ok(ok: bool | None) -> Tensor | None:
    return None if ok is None else torch.tensor(ok)


def _noise(turn: int | None, start: int) -> Tensor | None:
    return arguments.pack_key(None if turn is None else KEY, 0 if turn is None else turn, start)


# ------------------------------------------------------------------------------------------------------------------ arguments


def project(
    batch: Shape, rows: int, cols: int, rank: int, right: bool, dtype: torch.dtype = F32, layout: str = "plain"
) -> Arguments:
    grad = as_layout(draw(1, (*batch, rows, cols), dtype), layout)
    return grad, draw(2, (*batch, cols if right else rows, rank)), right


def apply(
    batch: Shape,
    rows: int,
    cols: int,
    rank: int,
    weight: torch.dtype = F32,
    grad: torch.dtype | None = None,
    phi: str = "columns",
    sign: bool = False,
    subtract: bool = False,
    ok: bool | None = None,
    keep: float | Tensor = 0.9,
    alpha: float = 0.03,
    rounding: bool = False,
    start: int = 0,
    layout: str = "plain",
    error_bits: int = 0,
) -> Arguments:
    """Arguments of `apply_`; `phi` is "rows", "columns" or "matrix"."""
    shape = (*batch, rows, cols)
    w = as_layout(draw(1, shape, weight), layout)
    left, right = draw(2, (*batch, rows, rank)), draw(3, (*batch, rank, cols))
    lines = {"rows": (rows, 1), "columns": (1, cols), "matrix": (1, 1)}[phi]
    g = None if grad is None else as_layout(draw(4, shape, grad), layout)
    scale = None if grad is None else positive(5, (*batch, *lines))
    pair = (draw(6, (*batch, rows, rank)), draw(7, (*batch, rank, cols))) if subtract else (None, None)
    scalars = arguments.pack_scalars(alpha, 1.0 if isinstance(keep, Tensor) else keep)
    if ok is False:  # what the caller promises for it
        left.zero_()
        if scale is not None:
            scale.zero_()
    number = keep if isinstance(keep, Tensor) else None
    errors = _errors(w, error_bits)
    return w, left, right, scalars, number, _ok(ok), _words(rounding, start), g, scale, *pair, sign, *errors


def _errors(weight: Tensor, bits: int) -> tuple[Tensor | None, ...]:
    """`error` and `error_low` beside a weight, in its strides: any bytes will do. Nothing for 0 bits."""
    if not bits:
        return ()
    size = weight.untyped_storage().nbytes() // weight.element_size()
    like = (weight.shape, weight.stride(), weight.storage_offset())
    high, low = random_bits(KEY, torch.arange(2 * size)).to(torch.uint8).view(2, size)
    return torch.as_strided(high.view(torch.int8), *like), torch.as_strided(low.clone(), *like) if bits == 16 else None


def _words(rounding: bool, start: int) -> Tensor | None:
    return arguments.pack_key(ROUNDING_KEY if rounding else None, start)


def apply_dense(
    shape: Shape,
    weight: torch.dtype = F32,
    ok: bool | None = None,
    keep: float | Tensor = 0.9,
    alpha: float = 0.03,
    rounding: bool = False,
    start: int = 0,
    fill: str = "plain",
    layout: str = "plain",
    error_bits: int = 0,
) -> Arguments:
    w = as_layout(draw(1, shape, weight), layout)
    direction = as_layout(spoiled(draw(2, shape), "zeros" if ok is False else fill), layout)
    scalars = arguments.pack_scalars(alpha, 1.0 if isinstance(keep, Tensor) else keep)
    number = keep if isinstance(keep, Tensor) else None
    return w, direction, scalars, number, _ok(ok), _words(rounding, start), *_errors(w, error_bits)


def stochastic_round(
    shape: Shape,
    target: torch.dtype = BF16,
    rounding: bool = True,
    start: int = 0,
    fill: str = "plain",
    layout: str = "plain",
    error_bits: int = 0,
) -> Arguments:
    value, to = spoiled(draw(1, shape), fill), as_layout(torch.zeros(shape, dtype=target), layout)
    return to, as_layout(value, layout), _words(rounding, start), *_errors(to, error_bits)


def adam_direct(
    shape: Shape, ok: bool | None = None, step: float = 3.0, fill: str = "plain", layout: str = "plain"
) -> Arguments:
    grad = as_layout(spoiled(draw(1, shape), "zeros" if ok is False else fill), layout)
    return grad, draw(2, shape), draw(3, shape).square_(), arguments.pack_scalars(0.9, 0.999, 1e-8, step), _ok(ok)


def adam_dense(
    shape: Shape,
    weight: torch.dtype = F32,
    grad: torch.dtype = F32,
    ok: bool | None = None,
    keep: float = 0.9,
    alpha: float = 0.03,
    rounding: bool = False,
    start: int = 0,
    fill: str = "plain",
    layout: str = "plain",
    error_bits: int = 0,
) -> Arguments:
    w, g = as_layout(draw(1, shape, weight), layout), as_layout(spoiled(draw(2, shape, grad), fill), layout)
    scalars = arguments.pack_scalars(0.9, 0.999, 1e-8, 3.0, alpha, keep)
    rest = (_ok(ok), _words(rounding, start), *_errors(w, error_bits))
    return w, g, draw(3, shape), draw(4, shape).square_(), scalars, *rest


def folded_adam_dense(
    shape: Shape,
    weight: torch.dtype = F32,
    grad: torch.dtype = F32,
    fold: int = 4,
    residual: float = 1.0,
    ok: bool | None = None,
    keep: float = 0.9,
    alpha: float = 0.03,
    rounding: bool = False,
    start: int = 0,
    fill: str = "plain",
    layout: str = "plain",
) -> Arguments:
    w, g = as_layout(draw(1, shape, weight), layout), as_layout(spoiled(draw(2, shape, grad), fill), layout)
    folded = (*shape[:-1], -(-shape[-1] // fold))
    scalars = arguments.pack_scalars(0.9, 0.999, 1e-8, 3.0, residual, alpha, keep)
    return w, g, draw(3, folded), draw(4, folded).square_(), scalars, _ok(ok), _words(rounding, start), fold


def lion_direct(shape: Shape, ok: bool | None = None, fill: str = "plain", layout: str = "plain") -> Arguments:
    grad = as_layout(spoiled(draw(1, shape), "zeros" if ok is False else fill), layout)
    return grad, draw(2, shape), arguments.pack_scalars(0.9, 0.99), _ok(ok)


def sgd_direct(
    shape: Shape, ok: bool | None = None, nesterov: bool = False, fill: str = "plain", layout: str = "plain"
) -> Arguments:
    grad = as_layout(spoiled(draw(1, shape), "zeros" if ok is False else fill), layout)
    return grad, draw(2, shape), arguments.pack_scalars(0.9), _ok(ok), nesterov


def rmsprop_direct(
    shape: Shape, ok: bool | None = None, alpha: float = 0.99, fill: str = "plain", layout: str = "plain"
) -> Arguments:
    grad = as_layout(spoiled(draw(1, shape), "zeros" if ok is False else fill), layout)
    return grad, draw(2, shape).square_(), arguments.pack_scalars(alpha, 1e-8), _ok(ok)


def coded_adam_direct(
    shape: Shape,
    bits: int = 8,
    block: int = 256,
    col_scale: str | None = None,
    turn: int | None = 5,
    start: int = 0,
    ok: bool | None = None,
    fill: str = "plain",
    layout: str = "plain",
    fresh: bool = False,
) -> Arguments:
    """Arguments of `coded_adam_direct_`; `col_scale` is "shared", (cols,), or "batch", (…, 1, cols); `fresh`: moments are 0."""
    grad = as_layout(spoiled(draw(1, shape), fill), layout)
    ratio, ratio_scale = codes_of(2, shape, bits, True, block)
    root, root_scale = codes_of(4, shape, bits, False, block)
    if fresh:
        ratio_scale.zero_()
        root_scale.zero_()
    scalars = arguments.pack_scalars(0.9, 0.999, 1e-8, 1.0 if fresh else 7.0)
    codes = (ratio, ratio_scale, root, root_scale)
    return grad, *codes, _col_scale(col_scale, shape), scalars, _noise(turn, start), _ok(ok), bits, block


def coded_adam_dense(
    shape: Shape,
    weight: torch.dtype = F32,
    grad: torch.dtype = F32,
    bits: int = 8,
    block: int = 256,
    col_scale: str | None = None,
    turn: int | None = 5,
    start: int = 0,
    ok: bool | None = None,
    keep: float = 0.9,
    alpha: float = 0.03,
    rounding: bool = False,
    fill: str = "plain",
    layout: str = "plain",
    error_bits: int = 0,
) -> Arguments:
    g, *codes, columns, _, noise, flag, _, _ = coded_adam_direct(shape, bits, block, col_scale, turn, start, ok, fill)
    w = as_layout(draw(9, shape, weight), layout)
    scalars = arguments.pack_scalars(0.9, 0.999, 1e-8, 7.0, alpha, keep)
    rest = (noise, flag, _words(rounding, start), bits, block, *_errors(w, error_bits))
    return w, as_layout(g.to(grad), layout), *codes, columns, scalars, *rest


def quantize_rows(
    shape: Shape,
    dtype: torch.dtype = F32,
    bits: int = 8,
    signed: bool = True,
    block: int = 256,
    col_scale: str | None = None,
    turn: int | None = None,
    start: int = 0,
    fill: str = "plain",
    layout: str = "plain",
) -> Arguments:
    x = spoiled(draw(1, shape, dtype), fill)
    x = as_layout(x if signed else x.abs(), layout)
    return x, _col_scale(col_scale, shape), _noise(turn, start), bits, signed, block


def dequantize_rows(
    shape: Shape,
    dtype: torch.dtype = F32,
    bits: int = 8,
    signed: bool = True,
    block: int = 256,
    col_scale: str | None = None,
) -> Arguments:
    codes = codes_of(1, shape, bits, signed, block)
    return *codes, _col_scale(col_scale, shape), bits, signed, block, shape[-1], dtype


def pack_basis(
    shape: Shape, dtype: torch.dtype = F32, bits: int = 4, group: int = 256, fill: str = "plain", layout: str = "plain"
) -> Arguments:
    basis = _between_codes(shape, bits, group) if fill == "between" else spoiled(draw(1, shape, dtype), fill)
    return as_layout(basis.to(dtype), layout), bits, group


def _between_codes(shape: Shape, bits: int, group: int) -> Tensor:
    """Elements halfway between two codes, where the last bit of a quotient decides; each group's first two span it."""
    top, step = 2**bits - 1, 0.3
    basis = (torch.randint(top, shape, generator=torch.Generator().manual_seed(1)) + 0.5) * step
    basis[..., 0::group] = 0.0
    basis[..., 1::group] = top * step
    return basis


def unpack_basis(shape: Shape, dtype: torch.dtype = F32, bits: int = 4, group: int = 256) -> Arguments:
    codes, scale = codes_of(1, shape, bits, False, group)
    return codes, scale, draw(3, tuple(scale.shape)), bits, group, shape[-1], dtype


def gaussian(shape: Shape, key: int = KEY) -> Arguments:
    return torch.zeros(shape), arguments.pack_key(key)


def support(rows: int, cols: int, density: float, columns: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Pointers and columns of a sparse matrix; its first row has no entries, and its last has all."""
    there = torch.rand(rows, cols, generator=torch.Generator().manual_seed(9)) < density
    there[:1], there[-1:] = False, density > 0
    lengths = there.sum(1)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(), there.nonzero()[:, 1].to(columns)


def sltrain_forward(
    tokens: Shape,
    rows: int,
    cols: int,
    rank: int,
    dtype: torch.dtype = F32,
    density: float = 0.1,
    columns: torch.dtype = torch.int32,
    bias: bool = True,
    layout: str = "plain",
) -> Arguments:
    pointers, places = support(rows, cols, density, columns)
    x = as_layout(draw(1, (*tokens, cols), dtype), layout)
    factors = (draw(2, (*tokens, rank), dtype), draw(3, (rows, rank), dtype)) if rank else (None, None)
    offset = draw(5, (rows,), dtype) if bias else None
    return x, *factors, offset, draw(4, (places.numel(),), dtype), pointers, places


def sltrain_backward_input(
    tokens: Shape,
    rows: int,
    cols: int,
    rank: int,
    dtype: torch.dtype = F32,
    density: float = 0.1,
    columns: torch.dtype = torch.int32,
    layout: str = "plain",
) -> Arguments:
    pointers, places = support(rows, cols, density, columns)
    grad = as_layout(draw(1, (*tokens, rows), dtype), layout)
    factors = (draw(2, (*tokens, rank), dtype), draw(3, (rank, cols), dtype)) if rank else (None, None)
    return grad, *factors, draw(4, (places.numel(),), dtype), pointers, places, cols


def sampled_product(
    tokens: Shape,
    rows: int,
    cols: int,
    dtype: torch.dtype = F32,
    density: float = 0.1,
    columns: torch.dtype = torch.int32,
    layout: str = "plain",
) -> Arguments:
    grad, x = draw(1, (*tokens, rows), dtype), draw(2, (*tokens, cols), dtype)
    return as_layout(grad, layout), as_layout(x, layout), *support(rows, cols, density, columns)


def factors(seed: int, sizes: tuple[int, ...], rank: int) -> tuple[list[Tensor], list[bool]]:
    """Factors d×rank of these sizes, every second one as its transpose."""
    wide = [bool(n % 2) for n in range(len(sizes))]
    shapes = [(rank, d) if lies else (d, rank) for d, lies in zip(sizes, wide, strict=True)]
    return [draw(seed + n, shape) for n, shape in enumerate(shapes)], wide


def thin_grams(sizes: tuple[int, ...], rank: int, same: bool = False) -> Arguments:
    left, wide = factors(1, sizes, rank)
    return left, left if same else factors(51, sizes, rank)[0], wide


def pair_step(sizes: tuple[int, ...], rank: int) -> Arguments:
    (weights, wide), (grads, _), (momenta, _) = (factors(seed, sizes, rank) for seed in (1, 51, 101))
    numbers = [(0.1 / (n + 1), 0.03, 1.0 - 0.1 * n) for n in range(len(sizes))]
    small = draw(151, (len(sizes), rank, rank))
    return weights, grads, momenta, small, torch.tensor(numbers, dtype=F64), wide


def thin_turn(sizes: tuple[int, ...], rank: int) -> Arguments:
    forms, wide = factors(1, sizes, rank)
    return forms, draw(51, (len(sizes), rank, rank)), wide


def inverse_power(batch: Shape, rank: int, root: bool, shift: bool = False, fill: str = "plain") -> Arguments:
    """Gram matrices, every third one of half the rank; `fill` of the last one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((*batch, rank, rank + 5), generator=generator, dtype=F64)
    x.view(-1, rank, rank + 5)[::3, :, (rank + 1) // 2 :] = 0.0
    grams = x @ x.mT
    spoiled(grams.view(-1, rank * rank)[-1], fill)
    shifts = positive(2, batch, F64) if shift else None
    return grams, shifts, arguments.pack_scalars(1e-9, 0.01 if shift else 0.0), root


def rite_step(sizes: tuple[int, ...], rank: int) -> Arguments:
    """Factors that are far from singular, after a step or two."""

    def near(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(x.shape, generator=generator, dtype=F64).to(F32) for x in factors(1, sizes, rank)[0]]

    grams = [positive(n, (rank, rank), F64) for n in range(len(sizes))]
    moments = [((x @ x.mT + torch.eye(rank, dtype=F64)) / rank)[None].to(F32) for x in grams]
    numbers = torch.tensor([[0.1, 0.01, 0.999, 0.03, 0.9], [0.1, 0.01, 0.999, 0.05, 1.0]], dtype=F64)
    known = torch.zeros(len(sizes), rank**2 + 2, dtype=F64)
    scalars = arguments.pack_scalars(1e-6 * rank, 1e-6)
    return near(1), near(2), near(3), moments, [], known, numbers, scalars, factors(1, sizes, rank)[1]


def case(op: str, make: Callable[..., Arguments], *args: Any, **options: Any) -> Case:
    """A case whose label is its arguments."""
    words = [*map(_word, args), *(f"{name}={_word(value)}" for name, value in options.items())]
    return Case(op, " ".join(words), partial(make, *args, **options))


def _word(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return f"tensor({float(value):g},{_word(value.dtype)})"
    return "x".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)


# --------------------------------------------------------------------------------------------------------------------- doctor


def quick_cases() -> Iterator[Case]:
    """A few ragged cases of every operation, together well under a second on a CPU."""
    yield case("project", project, (2,), 20, 33, 3, True)
    yield case("project", project, (), 20, 33, 3, False, dtype=BF16)
    yield case("project_with_norms", project, (), 20, 33, 3, True, dtype=BF16)
    yield case("project_with_norms", project, (), 20, 33, 3, False)
    yield case("project_with_norms", project, (), 20, 1100, 1, True, dtype=BF16)
    yield case("project_with_norms", project, (2,), 300, 33, 1, False)
    yield case("apply_", apply, (), 20, 300, 3)
    yield case("apply_", apply, (), 20, 300, 3, BF16, F32, rounding=True, start=7)
    yield case("apply_", apply, (2,), 20, 33, 3, F32, BF16, phi="rows", sign=True, subtract=True)
    for weight in (F32, BF16):
        yield case("apply_dense_", apply_dense, (5, 300), weight, rounding=weight == BF16)
        yield case("adam_dense_", adam_dense, (5, 300), weight, weight, rounding=weight == BF16)
        yield case("folded_adam_dense_", folded_adam_dense, (5, 302), weight, weight, rounding=weight == BF16)
    yield case("stochastic_round_", stochastic_round, (5, 300), start=2**32 - 700)
    yield case("stochastic_round_", stochastic_round, (5, 300), F16, rounding=False)
    for kept in (8, 16):
        yield case("apply_", apply, (), 20, 300, 3, BF16, BF16, error_bits=kept)
        yield case("apply_dense_", apply_dense, (5, 300), BF16, error_bits=kept)
        yield case("adam_dense_", adam_dense, (5, 300), BF16, BF16, error_bits=kept)
        yield case("coded_adam_dense_", coded_adam_dense, (20, 301), BF16, BF16, error_bits=kept)
    yield case("adam_direct_", adam_direct, (20, 33))
    yield case("adam_direct_with_norms_", adam_direct, (20, 33))
    yield case("lion_direct_", lion_direct, (20, 33))
    yield case("sgd_direct_", sgd_direct, (20, 33), nesterov=True)
    yield case("rmsprop_direct_", rmsprop_direct, (20, 33))
    for bits in (8, 4):
        yield case("coded_adam_direct_", coded_adam_direct, (2, 20, 301), bits, col_scale="batch")
        yield case("coded_adam_direct_with_norms_", coded_adam_direct, (2, 20, 301), bits, col_scale="batch")
        yield case("coded_adam_dense_", coded_adam_dense, (20, 301), BF16, BF16, bits, rounding=True)
        yield case("quantize_rows", quantize_rows, (20, 301), bits=bits, signed=False, turn=3)
        yield case("quantize_rows", quantize_rows, (20, 301), BF16, bits, block=64, fill="nonfinite")
        yield case("dequantize_rows", dequantize_rows, (20, 301), BF16, bits)
        yield case("pack_basis", pack_basis, (20, 33), bits=bits)
        yield case("unpack_basis", unpack_basis, (20, 33), bits=bits)
    yield case("gaussian_", gaussian, (20, 33))
    for dtype, columns in ((F32, torch.int32), (BF16, torch.int16)):
        yield case("sltrain_forward", sltrain_forward, (70,), 20, 33, 3, dtype, columns=columns)
        yield case("sltrain_backward_input", sltrain_backward_input, (70,), 20, 33, 3, dtype, columns=columns)
        yield case("sampled_product", sampled_product, (70,), 20, 33, dtype, columns=columns)
    yield case("thin_grams", thin_grams, (70, 150), 3)
    yield case("pair_step_", pair_step, (70, 150), 16)
    yield case("thin_turn_", thin_turn, (70, 150), 5)
    yield case("inverse_power", inverse_power, (5,), 6, True, shift=True)
    yield case("rite_step_", rite_step, (70, 150), 4)
