"""GaLoreAdamW and GaLoreAdafactor against float64 transcriptions of their equations, galore_torch and torch.optim.AdamW.

Gradients are prescribed, so that errors do not feed back: singular values far apart (bases are well-conditioned), singular vectors
that wander (refreshes matter), and a size that changes from step to step (moments matter).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import lowrank_optim as lo
from tests.oracles import reference

RANK, GAP, SCALE, STEPS = 4, 9, 0.5, 40
SHAPES = {"tall": (24, 16), "wide": (16, 24), "square": (20, 20)}
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
POLICIES = ("keep", "reset", "rotate")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_proj_type = pytest.mark.parametrize("proj_type", PROJ_TYPES)
every_policy = pytest.mark.parametrize("policy", POLICIES)
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


# --- what is shared ------------------------------------------------------------------------------------------------------------


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.qr(matrix)[0]


def gradients(
    shape: tuple[int, int], dtype: torch.dtype, steps: int = STEPS, seed: int = 0, wander: float = 0.1
) -> list[Tensor]:
    """Gradients as the module's docstring describes them; values that `dtype` can represent."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    values = np.concatenate([[1.0, 0.7, 0.45, 0.25], 0.05 * 0.8 ** np.arange(short - 4)])
    u, v = (orthonormal(rng.normal(size=(side, short))) for side in shape)
    result = []
    for _ in range(steps):
        u, v = (orthonormal(x + wander * rng.normal(size=x.shape)) for x in (u, v))
        size = np.exp(rng.normal())
        result.append(torch.from_numpy(size * (u * values) @ v.T).to(dtype))
    return result


def start(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(dtype)


def learning_rate(step: int) -> float:
    """A schedule, so that an optimizer that looks at the learning rate only once is caught."""
    return 0.03 * (1.0 - 0.5 * step / STEPS)


def run(
    build: Callable[[Tensor], torch.optim.Optimizer], weight: Tensor, grads: list[Tensor], scheduled: bool = True
) -> list[Tensor]:
    """The weights after each step of an optimizer."""
    param = torch.nn.Parameter(weight.clone())
    optimizer = build(param)
    path = []
    for step, grad in enumerate(grads):
        if scheduled:
            optimizer.param_groups[0]["lr"] = learning_rate(step)
        param.grad = grad.clone()
        optimizer.step()
        path.append(param.detach().clone())
    return path


def judge(method: object, weight: Tensor, grads: list[Tensor], scheduled: bool = True) -> list[Tensor]:
    """The weights after each step of a transcription, in float64."""
    w, path = weight.double().numpy(), []
    for step, grad in enumerate(grads):
        if scheduled:
            method.lr = learning_rate(step)
        w = method.step(w, grad.double().numpy())
        path.append(torch.from_numpy(w))
    return path


def difference(path: list[Tensor], expected: list[Tensor], weight: Tensor) -> float:
    """The largest distance of the two paths, relative to the length of the whole change."""
    change = (expected[-1].double() - weight.double()).norm()
    gaps = [(a.double() - b.double()).norm() / change for a, b in zip(path, expected, strict=True)]
    return float(torch.stack(gaps).max())  # NaN if any is; Python's max would pass over it


def galore_group(param: Tensor, **options: object) -> dict[str, object]:
    return {"params": [param], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, **options}


# --- AdamW ---------------------------------------------------------------------------------------------------------------------

ADAMW = {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3}  # every term large enough to be seen


def galore_adamw(proj_type: str, policy: str = "keep", **options: object) -> Callable[[Tensor], torch.optim.Optimizer]:
    def build(param: Tensor) -> torch.optim.Optimizer:
        group = galore_group(param, proj_type=proj_type, on_refresh=policy, stagger=False, **options)
        return lo.GaLoreAdamW([group], projector="svd", **ADAMW)

    return build


@both_precisions
@every_policy
@every_proj_type
@every_shape
def test_galore_adamw_follows_its_equation(
    shape: tuple[int, int], proj_type: str, policy: str, dtype: torch.dtype
) -> None:
    weight, grads = start(shape, dtype), gradients(shape, dtype)
    method = reference.GaLoreAdamW(RANK, GAP, SCALE, proj_type, policy, **ADAMW)
    expected = judge(method, weight, grads)
    assert difference(run(galore_adamw(proj_type, policy), weight, grads), expected, weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("policy", ["reset", "rotate"])
def test_refresh_policies_differ_from_keep_by_far_more_than_the_tolerance(policy: str) -> None:
    weight, grads = start((24, 16), torch.float64), gradients((24, 16), torch.float64)
    keep = run(galore_adamw("std"), weight, grads)
    assert difference(run(galore_adamw("std", policy), weight, grads), keep, weight) > 1e-2


@every_shape
def test_rotation_takes_the_absolute_value_of_the_second_moment(shape: tuple[int, int]) -> None:
    # After a sudden large gradient the fast first moment exceeds the slow second one, and V̂ − M̂² is negative. In a basis that is
    # far from the old one, (C M̂)² does not always make up for it.
    options = {**ADAMW, "betas": (0.5, 0.99)}
    weight, grads = start(shape, torch.float64), gradients(shape, torch.float64, wander=1.0)
    grads = [grad / grad.norm() * (30.0 if (step + 1) % GAP == 0 else 1.0) for step, grad in enumerate(grads)]

    def build(param: Tensor) -> torch.optim.Optimizer:
        return lo.GaLoreAdamW([galore_group(param, on_refresh="rotate")], projector="svd", stagger=False, **options)

    expected = judge(reference.GaLoreAdamW(RANK, GAP, SCALE, on_refresh="rotate", **options), weight, grads)
    assert difference(run(build, weight, grads), expected, weight) < 1e-10


def test_signs_of_new_basis_vectors_are_aligned_with_the_old_ones() -> None:
    weight, grads = start((24, 16), torch.float64), gradients((24, 16), torch.float64)
    # An SVD may return any sign; that this one does not happen to return aligned ones is the first assertion.
    aligned = judge(reference.GaLoreAdamW(RANK, GAP, SCALE, **ADAMW), weight, grads)
    free = judge(reference.GaLoreAdamW(RANK, GAP, SCALE, align_signs=False, **ADAMW), weight, grads)
    assert difference(free, aligned, weight) > 1e-2
    assert difference(run(galore_adamw("std"), weight, grads), aligned, weight) < 1e-10


@every_proj_type
def test_a_stack_of_matrices_is_trained_matrix_by_matrix(proj_type: str) -> None:
    shape, experts = (24, 16), 3
    each = [gradients(shape, torch.float64, seed=seed) for seed in range(experts)]
    grads = [torch.stack(matrices) for matrices in zip(*each, strict=True)]
    weight = start((experts, *shape), torch.float64)
    path = run(galore_adamw(proj_type, "rotate"), weight, grads)
    for i in range(experts):
        method = reference.GaLoreAdamW(RANK, GAP, SCALE, proj_type, "rotate", **ADAMW)
        expected = judge(method, weight[i], each[i])
        assert difference([w[i] for w in path], expected, weight[i]) < 1e-10


@every_proj_type
@pytest.mark.parametrize(
    ("layout", "to_param"),
    [
        ("auto", lambda matrix: matrix.view(24, 4, 2, 2)),
        ("conv", lambda matrix: matrix.view(24, 8, 2)),
        ("transposed", lambda m: m.T),
    ],
    ids=["conv2d", "conv1d", "transposed"],
)
def test_other_layouts_are_trained_as_their_matrix(
    layout: str, to_param: Callable[[Tensor], Tensor], proj_type: str
) -> None:
    weight, grads = start((24, 16), torch.float64), gradients((24, 16), torch.float64)
    stored = [to_param(grad).contiguous() for grad in grads]
    path = run(galore_adamw(proj_type, layout=layout), to_param(weight).contiguous(), stored)
    expected = judge(reference.GaLoreAdamW(RANK, GAP, SCALE, proj_type, **ADAMW), weight, grads)
    assert difference(path, [to_param(w) for w in expected], to_param(weight)) < 1e-10


# --- Adafactor -----------------------------------------------------------------------------------------------------------------

# (scale, options); the scale makes the change of the weights large beside the rounding of float32.
ADAFACTOR = {
    "relative steps": (2.0, {"weight_decay": 0.3}),
    "warm-up": (1e4, {"warmup_init": True}),
    "momentum": (2.0, {"beta1": 0.8, "weight_decay": 0.3}),
    "fixed lr": (
        0.5,
        {"lr": 0.03, "scale_parameter": False, "weight_decay": 0.3, "clip_threshold": 0.5, "decay_rate": -0.6},
    ),
    "scaled lr, momentum": (0.5, {"lr": 0.1, "beta1": 0.8, "eps": (1e-4, 1e-3)}),
}
every_adafactor = pytest.mark.parametrize(("scale", "options"), ADAFACTOR.values(), ids=ADAFACTOR)


def galore_adafactor(
    options: dict[str, object], scale: float, proj_type: str, policy: str = "keep", **shared: object
) -> Callable[[Tensor], torch.optim.Optimizer]:
    def build(param: Tensor) -> torch.optim.Optimizer:
        group = galore_group(param, scale=scale, proj_type=proj_type, on_refresh=policy, stagger=False, **shared)
        return lo.GaLoreAdafactor([group], projector="svd", **options)

    return build


@both_precisions
@every_adafactor
@every_proj_type
@every_shape
def test_galore_adafactor_follows_its_equation(
    shape: tuple[int, int], proj_type: str, scale: float, options: dict[str, object], dtype: torch.dtype
) -> None:
    weight, grads = start(shape, dtype), gradients(shape, dtype)
    moments = reference.Adafactor(**options)
    expected = judge(reference.GaLoreAdafactor(RANK, GAP, scale, proj_type, moments=moments), weight, grads, False)
    path = run(galore_adafactor(options, scale, proj_type), weight, grads, scheduled=False)
    assert difference(path, expected, weight) < TOLERANCE[dtype]


@every_policy
@every_adafactor
@every_proj_type
def test_galore_adafactor_follows_every_refresh_policy(
    proj_type: str, scale: float, options: dict[str, object], policy: str
) -> None:
    weight, grads = start((16, 24), torch.float64), gradients((16, 24), torch.float64)
    moments = reference.Adafactor(**options)
    expected = judge(
        reference.GaLoreAdafactor(RANK, GAP, scale, proj_type, policy, moments=moments), weight, grads, False
    )
    path = run(galore_adafactor(options, scale, proj_type, policy), weight, grads, scheduled=False)
    assert difference(path, expected, weight) < 1e-10


# --- the released code -----------------------------------------------------------------------------------------------------------


@every_proj_type
@every_shape
def test_matching_the_reference_equals_galore_torch_adamw(shape: tuple[int, int], proj_type: str) -> None:
    galore_torch = pytest.importorskip("galore_torch")
    weight, grads = start(shape, torch.float32), gradients(shape, torch.float32, 50)
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}

    def ours(param: Tensor) -> torch.optim.Optimizer:
        return lo.GaLoreAdamW([galore_group(param, proj_type=proj_type)], match_reference=True, **options)

    def theirs(param: Tensor) -> torch.optim.Optimizer:
        group = galore_group(param, proj_type=proj_type)
        return galore_torch.GaLoreAdamW([group], no_deprecation_warning=True, **options)

    assert difference(run(ours, weight, grads), run(theirs, weight, grads), weight) < 1e-5


@every_adafactor
@every_proj_type
@every_shape
def test_matching_the_reference_equals_galore_torch_adafactor(
    shape: tuple[int, int], proj_type: str, scale: float, options: dict[str, object]
) -> None:
    galore_torch = pytest.importorskip("galore_torch")
    weight, grads = start(shape, torch.float32), gradients(shape, torch.float32, 50)

    def theirs(param: Tensor) -> torch.optim.Optimizer:
        group = galore_group(param, scale=scale, proj_type=proj_type)
        return galore_torch.GaLoreAdafactor([group], relative_step="lr" not in options, **options)

    ours = galore_adafactor(options, scale, proj_type, match_reference=True)
    path, expected = run(ours, weight, grads, scheduled=False), run(theirs, weight, grads, scheduled=False)
    assert difference(path, expected, weight) < 1e-5


@every_proj_type
@every_shape
def test_matching_the_reference_follows_the_equation_of_the_released_code(
    shape: tuple[int, int], proj_type: str
) -> None:
    weight, grads = start(shape, torch.float64), gradients(shape, torch.float64)
    # One basis only: where signs are free, later ones depend on the SVD routine.
    method = reference.ReleasedGaLoreAdamW(RANK, STEPS, SCALE, proj_type, **ADAMW)
    path = run(galore_adamw(proj_type, update_proj_gap=STEPS, match_reference=True), weight, grads)
    expected = judge(method, weight, grads)
    assert difference(path, expected, weight) < 1e-10
    usual = run(galore_adamw(proj_type, update_proj_gap=STEPS), weight, grads)
    assert difference(usual, expected, weight) > 1e-3


def test_transcription_of_the_released_code_equals_galore_torch() -> None:
    galore_torch = pytest.importorskip("galore_torch")
    weight, grads = start((24, 16), torch.float32), gradients((24, 16), torch.float32)

    def theirs(param: Tensor) -> torch.optim.Optimizer:
        group = galore_group(param, proj_type="std", update_proj_gap=STEPS)
        return galore_torch.GaLoreAdamW([group], no_deprecation_warning=True, **ADAMW)

    expected = judge(reference.ReleasedGaLoreAdamW(RANK, STEPS, SCALE, **ADAMW), weight, grads)
    assert difference(run(theirs, weight, grads), expected, weight) < 1e-5


# --- dense groups, and low precision -----------------------------------------------------------------------------------------------


def test_transcription_of_adamw_equals_torch() -> None:
    weight, grads = start((24, 16), torch.float64), gradients((24, 16), torch.float64)
    path = run(lambda param: torch.optim.AdamW([param], **ADAMW), weight, grads)
    assert difference(path, judge(reference.AdamW(**ADAMW), weight, grads), weight) < 1e-12


@both_precisions
@pytest.mark.parametrize("shape", [(24, 16), (384,), (4, 8, 12)], ids=str)
def test_groups_without_rank_equal_torch_adamw(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = start(shape, dtype)
    grads = [grad.reshape(shape) for grad in gradients((24, 16), dtype, 50)]
    expected = run(lambda param: torch.optim.AdamW([param], **ADAMW), weight, grads)
    for group in ({}, {"rank": None}):
        path = run(lambda param, group=group: lo.GaLoreAdamW([{"params": [param], **group}], **ADAMW), weight, grads)
        assert difference(path, expected, weight) < (1e-6 if dtype == torch.float32 else 1e-12)


def test_defaults_of_groups_without_rank_are_those_of_torch_adamw() -> None:
    weight, grads = start((24, 16), torch.float32), gradients((24, 16), torch.float32, 50)
    path = run(lambda param: lo.GaLoreAdamW([param]), weight, grads, scheduled=False)
    expected = run(lambda param: torch.optim.AdamW([param]), weight, grads, scheduled=False)
    assert difference(path, expected, weight) < 1e-6


def rounded(method: object, weight: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """The weights after each step of a transcription whose weights are rounded to bfloat16 in each step, and nothing else."""
    path = []
    for step, grad in enumerate(grads):
        method.lr = learning_rate(step)
        weight = torch.from_numpy(method.step(weight.double().numpy(), grad.double().numpy())).bfloat16()
        path.append(weight)
    return path


@every_policy
@every_proj_type
@every_shape
def test_bfloat16_weights_get_the_update_of_higher_precision_rounded_once(
    shape: tuple[int, int], proj_type: str, policy: str
) -> None:
    weight, grads = start(shape, torch.bfloat16), gradients(shape, torch.bfloat16)
    expected = rounded(reference.GaLoreAdamW(RANK, GAP, SCALE, proj_type, policy, **ADAMW), weight, grads)
    path = run(galore_adamw(proj_type, policy), weight, grads)
    # The two differ only where float32 and float64 fall on different sides of the middle of two bfloat16 numbers.
    assert float((path[-1] != expected[-1]).double().mean()) < 0.02
    torch.testing.assert_close(path[-1], expected[-1], rtol=2**-6, atol=1e-3)


def test_bfloat16_dense_weights_get_the_update_of_higher_precision_rounded_once() -> None:
    weight, grads = start((24, 16), torch.bfloat16), gradients((24, 16), torch.bfloat16)
    expected = rounded(reference.AdamW(**ADAMW), weight, grads)
    path = run(lambda param: lo.GaLoreAdamW([param], **ADAMW), weight, grads)
    assert float((path[-1] != expected[-1]).double().mean()) < 0.02
