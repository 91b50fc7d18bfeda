"""The CUDA backend without a GPU: its sources as plain C++, with loops in place of threads, on the op suite; and nvcc's build."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_optim.kernels import arguments, comparison, dispatch
from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.comparison import answer, compare
from lowrank_optim.kernels.counter_rng import random_halves, turn_offset
from lowrank_optim.kernels.cuda.build import SOURCE, TARGETS, build, build_for_host
from lowrank_optim.kernels.cuda.library import ABI_VERSION, NAME, VARIABLE, Library, open_library
from lowrank_optim.kernels.cuda.operations import operations
from tests.oracles.op_cases import CASES

F32, BF16 = torch.float32, torch.bfloat16
HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return open_library(str(build_for_host(tmp_path_factory.mktemp("cuda"), flags=("-Werror",))))


SPARSE = {"sltrain_forward", "sltrain_backward_input", "sampled_product"}
PAIRS = {"thin_grams", "pair_step_", "thin_turn_", "inverse_power", "rite_step_"}
LEFT = {"project", "project_with_norms", "apply_", *SPARSE, *PAIRS, "folded_adam_dense_"}
"""Left to the definitions: products, which call cuBLAS, sparse ones, those of pairs, and folded moments."""


def test_the_library_does_every_operation_but_those_left_to_definitions(library):
    assert set(operations(library)) == set(CASES) - LEFT


@pytest.mark.parametrize("op", [name for name in CASES if name not in LEFT])
def test_every_operation_gives_what_its_definition_gives(op, library):
    kernel, wrong = operations(library)[op], []
    for case in CASES[op]:
        got, want = answer(kernel, case), answer(dispatch._DEFINITIONS[op], case)
        assert want is not None
        failure = "left to the definition" if got is None else compare(case, got, want).failure
        wrong += [f"{case}: {failure}"] if failure else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@needs_compiler
def test_the_suite_passes_with_the_undefined_behaviour_sanitizer(tmp_path):
    flags = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-g")
    path = build_for_host(tmp_path, flags=flags)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    env = {**os.environ, VARIABLE: str(path), "PYTHONPATH": str(HERE.parents[1])}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "test_backends.py", "-k", "cuda:"], capture_output=True, text=True, cwd=HERE, env=env, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


# ------------------------------------------------------------------------------------------------------------------- last bits


def between_levels(bits: int, signed: bool, turn: int) -> comparison.Arguments:
    """Arguments of `quantize_rows`: numbers within two units in the last place of where their noise decides between two levels."""
    levels, at = {(8, True): 127, (4, True): 7, (8, False): 256, (4, False): 16}[bits, signed], torch.arange(40 * 256)
    half = (random_halves(made.KEY, at) + turn_offset(turn)) & 0xFFFF
    part = (half + 0.5).double() / 2**16 - 0.5
    middle = at % (levels - 2) + (0.5 if signed else 1.5)
    if signed:
        middle[1::2] *= -1
    x = (middle - part * (1 - (middle - part).abs() / 2**19)).float()
    x = (x.view(torch.int32) + (at // 3 % 5 - 2).int()).view(F32).view(40, 256)
    x[:, 0] = levels  # the scale, so that numbers are coded as they are
    return x, None, arguments.pack_key(made.KEY, turn, 0), bits, signed, 256


def one_step(bits: int, start: int) -> list[object]:
    """Arguments of `coded_adam_direct_` with both betas 0: m = g and v = g², in which nothing can be rounded in another order."""
    args = list(made.coded_adam_direct((40, 301), bits, col_scale="shared", start=start))
    args[6] = arguments.pack_scalars(0.0, 0.0, 1e-8, 1.0)
    return args


CODINGS = [(8, True), (4, True), (8, False), (4, False)]


@pytest.mark.parametrize(("bits", "signed"), CODINGS)
def test_noise_decides_as_in_the_definition_to_the_last_bit(bits, signed, library):
    for turn in (0, 3):
        args = between_levels(bits, signed, turn)
        want = dispatch._DEFINITIONS["quantize_rows"](*args)
        assert (want[1] == args[0][:, :1]).all()
        for expected, got in zip(want, operations(library)["quantize_rows"](*args), strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_codes_as_the_definition_to_the_last_bit(bits, library):
    for start in (0, 7):
        want, got = one_step(bits, start), one_step(bits, start)
        dispatch._DEFINITIONS["coded_adam_direct_"](*want)
        operations(library)["coded_adam_direct_"](*got)
        for expected, found in zip(want[1:5], got[1:5], strict=True):
            assert torch.equal(expected, found)


# ---------------------------------------------------------------------------------------------------------- halves, far offsets


def test_float16_conversions_are_torchs(library):
    stored = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ops = operations(library)
    codes, scale = ops["quantize_rows"](stored[:1024].view(4, 256), None, None, 8, True, 256)
    want = dispatch._DEFINITIONS["quantize_rows"](stored[:1024].view(4, 256), None, None, 8, True, 256)
    assert torch.equal(codes, want[0])
    assert torch.equal(scale, want[1])
    edges = stored.float()
    finite = edges[edges.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2  # ties
    beyond = [torch.nextafter(middle, torch.full_like(middle, s)) for s in (torch.inf, -torch.inf)]
    extremes = torch.tensor([65519.0, 65520.0, 65536.0, 1e30, torch.inf, -torch.inf, torch.nan, 1e-9, -1e-9, 2.0**-25])
    for value in (edges, middle, *beyond, extremes):
        target = torch.zeros(value.shape, dtype=torch.float16)
        ops["stochastic_round_"](target, value.contiguous(), None)
        nan = value.isnan()
        assert torch.equal(target[~nan], value.to(torch.float16)[~nan])
        assert target[nan].isnan().all()


def test_offsets_beyond_32_bits(library):
    try:
        memory = torch.empty(2**31 + 2**20, dtype=BF16)
    except RuntimeError:
        pytest.skip("no address space for 2³¹ elements")
    value = made.draw(1, (5, 40))
    far, near = memory.as_strided((5, 40), ((2**31 + 2**19) // 4, 1)), torch.zeros(5, 40, dtype=BF16)
    rounding = made.stochastic_round((1,), start=2**31 - 50)[2]
    for target in (far, near):
        operations(library)["stochastic_round_"](target, value, rounding)
    assert torch.equal(far, near)


# ------------------------------------------------------------------------------------------------------------------ the library


def compiled(folder: Path, source: str) -> str:
    (folder / "other.cpp").write_text(source)
    path = folder / NAME
    subprocess.run(["g++", "-shared", "-fPIC", str(folder / "other.cpp"), "-o", str(path)], check=True)
    return str(path)


@needs_compiler
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('extern "C" int other() { return 0; }', "some other library"),
        ('extern "C" int lowrank_optim_cuda_abi_version() { return 999; }', "ABI number is 999, this version has"),
        (
            f'extern "C" int lowrank_optim_cuda_abi_version() {{ return {ABI_VERSION}; }}',
            f"lacks a function of ABI {ABI_VERSION}",
        ),
    ],
    ids=["foreign", "stale", "incomplete"],
)
def test_a_library_that_is_not_ours_is_reported_and_not_used(source, says, tmp_path):
    with pytest.raises(dispatch.Unavailable, match=says):
        open_library(compiled(tmp_path, source))


def test_a_missing_or_broken_library_is_reported(tmp_path, monkeypatch):
    with pytest.raises(dispatch.Unavailable, match="there is no such file"):
        open_library(str(tmp_path / "nothing.so"))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(dispatch.Unavailable, match="cannot be loaded"):
        open_library(str(tmp_path / "text.so"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("lowrank_optim.kernels.cuda.library.HERE", tmp_path)
    with pytest.raises(dispatch.Unavailable, match="not built"):
        open_library()


@pytest.fixture(scope="module")
def compiled_for_all(tmp_path_factory) -> Path:
    """The library for every target, by nvcc: the one that is installed, unless its sources are newer."""
    installed = HERE.parents[1] / "lowrank_optim" / "kernels" / "cuda" / NAME
    newest = max(path.stat().st_mtime for path in SOURCE.iterdir())
    is_current = installed.exists() and installed.stat().st_mtime > newest
    return installed if is_current else build(tmp_path_factory.mktemp("nvcc"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_for_every_target(compiled_for_all):
    assert compiled_for_all.name == NAME
    image = compiled_for_all.read_bytes()
    for target in TARGETS:
        assert f"sm_{target}".encode() in image
    handle = ctypes.CDLL(str(compiled_for_all))
    assert handle.lowrank_optim_cuda_abi_version() == ABI_VERSION
    library = open_library(str(compiled_for_all))
    assert library.build_info.startswith("nvcc")
    assert not library.on_host


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_no_kernel_spills(compiled_for_all):
    tool = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    command = [tool, "-res-usage", str(compiled_for_all)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", said)
    assert len(stacks) >= len(TARGETS) * 11
    # The sine of float64 has an array for large angles.
    assert not [name for name, stack in stacks if int(stack) and "Gaussian" not in name]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or torch.cuda.is_available(), reason="no nvcc, or a device")
def test_without_a_device_the_backend_says_so_and_a_call_raises(compiled_for_all, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(compiled_for_all))
    from lowrank_optim.kernels import cuda

    with pytest.raises(dispatch.Unavailable, match="no CUDA device"):
        cuda.load()
    library = open_library()
    monkeypatch.setattr(library, "on_host", True)  # keeps torch's stream out of it
    with pytest.raises(RuntimeError, match="CUDA cannot run store"):
        operations(library)["stochastic_round_"](torch.zeros(3, dtype=BF16), torch.zeros(3), None)
