"""Triton kernels beyond the cases of `op_cases`, under the interpreter: TRITON_INTERPRET=1 has to be set before triton is imported.

`test_triton` runs this file, and the op suite, in processes of their own.
"""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: test_triton runs this file", allow_module_level=True)

import triton
import triton.language as tl

from lowrank_optim.kernels import arguments, dispatch, reference
from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.counter_rng import make_key, random_bits
from lowrank_optim.kernels.triton import arithmetic, launching, products
from tests.kernels.test_cuda import CODINGS, between_levels, one_step

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOADED = dispatch.backends()["triton"]
OPS = LOADED.operations if isinstance(LOADED, dispatch.Loaded) else {}


def draw(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def test_the_backend_is_interpreted_and_serves_cpu_tensors():
    assert isinstance(LOADED, dispatch.Loaded)
    assert LOADED.devices == {"cpu"}
    assert "interpreted" in LOADED.about
    left = {"adam_direct_with_norms_", "coded_adam_direct_with_norms_"}  # to their definitions: the others, then norms
    left |= {"thin_grams", "pair_step_", "thin_turn_", "inverse_power", "rite_step_"}  # of pairs, on the CPU only
    assert set(OPS) == set(dispatch._DEFINITIONS) - left


# ----------------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit(do_not_specialize=["key"])
def bits_kernel(positions_ptr, out_ptr, key: tl.int64, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, arithmetic.random_bits(key, tl.load(positions_ptr + at)).to(tl.int64))


@pytest.mark.parametrize("key", [0, 1, 2**31 - 1, 2**32, 2**63, 2**64 - 1, make_key(7, 3, 11, 2)])
def test_random_bits_are_those_of_the_definition(key):
    # (No key from 2³¹ to 2³²: the interpreter takes such an argument for a 32-bit one, whatever its annotation says.)
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1])
    positions = torch.cat([edges, torch.arange(55) * 123_456_789_012_345])
    out = torch.empty(64, dtype=torch.int64)
    words = arguments.pack_key(key)
    assert words is not None
    bits_kernel[(1,)](positions, out, words.item(), N=64)
    assert torch.equal(out, random_bits(key, positions))


@triton.jit
def convert_kernel(x_ptr, bf16_ptr, back_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    value = arithmetic.to_bfloat16(tl.load(x_ptr + at))
    tl.store(bf16_ptr + at, value)
    tl.store(back_ptr + at, arithmetic.widen(value))


def test_conversions_to_bfloat16_and_back_are_torchs():
    x = torch.cat(
        [
            draw(1, 4000) * 10.0 ** torch.arange(-40, 40).repeat(50).float(),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45, 9.2e-41, 1.00390625, 1.01171875]),
            torch.tensor([0x7F800001, -1], dtype=torch.int32).view(F32),
        ]
    )
    x = torch.nn.functional.pad(x, (0, 4096 - x.numel()))
    narrow, back = torch.empty(4096, dtype=BF16), torch.empty(4096)
    convert_kernel[(1,)](x, narrow, back, N=4096)
    nan = x.isnan()
    assert torch.equal(narrow[~nan], x.to(BF16)[~nan])
    assert narrow[nan].isnan().all()
    assert torch.equal(back[~nan], narrow.float()[~nan])


# ---------------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(("bits", "signed"), CODINGS)
def test_noise_decides_as_in_the_definition_to_the_last_bit(bits, signed):
    for turn in (0, 3):
        args = between_levels(bits, signed, turn)
        want = dispatch._DEFINITIONS["quantize_rows"](*args)
        for expected, got in zip(want, OPS["quantize_rows"](*args), strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_codes_as_the_definition_to_the_last_bit(bits):
    for start in (0, 7):
        want, got = one_step(bits, start), one_step(bits, start)
        dispatch._DEFINITIONS["coded_adam_direct_"](*want)
        OPS["coded_adam_direct_"](*got)
        for expected, found in zip(want[1:5], got[1:5], strict=True):
            assert torch.equal(expected, found)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [1, 3, 255])
def test_only_blocks_start_in_the_middle_of_a_word_of_noise(block, bits):
    """Rows, and the matrix, start at even positions."""
    args = made.quantize_rows((5, 300), bits=bits, block=block, turn=3, start=2)
    want = dispatch._DEFINITIONS["quantize_rows"](*args)
    for expected, got in zip(want, OPS["quantize_rows"](*args), strict=True):
        assert torch.equal(expected, got)


# ------------------------------------------------------------------------------------------------------------------- products


def relative_error(found: Tensor, left: Tensor, right: Tensor) -> float:
    """Error of a product, relative to the products of the magnitudes."""
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    return float(((found.double() - exact).abs() / size).max())


@pytest.mark.parametrize(
    ("setting", "low", "high"), [("highest", 0.0, 2**-18), ("high", 0.0, 2**-18), ("medium", 2**-14, 2**-9)]
)
def test_project_of_bfloat16_gradients_is_as_accurate_as_asked_for(setting, low, high):
    grad, basis = draw(1, 70, 900, dtype=BF16), draw(2, 900, 40)
    torch.set_float32_matmul_precision(setting)
    try:
        error = relative_error(OPS["project"](grad, basis, True), grad, basis)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert low <= error <= high


@pytest.mark.parametrize(("setting", "low", "high"), [("highest", 0.0, 2**-17), ("medium", 2**-14, 2**-8)])
def test_apply_to_16_bit_weights_is_as_accurate_as_asked_for(setting, low, high):
    left, right = draw(1, 70, 40), draw(2, 90, 40).mT
    weight = torch.zeros(70, 90, dtype=F16)  # 11 bits
    torch.set_float32_matmul_precision(setting)
    try:
        OPS["apply_"](weight, left, right, arguments.pack_scalars(-1.0, 1.0), *(None,) * 7, False)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    error = float((((weight.double() - exact).abs() - exact.abs() * 2.0**-11).clamp_min(0) / size).max())
    assert low <= error <= high


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("right", [True, False])
def test_projections_split_along_the_contracted_side_add_up(right, dtype, monkeypatch):
    shape = (20, 5000) if right else (5000, 20)
    grad, basis = draw(1, *shape, dtype=dtype), draw(2, 5000, 3)
    grids = []
    launch = launching.launch

    def watched(kernel, grid, *args, **options):
        grids.append(grid)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(products, "launch", watched)
    reduced, squares = OPS["project_with_norms"](grad, basis, right)
    assert grids[-1][1] > 4
    oriented = grad if right else grad.mT
    assert relative_error(reduced, oriented, basis) < 2**-17
    torch.testing.assert_close(squares, oriented.double().square().sum(1, keepdim=True).float(), rtol=1e-5, atol=0)


def test_a_basis_is_split_in_its_own_order_of_storage():
    x = draw(1, 3, 5, 7)
    for tensor in (x, x.mT, x[:, ::2]):
        high, low = products.halves(tensor)
        assert high is not None
        assert low is not None
        assert high.shape == tensor.shape
        assert tensor is not x.mT or high.stride() == tensor.stride()
        torch.testing.assert_close(high.float() + low.float(), tensor, rtol=2**-17, atol=0)


# ---------------------------------------------------------------------------------------------------------------- far offsets


@pytest.fixture
def far(monkeypatch):
    """A function that spreads a matrix over more than 2³¹ elements of memory that is never touched in between."""
    from triton.runtime import interpreter

    # The interpreter would copy whole storages onto themselves.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def spread(matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        step = (2**31 + 2**20) // (rows - 1)
        try:
            memory = torch.empty(step * (rows - 1) + cols, dtype=matrix.dtype)
        except RuntimeError:
            pytest.skip("no address space for 2³¹ elements")
        return memory.as_strided((rows, cols), (step, 1)).copy_(matrix)

    return spread


def test_offsets_beyond_32_bits(far):
    weight, grad = draw(1, 5, 40, dtype=BF16), draw(2, 5, 40, dtype=BF16)
    left, right, phi = draw(3, 5, 4), draw(4, 4, 40), draw(5, 5, 1)
    expected = weight.clone()
    rounding = arguments.pack_key(make_key(1, 2, 3, 2), 2**31 - 50)
    options = (arguments.pack_scalars(0.1, 0.9), None, None, rounding)
    dispatch._DEFINITIONS["apply_"](expected, left, right, *options, grad, phi, None, None, False)
    there = far(weight)
    OPS["apply_"](there, left, right, *options, far(grad), phi, None, None, False)
    assert (there != expected).sum() <= 1  # a value on the edge between two bfloat16

    basis = draw(6, 40, 3)
    torch.testing.assert_close(
        OPS["project"](far(grad), basis, True), reference.project(grad, basis, True), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        OPS["project"](far(grad), basis[:5], False), reference.project(grad, basis[:5], False), rtol=1e-4, atol=1e-4
    )

    value = draw(7, 5, 40)
    near, away = torch.zeros(5, 40, dtype=BF16), far(torch.zeros(5, 40, dtype=BF16))
    OPS["stochastic_round_"](near, value, rounding)
    OPS["stochastic_round_"](away, value, rounding)
    assert torch.equal(near, away)


def test_tiles_of_wide_strides_use_64_bit_offsets_within():
    """Rows 2²⁵ elements apart: the last of a tile's 128 is beyond 2³¹ from its first."""
    assert 128 * 2**25 >= 2**31
    seen = []
    launching.record(lambda kernel, grid, args, options: seen.append(options))
    try:
        for step in (2**12, 2**25):
            weight = torch.empty(step + 40, dtype=BF16).as_strided((2, 40), (step, 1))
            OPS["apply_"](weight, draw(1, 2, 3), draw(2, 3, 40), arguments.pack_scalars(0.1, 0.9), *(None,) * 7, False)
    finally:
        launching.record(None)
    wide = [options["WIDE"] for options in seen if "WIDE" in options]
    assert wide == [False, True]


# ------------------------------------------------------------------------------------------------------------- whole optimizers


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("GaLoreAdamW", {}),
        ("GaLoreAdamW", {"state_bits": 8}),
        ("FiraAdamW", {}),
        ("FrugalAdamW", {"projector": "randomized_svd"}),
        ("APOLLOAdamW", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_optimizers_take_the_steps_that_they_take_with_the_definitions(method, options, dtype, monkeypatch):
    import lowrank_optim as lo

    def run(backend: str) -> Tensor:
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        weight = torch.nn.Parameter(draw(1, 70, 90, dtype=dtype))
        optimizer = getattr(lo, method)([{"params": [weight], "rank": 8}], lr=1e-2, update_proj_gap=3, **options)
        for step in range(4):
            weight.grad = draw(10 + step, 70, 90, dtype=dtype)
            optimizer.step()
        return weight.detach().float()

    found, expected, before = run("triton"), run("reference"), draw(1, 70, 90, dtype=dtype).float()
    assert float((expected - before).norm()) > 1e-3
    assert float((found - expected).norm()) < 0.02 * float((expected - before).norm())
