"""A case of an operation, run on a backend, and how far its answer is from the definition's.

`answer` moves the arguments of a case to a device, calls a kernel and collects what it returned and what it changed; `compare` holds
two such answers against each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.rounding import WeightError, joined

HOST = ("scalars", "noise", "rounding", "key", "numbers")
"""Arguments that stay on the CPU."""

ROOM = ("known",)
"""Arguments that a backend may write whatever it likes to."""

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One call of an operation."""

    op: str
    label: str
    make: Callable[[], Arguments]

    def __str__(self) -> str:
        return f"{self.op} {self.label}"


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from the definition's.

    Args:
        relative: error of a float, relative to its magnitude.
        of_largest: and to the largest magnitude of its tensor, for sums that cancel.
        flips: fraction of the codes (or of values rounded stochastically) that may be one step off: a value on the edge between two
            steps goes to either side when its last bit differs.
        roundings: of a result of 16 bits, error in steps of the largest magnitude: parts that one backend rounds and another does not
            may cancel.
    """

    relative: float = 0.0
    of_largest: float = 0.0
    flips: float = 0.0
    roundings: float = 0.0


EXACT = Tolerance()
ERROR_GRID = 2.0**-15
"""Spacing of bfloat16 weights with 8 error bits, as `_grid` says it."""

TOLERANCE = {
    **dict.fromkeys(("quantize_rows", "dequantize_rows", "pack_basis", "unpack_basis", "stochastic_round_"), EXACT),
    **dict.fromkeys(
        ("coded_adam_direct_", "coded_adam_direct_with_norms_", "coded_adam_dense_"), Tolerance(4e-6, 1e-6, 1e-3)
    ),
    **dict.fromkeys(
        ("adam_direct_", "adam_direct_with_norms_", "sgd_direct_", "rmsprop_direct_", "lion_direct_"),
        Tolerance(4e-6, 1e-6),
    ),
    **dict.fromkeys(("adam_dense_", "apply_dense_", "folded_adam_dense_"), Tolerance(4e-6, 1e-6, 1e-2)),
    "apply_": Tolerance(1e-5, 3e-6, 1e-2),
    **dict.fromkeys(("project", "project_with_norms"), Tolerance(1e-5, 3e-6)),
    "gaussian_": Tolerance(2e-7, 1e-12),
    **dict.fromkeys(("sltrain_forward", "sltrain_backward_input", "sampled_product"), Tolerance(1e-5, 3e-6, 1e-2, 1.0)),
    **dict.fromkeys(("thin_grams", "pair_step_", "thin_turn_"), Tolerance(1e-5, 3e-6)),
    "inverse_power": Tolerance(1e-9, 1e-9),
    "rite_step_": Tolerance(1e-5, 1e-5),
}
"""By operation, for one that is rounded in float32 throughout but in another order, or with fused multiply-adds."""


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device, with the same strides and offset into its storage."""
    if str(device) == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.as_strided(tensor, (size,), (1,), 0).to(device)
    return torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, or the tensors of a list, on the device; other arguments as they are."""
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return to_device(value, device) if isinstance(value, Tensor) else value


def answer(kernel: Callable[..., Any], case: Case, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
    """What the kernel returned ("result 0", …) and the arguments that it may change, by name; None if it declined."""
    schema = getattr(torch.ops.lowrank_optim, case.op).default._schema
    names = [argument.name for argument in schema.arguments]
    args = [
        value if name in HOST else moved(value, device)
        for name, value in zip(names, case.make(), strict=False)  # without `error`, where there is none
    ]
    result = kernel(*args)
    if result is NotImplemented:
        return None
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    outcome = {f"result {i}": tensor for i, tensor in enumerate(results)}
    for argument, value in zip(schema.arguments, args, strict=False):
        if argument.name in ROOM:
            continue
        if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
            several = value if isinstance(value, list) else [value]
            names_of = [f"{argument.name} {i}" for i in range(len(several))] if several is value else [argument.name]
            outcome |= dict(zip(names_of, several, strict=True))
    if "error" in outcome:  # one number: its parts may differ where it is on an edge
        error = WeightError(outcome.pop("error"), outcome.pop("error_low", None))
        outcome[names[0]] = joined(outcome[names[0]], error)
    return {name: tensor.cpu() for name, tensor in outcome.items()}


@dataclass(frozen=True)
class Difference:
    """How an answer compares with the definition's: `failure` is empty, or says what is wrong."""

    error: float
    failure: str = ""


def compare(
    case: Case, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: Tolerance | None = None
) -> Difference:
    """The largest error, relative to the largest element of its tensor (codes: in levels)."""
    allowed = TOLERANCE[case.op] if tolerance is None else tolerance
    bits = next((value for value in case.make() if type(value) is int and value in (4, 8)), 8)
    stochastic = any(isinstance(value, Tensor) and value.dtype == torch.int64 for value in case.make())
    error, failures = 0.0, []
    for name, expected in want.items():
        grid = ERROR_GRID if "error_bits=8" in case.label and name in ("weight", "target") else _grid(expected.dtype)
        found = _compare(got[name], expected, bits, allowed, stochastic, grid)
        error = max(error, found.error)
        if found.failure:
            failures.append(f"{name}: {found.failure}")
    return Difference(error, "; ".join(failures))


def _grid(dtype: torch.dtype) -> float:
    """The spacing of the numbers of a type of few bits, relative to the power of two below them; 0 for others."""
    return float(torch.finfo(dtype).eps) if dtype in (torch.bfloat16, torch.float16) else 0.0


def _compare(got: Tensor, want: Tensor, bits: int, allowed: Tolerance, stochastic: bool, grid: float) -> Difference:
    if got.shape != want.shape or got.dtype != want.dtype:
        return Difference(
            torch.inf, f"{tuple(got.shape)} {got.dtype} came, {tuple(want.shape)} {want.dtype} was expected"
        )
    if want.numel() == 0:
        return Difference(0.0)
    if not want.dtype.is_floating_point:
        levels = [_levels(codes, bits) for codes in (got, want)]
        off = (levels[0] - levels[1]).abs()
        flips = int((off == 1).sum())
        wrong = bool((off > 1).any()) or flips > _count(allowed.flips, off.numel())
        return Difference(float(off.max()), f"{int((off > 0).sum())} of {off.numel()} codes differ" if wrong else "")
    a, b = got.double(), want.double()
    finite = torch.isfinite(b)
    if not torch.equal(a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5)) or not bool(
        torch.isfinite(a[finite]).all()
    ):
        return Difference(torch.inf, "other elements are NaN or infinite")
    a, b = a[finite], b[finite]
    if not b.numel():
        return Difference(0.0)
    off, largest = (a - b).abs(), float(b.abs().max())
    error = float(off.max()) / (largest or 1.0)
    # The smallest numbers of float16 are further apart than eps says.
    step = (
        (b.abs() * grid).clamp_min(torch.finfo(want.dtype).smallest_normal * grid) * 1.01 if grid else torch.zeros(())
    )
    bound = allowed.relative * b.abs() + (allowed.of_largest + allowed.roundings * grid) * largest
    beyond = off > bound
    wrong = bool((off > bound + step).any()) if allowed != EXACT else bool(beyond.any())
    limit = _count(allowed.flips, off.numel()) if stochastic or grid else 0
    if wrong or int(beyond.sum()) > limit:
        worst = int((off - bound).argmax())
        return Difference(
            error,
            f"{int(beyond.sum())} of {off.numel()} elements are off, by up to {float(off.max()):.3g}; "
            f"{float(a[worst]):.9g} came, {float(b[worst]):.9g} was expected",
        )
    return Difference(error)


def _count(fraction: float, numel: int) -> int:
    return 0 if fraction == 0.0 else max(1, round(fraction * numel))


def _levels(codes: Tensor, bits: int) -> Tensor:
    both = torch.stack([codes & 0xF, codes >> 4]) if bits == 4 else codes
    return both.to(torch.int32)
