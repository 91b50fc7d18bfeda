"""Error bits: a bfloat16 weight and the one or two bytes beside it, against numbers written out and against the grid in float64."""

import math

import pytest
import torch

from lowrank_optim import kernels
from lowrank_optim.kernels.rounding import WeightError, joined, split_

F32, BF16 = torch.float32, torch.bfloat16

# (float32 number, bfloat16 weight, its error in units of the last bit of float32): ties go away from zero, sums cross exponents.
WRITTEN_OUT = [
    (1.0, 1.0, 0),
    (-1.0, -1.0, 0),
    (1.0 + 2.0**-23, 1.0, 1),
    (1.0 + 2.0**-8, 1.0 + 2.0**-7, -(2**15)),
    (1.0 + 2.0**-7 + 2.0**-8, 1.0 + 2.0**-6, -(2**15)),
    (-1.0 - 2.0**-8, -1.0 - 2.0**-7, -(2**15)),
    (1.0 + 2.0**-8 - 2.0**-23, 1.0, 2**15 - 1),
    (1.0 - 2.0**-24, 1.0, -1),
    (1.0 - 2.0**-9, 1.0, -(2**15)),
    (-(1.0 - 2.0**-10), -1.0, -(2**14)),
    (3.0 + 2.0**-15, 3.0, 2**7),
    (0.0, 0.0, 0),
    (2.0**-149, 0.0, 1),
    (-(2.0**-149) * 300, -0.0, 300),
    (math.inf, math.inf, 0),
    (-math.inf, -math.inf, 0),
    (3.4028234663852886e38, math.inf, -1),
]


def empty(shape: tuple[int, ...], bits: int) -> tuple[torch.Tensor, WeightError]:
    low = torch.full(shape, 77, dtype=torch.uint8) if bits == 16 else None
    return torch.full(shape, 7.0, dtype=BF16), WeightError(torch.full(shape, 77, dtype=torch.int8), low)


def all_kinds(count: int = 1 << 16) -> torch.Tensor:
    """float32 numbers of all exponents, and some of one exponent, NaN left out."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    bits[::2] = bits[::2] & 0x00FFFFFF | 0x3F000000
    return bits.view(F32)[~bits.view(F32).isnan()]


def test_weights_and_errors_are_those_written_out():
    value = torch.tensor([row[0] for row in WRITTEN_OUT], dtype=F32)
    weight, error = empty((len(value),), 16)
    kernels.store_(weight, value, None, error=error)
    expected = torch.tensor([row[1] for row in WRITTEN_OUT], dtype=BF16)
    assert torch.equal(weight.view(torch.int16), expected.view(torch.int16))
    assert error.low is not None
    assert (error.high.int() * 256 + error.low.int()).tolist() == [row[2] for row in WRITTEN_OUT]
    assert torch.equal(joined(weight, error).view(torch.int32), value.view(torch.int32))


def test_sixteen_bits_give_every_float32_back_to_the_bit():
    value = all_kinds()
    weight, error = empty(tuple(value.shape), 16)
    split_(weight, error, value)
    assert torch.equal(joined(weight, error).view(torch.int32), value.view(torch.int32))


def test_the_weight_is_the_nearest_bfloat16():
    value = all_kinds()
    value = value[value.abs() < 3e38]
    tie = torch.arange(value.numel()) % 100 == 0
    value = torch.where(tie, (value.view(torch.int32) & -65536 | 0x8000).view(F32), value)
    weight, error = empty(tuple(value.shape), 16)
    split_(weight, error, value)
    tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], value[~tie].to(BF16))
    lower = (value.view(torch.int32) & -65536).view(F32)  # truncated towards zero
    assert bool((weight[tie].float().abs() > lower[tie].abs()).all())


def test_eight_bits_round_to_sixteen_bits_of_the_fraction_ties_to_even():
    value = all_kinds()
    value = value[(value.abs() < 3e38) & (value.abs() > 1e-37)]
    weight, error = empty(tuple(value.shape), 8)
    split_(weight, error, value)
    fraction, exponent = torch.frexp(value.double())
    expected = torch.ldexp(torch.round(fraction * 2**16), exponent - 16)  # torch.round takes ties to even
    got = joined(weight, error).double()
    assert torch.equal(got, expected)
    assert float(((got - value.double()).abs() / value.double().abs()).max()) <= 2.0**-16
    assert float((weight.double() - value.double()).abs().div(value.double().abs()).max()) > 2.0**-9  # without them


@pytest.mark.parametrize("bits", [8, 16])
def test_a_nan_has_no_error_and_a_weight_set_to_zero_is_near_zero(bits):
    weight, error = empty((3,), bits)
    split_(weight, error, torch.tensor([math.nan, 1.0 - 2.0**-10, -1.0 + 2.0**-12]))
    assert torch.isnan(joined(weight, error)).tolist() == [True, False, False]
    assert (int(error.high[0]), int(error.high[1])) == (0, -64)
    weight.zero_()
    assert bool((joined(weight, error).abs() < 1e-40).all())


def test_what_was_split_is_split_alike_again():
    weight, error = empty((4096,), 8)
    split_(weight, error, all_kinds()[:4096])
    again, rest = empty((4096,), 8)
    split_(again, rest, joined(weight, error))
    assert torch.equal(again.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(rest.high, error.high)


@pytest.mark.parametrize(
    ("weight", "high", "low", "key", "message"),
    [
        (F32, torch.int8, None, None, "bfloat16 weights"),
        (BF16, torch.uint8, None, None, "torch.int8, the weight's shape"),
        (BF16, torch.int8, torch.int8, None, "torch.uint8, the weight's shape"),
        (BF16, torch.int8, None, 5, "without rounding"),
    ],
)
def test_errors_of_other_types_are_refused(weight, high, low, key, message):
    error = WeightError(torch.zeros(4, dtype=high), None if low is None else torch.zeros(4, dtype=low))
    with pytest.raises(ValueError, match=message):
        kernels.apply_dense_(
            torch.ones(4, dtype=weight), torch.ones(4), alpha=1.0, keep=1.0, rounding_key=key, error=error
        )
