"""Quantised state: row-block codes of moments, packed bases. Compared with float64 loops over blocks that share no code with them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import make_key
from lowrank_optim.quantization import (
    MomentCodes,
    column_scale,
    decode_moments,
    dequantize_rows,
    encode_moments,
    pack_basis,
    pack_nibbles,
    packed_basis_bytes,
    quantize_rows,
    quantized_bytes,
    quantized_shapes,
    unpack_basis,
    unpack_nibbles,
    zero_rows,
)

SHAPES = [(33, 256), (20, 257), (7, 700), (1, 513), (5, 3), (4, 1), (3, 11, 300), (2, 2, 5, 40), (777,), (3,)]
KINDS = [(8, True), (8, False), (4, True), (4, False)]
LEVELS = {(8, True): 127, (4, True): 7, (8, False): 256, (4, False): 16}
KEY = make_key(0, 1, 2, 3)


def matrix(shape: tuple[int, ...], signed: bool = True, seed: int = 0) -> Tensor:
    """Magnitudes over a few decades within a row, and over many between rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).mul_(4.0).exp()
    if len(shape) > 1:
        x *= torch.logspace(-6, 6, shape[-2]).unsqueeze(-1)
    return x if signed else x.abs()


def round_trip(x: Tensor, bits: int, signed: bool, **options: object) -> Tensor:
    """Coded and decoded."""
    codes, scale = quantize_rows(x, bits, signed, **options)
    keep = {name: value for name, value in options.items() if name in ("block", "col_scale")}
    return dequantize_rows(codes, scale, bits, signed, cols=x.shape[-1], **keep)


def slow_rows(x: np.ndarray, bits: int, signed: bool, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and scales, element by element in float64."""
    levels, rows = LEVELS[bits, signed], x.reshape(-1, x.shape[-1]).astype(np.float64)
    out = np.zeros(rows.shape, np.int64)
    scales = []
    for i, row in enumerate(rows):
        for first in range(0, len(row), block):
            part = row[first : first + block]
            scale = np.abs(part).max()
            scales.append(scale)
            for j, value in enumerate(part):
                level = np.rint(value / scale * levels) if scale > 0 else 0.0
                out[i, first + j] = np.clip(level, -levels if signed else 1, levels)
    return out.reshape(x.shape), np.array(scales).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(("bits", "signed"), KINDS)
@pytest.mark.parametrize("block", [256, 64, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_agree_with_a_loop_over_blocks(shape: tuple[int, ...], block: int, bits: int, signed: bool) -> None:
    x = matrix(shape, signed)
    levels, scales = slow_rows(x.numpy(), bits, signed, block)
    codes, scale = quantize_rows(x, bits, signed, block=block)
    assert (codes.shape, scale.shape) == quantized_shapes(shape, bits, block)
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), scales.astype(np.float32))
    decoded = dequantize_rows(codes, scale, bits, signed, cols=shape[-1], block=block)
    wide = np.repeat(scales, block, -1)[..., : shape[-1]]
    expected = levels / LEVELS[bits, signed] * wide
    # A value within a rounding error of the middle between two levels may go either way.
    difference = np.abs(decoded.numpy() - expected)
    assert (difference > 1e-6 * wide).mean() < 1e-3
    lowest = 0.0 if signed else 1.0
    bound = np.where(np.abs(x.numpy()) * LEVELS[bits, signed] < 0.5 * lowest * wide, 1.0, 0.5)
    assert (np.abs(decoded.numpy() - x.numpy()) <= (bound + 1e-4) / LEVELS[bits, signed] * wide).all()


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(("bits", "signed"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_a_decoded_matrix_changes_nothing(
    shape: tuple[int, ...], bits: int, signed: bool, key: int | None
) -> None:
    for seed in range(5):
        columns = torch.randint(-12, 12, shape[-1:]).float().exp2()
        codes, scale = quantize_rows(matrix(shape, signed, seed), bits, signed, col_scale=columns, key=key)
        decoded = dequantize_rows(codes, scale, bits, signed, cols=shape[-1], col_scale=columns)
        again = quantize_rows(decoded, bits, signed, col_scale=columns, key=None if key is None else key + seed)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scale)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_leaves_every_one_of_a_million_decoded_values_alone(signed: bool) -> None:
    codes, scale = quantize_rows(matrix((2000, 512), signed), 8, signed)
    decoded = dequantize_rows(codes, scale, 8, signed)
    for turn in range(3):
        assert torch.equal(quantize_rows(decoded, 8, signed, key=KEY, turn=turn)[0], codes)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_a_shard_of_rows_is_coded_as_in_the_whole_matrix(bits: int, signed: bool, key: int | None) -> None:
    x = matrix((3, 11, 301), signed)
    codes, scale = quantize_rows(x, bits, signed, key=key)
    for e in range(3):
        for rows in (slice(0, 4), slice(4, 5), slice(5, 11), slice(3, 3)):
            start = (e * 11 + rows.start) * 301
            part = quantize_rows(x[e, rows], bits, signed, key=key, start=start)
            assert torch.equal(part[0], codes[e, rows])
            assert torch.equal(part[1], scale[e, rows])


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_large_matrices_are_coded_as_their_rows(bits: int, signed: bool) -> None:
    x = matrix((5000, 500), signed)  # more elements than one pass takes
    codes, scale = quantize_rows(x, bits, signed, key=KEY, col_scale=torch.linspace(0.5, 3.0, 500))
    for row in (0, 2097, 2098, 4999):
        part = quantize_rows(x[row], bits, signed, key=KEY, col_scale=torch.linspace(0.5, 3.0, 500), start=row * 500)
        assert torch.equal(part[0], codes[row])
        assert torch.equal(part[1], scale[row])


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_stochastic_codes_are_right_in_expectation(bits: int, signed: bool) -> None:
    levels, copies = LEVELS[bits, signed], 200_000
    # Fractions of a level, the last element being the largest of its block.
    row = torch.tensor([1.0, 1.03, 1.5, 2.2, 3.999, 5.75, levels]) / levels
    row = torch.cat([-row[:-1], row]) if signed else row
    x = row.expand(copies, -1)
    decoded = round_trip(x, bits, signed, key=KEY)
    fraction = (row.double() * levels + 1e-5) % 1.0
    deviation = (fraction * (1.0 - fraction)).sqrt() / levels
    assert ((decoded.mean(0) - row).abs() <= 4.5 * deviation / math.sqrt(copies) + 1e-6).all()
    chance = fraction > 1e-3  # elements that lie on no level
    assert (decoded.std(0)[chance] > 0.9 * deviation[chance]).all()
    assert not decoded.std(0)[~chance].any()
    assert (decoded - row).abs().max() < 1.0 / levels


def test_stochastic_codes_depend_on_the_key_and_nothing_else() -> None:
    x = matrix((40, 100))
    first, again, other = (quantize_rows(x, 8, True, key=key)[0] for key in (KEY, KEY, KEY + 1))
    assert torch.equal(first, again)
    assert 0.1 < (first != other).float().mean() < 0.9


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_zero_blocks_decode_to_zero_and_unsigned_levels_never_do(bits: int, signed: bool) -> None:
    x = torch.zeros(4, 600)
    x[1, 300] = 1.0
    for key in (None, KEY):
        decoded = round_trip(x, bits, signed, key=key)
        assert not decoded[[0, 2, 3]].any()
        assert not decoded[1, :256].any()
        assert decoded[1, 300] == 1.0
        assert (decoded[1, 256:512] > 0).all() != signed
    codes, scale = zero_rows((4, 600), bits, signed)
    made = quantize_rows(torch.zeros(4, 600), bits, signed)
    assert not dequantize_rows(codes, scale, bits, signed, cols=600).any()
    assert codes.dtype == made[0].dtype
    assert torch.equal(scale, made[1])
    if signed:  # unsigned ones may hold anything where the scale is 0
        assert torch.equal(codes, made[0])


@pytest.mark.parametrize(("bits", "signed"), KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 300), (0, 0)])
def test_empty_matrices_stay_empty(shape: tuple[int, ...], bits: int, signed: bool) -> None:
    assert round_trip(torch.empty(shape), bits, signed, key=KEY).shape == shape


@pytest.mark.parametrize(("bits", "signed"), KINDS)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-29, 1e-31, 1e-38, 1e-42, 1.4e-45])
def test_magnitudes_at_the_ends_of_float32_neither_overflow_nor_divide_by_zero(
    size: float, bits: int, signed: bool
) -> None:
    x = torch.linspace(0.01, 1.0, 500).mul_(size).repeat(2, 1)
    decoded = round_trip(x, bits, signed)
    assert torch.isfinite(decoded).all()
    if size > 2.0**-100:
        assert (decoded - x).abs().max() <= size / LEVELS[bits, signed]
    else:
        assert not decoded.any()


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_a_non_finite_element_shows_in_its_block_and_only_there(
    bits: int, signed: bool, bad: float, key: int | None
) -> None:
    x = matrix((3, 600), signed)
    x[1, 300] = bad
    decoded = round_trip(x, bits, signed, key=key)
    clean = round_trip(torch.where(torch.isfinite(x), x, 0.0), bits, signed, key=key)
    assert torch.isnan(decoded[1, 256:512]).all()
    decoded[1, 256:512] = clean[1, 256:512]
    assert torch.equal(decoded, clean)


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_column_scales_take_the_columns_apart(bits: int, signed: bool) -> None:
    columns = torch.logspace(0, -6, 100)
    x = matrix((50, 100), signed).div_(torch.logspace(-6, 6, 50).unsqueeze(1)) * columns
    plain = round_trip(x, bits, signed)
    scaled = round_trip(x, bits, signed, col_scale=columns)
    even = round_trip(x / columns, bits, signed) * columns
    torch.testing.assert_close(scaled, even, rtol=1e-6, atol=0.0)
    error = [((y - x) / columns).norm() / (x / columns).norm() for y in (plain, scaled)]
    assert error[1] < 0.25 * error[0]


def test_experts_have_column_scales_of_their_own() -> None:
    x, columns = matrix((3, 3600, 100)), torch.rand(3, 1, 100) + 0.5  # more elements than one pass takes
    codes, scale = quantize_rows(x, 8, True, col_scale=columns)
    for e in range(3):
        part = quantize_rows(x[e], 8, True, col_scale=columns[e, 0])
        assert torch.equal(part[0], codes[e])
        assert torch.equal(part[1], scale[e])
    torch.testing.assert_close(
        dequantize_rows(codes, scale, 8, True, col_scale=columns)[1],
        dequantize_rows(codes[1], scale[1], 8, True, col_scale=columns[1]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_coded_as_float32(dtype: torch.dtype) -> None:
    x = matrix((9, 300)).to(dtype)
    codes, scale = quantize_rows(x, 8, True)
    expected = quantize_rows(x.float(), 8, True)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    decoded = dequantize_rows(codes, scale, 8, True, dtype=dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, dequantize_rows(codes, scale, 8, True).to(dtype))


def test_strided_inputs_are_coded_as_their_copies() -> None:
    x = matrix((300, 40)).mT
    for got, expected in zip(quantize_rows(x, 4, key=KEY), quantize_rows(x.contiguous(), 4, key=KEY), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(100, 256), (7, 257), (3, 5, 33), (1000,)])
def test_bytes_are_those_of_the_tensors(shape: tuple[int, ...], bits: int) -> None:
    for signed in (True, False):
        made = quantize_rows(torch.ones(shape), bits, signed)
        assert quantized_bytes(shape, bits) == sum(t.numel() * t.element_size() for t in made)
    assert quantized_bytes((4096, 256), 8) == 4096 * (256 + 4)
    assert quantized_bytes((4096, 257), 4) == 4096 * (129 + 8)
    if len(shape) > 1:
        packed = pack_basis(torch.ones(shape), bits)
        assert packed_basis_bytes(shape, bits) == sum(t.numel() * t.element_size() for t in packed)
    assert packed_basis_bytes((4096, 257), 4) == 4096 * (129 + 16)


def test_wrong_arguments_say_what_is_right() -> None:
    x = torch.ones(4, 10)
    with pytest.raises(ValueError, match="bits is 2; valid values are 8 and 4"):
        quantize_rows(x, 2)
    with pytest.raises(ValueError, match="block is 0"):
        quantize_rows(x, 8, block=0)
    with pytest.raises(ValueError, match="0-d"):
        quantize_rows(torch.tensor(1.0))
    codes, scale = quantize_rows(x, 8, True)
    with pytest.raises(ValueError, match=r"expected \(4, 10\) torch.uint8"):
        dequantize_rows(codes, scale, 8, False)
    with pytest.raises(ValueError, match=r"expected \(4, 10\) torch.int8 and \(4, 3\)"):
        dequantize_rows(codes, scale, 8, True, block=4)
    with pytest.raises(ValueError, match="hold 3 columns"):
        dequantize_rows(*quantize_rows(x, 4), 4, cols=3)
    with pytest.raises(ValueError, match="matrix"):
        pack_basis(torch.ones(4))
    with pytest.raises(ValueError, match="bits is 3"):
        pack_basis(x, 3)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_basis(*pack_basis(x, 8), 8, 4)


def test_nibbles_lie_two_in_a_byte_the_even_column_low() -> None:
    codes = torch.randint(0, 16, (3, 4, 7), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, 4, 4)
    assert torch.equal(packed[..., 0], codes[..., 0] + 16 * codes[..., 1])
    assert torch.equal(packed[..., 3], codes[..., 6])
    assert torch.equal(unpack_nibbles(packed, 7), codes)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes[..., :6]), 6), codes[..., :6])
    with pytest.raises(ValueError, match="4 bytes"):
        unpack_nibbles(packed, 9)


@pytest.mark.parametrize(("bits", "signed"), KINDS)
def test_turns_round_up_as_often_as_they_should_for_every_element(bits: int, signed: bool) -> None:
    levels, turns = LEVELS[bits, signed], 2000
    row = torch.tensor([1.01, 1.13, 2.5, 3.875, levels]) / levels
    x = row.expand(50, -1).contiguous()
    up, early = torch.zeros_like(x), torch.zeros_like(x)
    for turn in range(turns):
        decoded = round_trip(x, bits, signed, key=KEY, turn=turn)
        up += decoded * levels - (row * levels + 1e-4).floor()
        early += (decoded > x + 1e-6) if turn < 10 else 0.0
    fraction = (row * levels + 1e-4) % 1.0
    # Independent draws would be off by √(turns · f(1 − f)), 22 for f = ½.
    assert (up - turns * fraction).abs().max() < 6.0
    assert 0.0 < (early[:, 2] / 10).std() < 0.1  # the phases of the rows differ


def test_a_second_moment_that_decays_is_followed_by_its_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(64, 64, generator=generator).add_(0.5)
    start[:, 0] = 4.0
    hold = start[:, :1].clone()  # an element that stays, so that the scale does

    def follow(key: int | None) -> Tensor:
        v = start.clone()
        for turn in range(1, 701):
            v.mul_(0.999)
            v[:, :1] = hold
            codes = encode_moments(torch.zeros_like(v), v, 8, key=key, turn=turn)
            v = decode_moments(codes, 8)[1]
        return v[:, 1:].sqrt()

    exact = start[:, 1:].mul(0.999**700).sqrt()
    assert ((follow(KEY) - exact) / exact).abs().mean() < 0.02
    assert ((follow(None) - exact) / exact).min() > 0.35  # nearest: nothing has moved


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("columns", [None, torch.logspace(0, -2, 300)])
def test_moments_keep_the_direction(columns: Tensor | None, bits: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    profile = torch.ones(300) if columns is None else columns
    root = torch.rand(40, 300, generator=generator).add_(0.3) * profile * torch.logspace(-12, 3, 40).unsqueeze(1)
    m = torch.randn(40, 300, generator=generator) * root * 0.3
    codes = encode_moments(m, root.square(), bits, col_scale=columns, key=KEY, turn=3)
    assert isinstance(codes, MomentCodes)
    assert sum(t.numel() * t.element_size() for t in codes) == 2 * quantized_bytes((40, 300), bits)
    back_m, back_v = decode_moments(codes, bits, col_scale=columns)
    exact = m / root
    error = (back_m / back_v.sqrt() - exact).norm() / exact.norm()
    assert error < bound
    assert ((back_v.sqrt() - root) / root).abs().max() < 5.0 * bound
    for got, expected in zip(codes, quantize_rows(exact, bits) + codes[2:], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_moments_and_empty_ones_decode_to_themselves(bits: int) -> None:
    v = torch.zeros(3, 301)
    v[1, 5] = 1e-12
    m = torch.zeros(3, 301)
    m[0] = 1e-30  # v underflowed here
    back_m, back_v = decode_moments(encode_moments(m, v, bits, key=KEY, turn=1), bits, cols=301)
    assert not back_m.any()
    assert not back_v[[0, 2]].any()
    assert back_v[1, 5] == pytest.approx(1e-12)
    assert decode_moments(encode_moments(m[:0], v[:0], bits), bits, cols=301)[1].shape == (0, 301)


def test_moments_of_a_shard_are_those_of_the_whole_matrix() -> None:
    m, v = matrix((11, 301)), matrix((11, 301), seed=1).square()
    whole = encode_moments(m, v, 4, key=KEY, turn=5)
    for part, tensor in zip(encode_moments(m[4:9], v[4:9], 4, key=KEY, turn=5, start=4 * 301), whole, strict=True):
        assert torch.equal(part, tensor[4:9])


def test_column_scales_are_eighth_roots_to_three_digits() -> None:
    sums = matrix((2, 50, 30)).double().pow(8).sum(-2, keepdim=True) * torch.logspace(0, -24, 30, dtype=torch.float64)
    expected = sums ** (1 / 8) / sums.amax(-1, keepdim=True) ** (1 / 8)
    assert expected.min() < 1e-2
    found = column_scale(sums)
    assert found.shape == (2, 1, 30)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=0)
    assert torch.equal(found, found.bfloat16().float())  # so that the order of sums makes no difference
    assert torch.equal(column_scale(sums * (1 + 1e-12)), found)
    for size in (1e-70, 1e70):
        assert torch.equal(column_scale(sums * size), found)
    sums[0, :, 3] = 0.0
    assert column_scale(sums)[0, 0, 3] == 2.0**-20
    assert torch.equal(column_scale(torch.zeros(1, 5)), torch.ones(1, 5))
    assert torch.equal(column_scale(torch.full((1, 5), torch.inf)), torch.ones(1, 5))
    assert column_scale(torch.zeros(1, 0)).shape == (1, 0)


def slow_basis(basis: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Decoded values and half of their step, group by group in float64."""
    rows = basis.reshape(-1, basis.shape[-1]).astype(np.float64)
    decoded, half = np.empty_like(rows), np.empty_like(rows)
    for i, row in enumerate(rows):
        for first in range(0, len(row), group):
            part = row[first : first + group]
            step = (part.max() - part.min()) / (2**bits - 1)
            code = np.rint((part - part.min()) / step) if step > 0 else 0.0 * part
            decoded[i, first : first + group] = part.min() + code * step
            half[i, first : first + group] = step / 2
    return decoded.reshape(basis.shape), half.reshape(basis.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [256, 16, 5])
@pytest.mark.parametrize("shape", [(300, 64), (40, 256), (9, 301), (20, 1), (3, 50, 33), (2, 600)])
def test_bases_agree_with_a_loop_over_groups(shape: tuple[int, ...], group: int, bits: int) -> None:
    basis = torch.linalg.qr(torch.randn(shape))[0] if shape[-2] >= shape[-1] else torch.randn(shape)
    codes, scale, zero = pack_basis(basis, bits, group)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    decoded = unpack_basis(codes, scale, zero, bits, group, cols=shape[-1])
    expected, half = slow_basis(basis.numpy(), bits, group)
    assert (np.abs(decoded.numpy() - expected) > 1e-5 * half + 1e-6).mean() < 1e-3
    assert (np.abs(decoded.numpy() - basis.numpy()) <= half * 1.001 + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (-1.1, -0.9), (5.0, 5.5), (-1.0, 2.0)])
def test_groups_that_do_not_straddle_zero_keep_their_values(low: float, high: float, bits: int) -> None:
    basis = torch.linspace(low, high, 600).view(2, 300)
    decoded = unpack_basis(*pack_basis(basis, bits), bits)
    assert (decoded - basis).abs().max() <= 0.5 * (high - low) / (2**bits - 1) * 1.001


def test_bases_follow_the_reference_vector_of_the_paper_s_code_up_to_the_zero_point() -> None:
    basis = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.75, 1.0, 1.5, 2.0]])
    codes, scale, zero = pack_basis(basis, 8)
    assert scale.item() == pytest.approx(0.0117647, abs=1e-7)
    assert zero.item() == -1.0
    expected = torch.tensor([[0, 42, 85, 106, 149, 170, 212, 255]])
    assert (codes - expected).abs().max() <= 1
    codes, scale, zero = pack_basis(basis, 4)
    assert unpack_nibbles(codes, 8)[0, [0, 2, 5, 7]].tolist() == [0, 5, 10, 15]
    torch.testing.assert_close(unpack_basis(codes, scale, zero, 4)[0, [0, 2, 5, 7]], basis[0, [0, 2, 5, 7]])


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_basis_are_packed_alone(bits: int) -> None:
    basis = torch.randn(2, 11, 301)
    whole = pack_basis(basis, bits)
    for e in range(2):
        for rows in (slice(0, 4), slice(4, 5), slice(5, 11), slice(2, 2)):
            for part, tensor in zip(pack_basis(basis[e, rows], bits), whole, strict=True):
                assert torch.equal(part, tensor[e, rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_and_degenerate_groups(bits: int) -> None:
    basis = torch.zeros(6, 300)
    basis[1] = 0.7
    basis[2, :256] = torch.linspace(-1.0, 1.0, 256) * 1.5e38
    basis[2, 256:] = torch.linspace(-1.0, 1.0, 44) * 3e38
    basis[3] = 1e-44
    basis[4, 7] = math.nan
    basis[5, 290] = math.inf
    codes, scale, zero = pack_basis(basis, bits)
    decoded = unpack_basis(codes, scale, zero, bits)
    assert not decoded[0].any()
    assert torch.equal(decoded[1], basis[1])
    assert (decoded[2] - basis[2])[:256].abs().max() <= 1.51e38 / (2**bits - 1)
    assert torch.isnan(decoded[2, 256:]).all()  # a span that float32 does not hold
    assert decoded[3].abs().max() < 1e-43
    assert torch.isnan(decoded[4, :256]).all()
    assert torch.isnan(decoded[5, 256:]).all()
    assert not decoded[4, 256:].any()
    assert not decoded[5, :256].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 300)])
def test_empty_bases_stay_empty(shape: tuple[int, ...], bits: int) -> None:
    assert unpack_basis(*pack_basis(torch.empty(shape), bits), bits, cols=shape[-1]).shape == shape


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.15)])
def test_a_packed_basis_is_close_to_orthonormal(bits: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(1024, 128, generator=generator))[0]
    decoded = unpack_basis(*pack_basis(basis, bits), bits)
    assert torch.linalg.matrix_norm(decoded.mT @ decoded - torch.eye(128), 2) < bound
