"""The counter-based generator: a pure function of key and position whose numbers are as random as the methods need.

Statistical bounds are five standard deviations or more at fixed keys, so nothing here can fail by chance.
"""

import math

import pytest
import torch

from lowrank_optim.kernels import counter_rng
from lowrank_optim.kernels.counter_rng import (
    PURPOSE_BASIS,
    PURPOSE_ROUNDING,
    Stratified,
    choose,
    choose_stratified,
    consecutive_halves,
    gaussian,
    make_key,
    random_bits,
    random_halves,
    random_word,
    uniform,
)

CPU = torch.device("cpu")
KEYS = [make_key(0, 0, 0, PURPOSE_BASIS), make_key(42, 17, 200, PURPOSE_BASIS), make_key(-5, 3, 1, PURPOSE_ROUNDING)]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's coefficient, in units of its standard deviation for independent samples."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    return float(abs(a @ b) / (a.norm() * b.norm())) * math.sqrt(a.numel())


def chi_square(counts: torch.Tensor, expected: float) -> float:
    """Pearson's χ² of `counts` with equal expectations, in standard deviations from its mean."""
    statistic = float(((counts.double() - expected) ** 2 / expected).sum())
    degrees = counts.numel() - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


# ------------------------------------------------------------------------------------------------------------------- the hash


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def scalar_bits(key: int, position: int) -> int:
    """The documented hash on Python integers, which cannot overflow."""
    low, high = key % 2**32, key >> 32
    return mix(mix(position % 2**32 ^ low) ^ (position >> 32) * 0x9E3779B9 % 2**32 ^ high)


@pytest.mark.parametrize("key", KEYS)
def test_tensor_arithmetic_wraps_as_exact_integer_arithmetic_does(key):
    positions = [*range(50), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 3 * 2**40 + 11, 2**62 + 5]
    bits = random_bits(key, torch.tensor(positions))
    assert bits.dtype == torch.int64
    assert bits.tolist() == [scalar_bits(key, position) for position in positions]


def scalar_half(key: int, position: int) -> int:
    """The half of `random_halves` in Python's unbounded integers."""
    pair, word = position >> 1, key ^ key >> 32
    return mix(pair % 2**32 ^ (pair >> 32) * 0x9E3779B9 % 2**32 ^ word % 2**32) >> position % 2 * 16 & 0xFFFF


@pytest.mark.parametrize("key", [*KEYS, 2**64 - 5])
@pytest.mark.parametrize("start", [0, 1, 7, 2**31 - 300, 2**32 - 501, 2**33 - 401, 2**33 - 2, 2**40 + 5])
def test_halves_of_consecutive_positions_are_those_of_the_definition(key, start):
    for count in (0, 1, 2, 3, 511, 512, 1000):
        expected = [scalar_half(key, position) for position in range(start, start + count)]
        assert random_halves(key, torch.arange(start, start + count)).tolist() == expected
        for room in (None, torch.full((2, count // 2 + 512), -7, dtype=torch.int32)):
            halves = consecutive_halves(key, start, count, CPU, room)
            assert halves.dtype == torch.int16
            assert [half % 2**16 for half in halves.tolist()] == expected


def test_streams_do_not_change_between_releases():
    # Checkpoints hold no random bases: a resumed run draws them again, so other numbers here break every such checkpoint.
    assert make_key(0, 0, 0, 1) == 7606012053026511699
    assert make_key(-1, 2**40, 7, 2) == 15489920998596951173
    key = make_key(3, 1, 200, PURPOSE_BASIS)
    assert random_bits(key, torch.tensor([0, 1, 2**33])).tolist() == [4018674701, 3344144201, 4193801634]
    assert choose(key, 1000, 4, CPU).tolist() == [85, 437, 594, 851]
    assert gaussian(key, (3,), CPU).tolist() == pytest.approx([-0.35009095, -0.69326848, 0.10207743], rel=1e-6)


def test_keys_fit_into_64_bits_and_do_not_collide():
    words = (-(2**63), -1, 0, 1, 2, 3, 200, 2**32, 2**63 - 1)
    keys = [make_key(a, b, c, d) for a in words for b in words for c in words for d in (1, 2)]
    assert len(set(keys)) == len(keys)
    assert len({key & 0xFFFFFFFF for key in keys}) == len(keys)  # the halves alone differ, too
    assert all(0 <= key < 2**64 for key in keys)


def test_draws_ignore_and_leave_alone_the_global_generator():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = gaussian(KEYS[0], (7, 5), CPU), uniform(KEYS[0], (9,), CPU), choose(KEYS[0], 50, 5, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = gaussian(KEYS[0], (7, 5), CPU), uniform(KEYS[0], (9,), CPU), choose(KEYS[0], 50, 5, CPU)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_draws_do_not_depend_on_the_default_dtype(dtype):
    plain = gaussian(KEYS[1], (64,), CPU), uniform(KEYS[1], (64,), CPU), choose(KEYS[1], 500, 9, CPU)
    torch.set_default_dtype(dtype)
    try:
        changed = gaussian(KEYS[1], (64,), CPU), uniform(KEYS[1], (64,), CPU), choose(KEYS[1], 500, 9, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain, changed, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_any_slice_of_positions_gives_the_slice_of_the_whole():
    positions = torch.arange(10_000)
    whole = random_bits(KEYS[1], positions)
    pieces = [random_bits(KEYS[1], positions[a:b]) for a, b in ((0, 1), (1, 17), (17, 4096), (4096, 10_000))]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(random_bits(KEYS[1], positions.view(100, 100).t()), whole.view(100, 100).t())
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_bits(KEYS[1], order), whole[order])


def test_positions_are_not_modified():
    positions = torch.arange(2**33, 2**33 + 100)
    random_bits(KEYS[0], positions)
    assert torch.equal(positions, torch.arange(2**33, 2**33 + 100))


@pytest.mark.parametrize("offset", [2**32, 2**33, 2**34 + 2**32, 2**40], ids=hex)
def test_positions_above_32_bits_are_streams_of_their_own(offset):
    low = torch.arange(100_000)
    a, b = random_bits(KEYS[0], low), random_bits(KEYS[0], low + offset)
    assert int((a == b).sum()) <= 1
    assert correlation(a, b) < 5


def flips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each of the 32 bits, the fraction of positions at which it differs."""
    return torch.stack([((a ^ b) >> bit & 1).double().mean() for bit in range(32)])


def test_every_bit_is_fair_and_every_input_bit_flips_every_output_bit_half_of_the_time():
    positions = torch.arange(1 << 16)
    bits = random_bits(KEYS[0], positions)
    tolerance = 5 * 0.5 / 2**8
    assert (flips(bits, torch.zeros_like(bits)) - 0.5).abs().max() < tolerance
    for bit in (0, 1, 7, 15, 16, 31, 32, 40):
        moved = random_bits(KEYS[0], positions ^ (1 << bit))
        # Neighbours come in pairs (i, j), (j, i): half as many independent samples where the partner is in the range, too.
        assert (flips(bits, moved) - 0.5).abs().max() < tolerance * 2**0.5, bit
        other = random_bits(KEYS[0] ^ (1 << bit + 20), positions)
        assert (flips(bits, other) - 0.5).abs().max() < tolerance, bit


BASE = (3, 5, 200, PURPOSE_BASIS)
NEIGHBOURS = {
    "seed": (4, 5, 200, PURPOSE_BASIS),
    "index": (3, 6, 200, PURPOSE_BASIS),
    "step": (3, 5, 201, PURPOSE_BASIS),
    "purpose": (3, 5, 200, PURPOSE_ROUNDING),
    "seed and index exchanged": (5, 3, 200, PURPOSE_BASIS),
    "seed + 2**32": (3 + 2**32, 5, 200, PURPOSE_BASIS),
}


@pytest.mark.parametrize("words", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_streams_of_neighbouring_keys_are_unrelated(words):
    a, b = make_key(*BASE), make_key(*words)
    assert correlation(gaussian(a, (200_000,), CPU), gaussian(b, (200_000,), CPU)) < 5
    positions = torch.arange(1 << 16)
    bits, other = random_bits(a, positions), random_bits(b, positions)
    assert int((bits == other).sum()) <= 1
    # Not the same numbers in another order, either: 2**16 draws out of 2**32 share about one value by chance.
    assert int(torch.isin(bits, other).sum()) < 10


# ---------------------------------------------------------------------------------------------------- uniform and gaussian


@pytest.mark.parametrize("key", KEYS)
def test_uniform_has_the_moments_and_the_histogram_of_the_uniform_distribution(key):
    n = 1 << 20
    draws = uniform(key, (n,), CPU, torch.float64)
    assert abs(float(draws.mean()) - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(draws.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert abs(chi_square(torch.histc(draws.float(), 1024, 0.0, 1.0), n / 1024)) < 5
    pairs = (draws.view(-1, 2) * 32).long()
    assert abs(chi_square(torch.bincount(pairs[:, 0] * 32 + pairs[:, 1], minlength=1024), n / 2 / 1024)) < 5
    for lag in (1, 2, 128, 4096):
        assert correlation(draws[:-lag], draws[lag:]) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_is_never_0_or_1_even_for_the_extreme_bits(dtype, monkeypatch):
    monkeypatch.setattr(
        counter_rng, "random_bits", lambda key, positions: torch.tensor([0, 255, 2**32 - 256, 2**32 - 1])
    )
    draws = uniform(KEYS[0], (4,), CPU, dtype)
    assert float(draws.min()) > 0.0
    assert float(draws.max()) < 1.0


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (2, 3, 4), (0,), (4, 0)], ids=str)
def test_draws_have_the_asked_shape_and_type(shape):
    for dtype in (torch.float32, torch.float64):
        for draw in (gaussian, uniform):
            values = draw(KEYS[0], shape, CPU, dtype)
            assert values.shape == shape
            assert values.dtype == dtype
            assert torch.isfinite(values).all()


@pytest.mark.parametrize("key", KEYS)
def test_gaussian_has_the_moments_and_tails_of_the_normal_distribution(key):
    n = 1 << 20
    draws = gaussian(key, (n,), CPU).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(draws.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    for threshold in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(threshold / math.sqrt(2)) / 2
        for tail in (draws > threshold, draws < -threshold):
            assert abs(int(tail.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1, threshold
    assert 4.5 < float(draws.abs().max()) < 6.5  # of 2**20 draws the largest is near 4.9; 24 bits reach up to 5.9
    uniforms = torch.special.ndtr(draws)
    assert abs(chi_square(torch.histc(uniforms, 256, 0.0, 1.0), n / 256)) < 5


def test_the_two_halves_of_a_gaussian_draw_are_independent():
    # Cosine and sine of one angle share their radius: products and squares must both be uncorrelated.
    a, b = gaussian(KEYS[0], (2, 1 << 19), CPU).double()
    assert correlation(a, b) < 5
    assert correlation(a.square(), b.square()) < 5


def test_gaussian_float32_is_the_rounded_float64_draw():
    assert torch.equal(gaussian(KEYS[2], (4097,), CPU), gaussian(KEYS[2], (4097,), CPU, torch.float64).float())


# ------------------------------------------------------------------------------------------------------- choosing indices

SIZES = [(1, 1), (10, 1), (10, 9), (10, 10), (1000, 37), (4096, 4096), (4097, 128)]


@pytest.mark.parametrize("draw", [choose, choose_stratified])
@pytest.mark.parametrize(("population", "count"), SIZES)
def test_chosen_indices_are_distinct_ascending_and_in_range(draw, population, count):
    for key in KEYS:
        indices = draw(key, population, count, CPU)
        assert indices.dtype == torch.int64
        assert indices.shape == (count,)
        assert bool((indices[1:] > indices[:-1]).all())
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < population
        if count == population:
            assert torch.equal(indices, torch.arange(population))


@pytest.mark.long
@pytest.mark.parametrize("draw", [choose, choose_stratified])
def test_every_index_is_chosen_equally_often(draw):
    population, count, trials = 21, 6, 4000
    chosen = torch.stack([draw(make_key(0, i, 0, PURPOSE_BASIS), population, count, CPU) for i in range(trials)])
    frequency = torch.bincount(chosen.flatten(), minlength=population).double() / trials
    expected = torch.full((population,), count / population, dtype=torch.float64)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / trials).sqrt()).all()


def test_choose_draws_every_pair_of_indices_equally_often():
    population, count, trials = 12, 4, 4000
    hits = torch.zeros(population, population, dtype=torch.float64)
    for i in range(trials):
        picked = choose(make_key(9, i, 0, PURPOSE_BASIS), population, count, CPU)
        hits[picked.unsqueeze(1), picked] += 1
    pairs = hits[~torch.eye(population, dtype=torch.bool)] / trials
    expected = count * (count - 1) / (population * (population - 1))
    assert float((pairs - expected).abs().max()) < 5 * math.sqrt(expected * (1 - expected) / trials)


def test_choose_stratified_spreads_evenly_over_a_large_population():
    population, count = (
        50_257 * 12_288,
        1000,
    )  # more elements than a 2**29 index, far more than could be hashed one by one
    for key in KEYS:
        indices = choose_stratified(key, population, count, CPU)
        # Strata are turned by an offset, so that neighbours lie less than two strata apart, around the circle too.
        gaps = torch.cat([indices[1:], indices[:1] + population]) - indices
        assert int(gaps.max()) < 2 * population / count + 2
        relative = (indices.double() * count / population) % 1.0
        assert abs(float(relative.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / count)


def test_choose_gives_ties_to_the_smaller_index(monkeypatch):
    monkeypatch.setattr(counter_rng, "random_bits", lambda key, positions: torch.tensor([5, 7, 5, 5, 1]))
    assert choose(0, 5, 3, CPU).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("population", "count"), [(48, 9), (1000, 30), (777, 777), (5, 1), (64, 63), (3000, 7), (1, 1)]
)
def test_stratified_gives_any_part_of_the_draw(population, count):
    for seed in range(20):
        key = make_key(seed, 1, 2, 3)
        whole, draw = choose_stratified(key, population, count, CPU), Stratified(key, population, count)
        assert torch.equal(draw.indices(0, count, CPU), whole)
        assert torch.equal(draw.indices(count // 3, count, CPU), whole[count // 3 :])
        assert [draw.below(b) for b in range(population + 1)] == [int((whole < b).sum()) for b in range(population + 1)]


def test_a_random_word_of_the_host_is_that_of_a_tensor():
    positions = [0, 1, 5, 2**31 + 7, 2**32, 2**40 + 3]
    for seed in range(20):
        key = make_key(seed, 1, 2, 3)
        assert [random_word(key, each) for each in positions] == random_bits(key, torch.tensor(positions)).tolist()
