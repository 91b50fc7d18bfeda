"""APOLLOAdamW with `match_reference=True` against apollo_torch, the authors' package.

Its random numbers are torch's and its basis is stored; ours are the package's own and regenerated. So our basis is given to theirs:
everything else (side, refreshes, moments, scale, limiter, ε, bias correction, decay) is compared.

apollo_torch imports bitsandbytes for its 8-bit optimizers, which these tests do not use: a stub takes its place.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

RANK, GAP, STEPS, LR = 5, 7, 50, 1e-2
BETAS, DECAY = (0.8, 0.95), 0.3
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
both_scale_types = pytest.mark.parametrize("scale_type", ["channel", "tensor"])


@pytest.fixture(scope="module")
def apollo_torch() -> Iterator[types.ModuleType]:
    """The package, imported with an empty bitsandbytes, which is gone again afterwards."""
    names = ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["bitsandbytes"].functional = stubs["bitsandbytes.functional"]
    stubs["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield pytest.importorskip("apollo_torch")


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    """Gradients with a clear spectrum, singular vectors that wander, and a size that jumps, so that the limiter has work to do."""
    rng = np.random.default_rng(0)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(side, short)))[0] for side in shape)
    values = 1.2 ** -np.arange(short)
    out = []
    for _ in range(steps):
        u, v = (np.linalg.qr(x + 0.05 * rng.normal(size=x.shape))[0] for x in (u, v))
        out.append(torch.from_numpy(np.exp(rng.normal()) * (u * values) @ v.T).to(dtype))
    return out


def small_weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01).to(dtype)


def our_basis(optimizer: lo.LowRankOptimizer, param: nn.Parameter) -> Tensor:
    """The random basis that the optimizer worked with in its last step, (projected side)×rank."""
    return optimizer.trained(param).basis().matrix


def compare(
    apollo_torch: types.ModuleType,
    patch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: torch.dtype,
    ours: Callable[[nn.Parameter], lo.LowRankOptimizer],
    theirs: dict[str, Any],
    group: dict[str, Any],
) -> float:
    """The largest distance between the two paths of the weights, relative to the whole change."""
    begin = small_weights(shape, dtype)
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    optimizer = ours(params[0])
    keys = {"rank": RANK, "update_proj_gap": GAP, "proj": "random", "proj_type": "std", **group}
    peer = apollo_torch.APOLLOAdamW([{"params": params[1:], **keys}], **theirs)
    refreshes = []

    def basis(projector: object, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
        refreshes.append(seed)
        matrix = our_basis(optimizer, params[0])
        return matrix.T if type == "right" else matrix

    patch.setattr(sys.modules["apollo_torch.random_projector"].GradientProjector, "get_orthogonal_matrix", basis)
    worst = 0.0
    for grad in gradients(shape, dtype):
        params[0].grad, params[1].grad = grad.clone(), grad.clone()
        optimizer.step()
        peer.step()
        worst = max(worst, float((params[0].detach().double() - params[1].detach().double()).norm()))
    assert len(refreshes) == math.ceil(STEPS / keys["update_proj_gap"])
    return worst / float((params[1].detach().double() - begin.double()).norm())


@both_precisions
@both_scale_types
@every_shape
@pytest.mark.parametrize("scale", [1.0, 32.0])
def test_matching_the_reference_equals_apollo_torch_over_refreshes(
    apollo_torch: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    scale_type: str,
    scale: float,
    dtype: torch.dtype,
) -> None:
    common = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": DECAY}

    def ours(param: nn.Parameter) -> lo.LowRankOptimizer:
        options = {"rank": RANK, "update_proj_gap": GAP, "scale": scale, "scale_type": scale_type}
        return lo.APOLLOAdamW([param], match_reference=True, **options, **common)

    group = {"scale": scale, "scale_type": scale_type}
    assert compare(apollo_torch, monkeypatch, shape, dtype, ours, common, group) < TOLERANCE[dtype]


@both_precisions
@every_shape
def test_matching_the_reference_equals_apollo_torchs_mini(
    apollo_torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    # Their defaults are ε = 1e-6 and no decay, ours those of torch.
    def ours(param: nn.Parameter) -> lo.LowRankOptimizer:
        options = {"eps": 1e-6, "weight_decay": 0.0, "match_reference": True, "update_proj_gap": GAP}
        return lo.APOLLOMiniAdamW([param], lr=LR, rank=1, **options)

    group = {"rank": 1, "scale": 128, "scale_type": "tensor"}
    assert compare(apollo_torch, monkeypatch, shape, dtype, ours, {"lr": LR}, group) < TOLERANCE[dtype]


@both_scale_types
@every_shape
def test_their_options_without_limiter_and_with_the_scale_in_front_are_ours(
    apollo_torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], scale_type: str
) -> None:
    group = {"scale": 32.0, "scale_type": scale_type}
    # The scale in front of the limiter changes nothing but what 1e-8 is added to.
    for peer, limiter, tolerance in (({"disable_nl": True}, None, 1e-10), ({"scale_front": True}, 1.01, 1e-6)):

        def ours(param: nn.Parameter, limiter: float | None = limiter) -> lo.LowRankOptimizer:
            options = {"rank": RANK, "update_proj_gap": GAP, "match_reference": True, "eps": 1e-6, "weight_decay": 0.0}
            return lo.APOLLOAdamW([param], lr=LR, limiter=limiter, **group, **options)

        error = compare(apollo_torch, monkeypatch, shape, torch.float64, ours, {"lr": LR, **peer}, group)
        assert error < tolerance


@every_shape
def test_their_exact_subspaces_are_ours(apollo_torch: types.ModuleType, shape: tuple[int, int]) -> None:
    # Theirs takes the singular vectors of a float32 copy, whose signs are those of that precision.
    begin = small_weights(shape, torch.float32)
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    common = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": DECAY}
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 2.0, "scale_type": "channel"}
    optimizer = lo.APOLLOAdamW([params[0]], projector="svd", match_reference=True, **group, **common)
    peer = apollo_torch.APOLLOAdamW([{"params": params[1:], "proj": "svd", "proj_type": "std", **group}], **common)
    for grad in gradients(shape, torch.float32):
        for param, one in zip(params, (optimizer, peer), strict=True):
            param.grad = grad.clone()
            one.step()
    assert (params[0] - params[1]).norm() < 1e-5 * (params[1] - begin).norm()


@both_precisions
def test_parameters_without_rank_are_their_adamw(apollo_torch: types.ModuleType, dtype: torch.dtype) -> None:
    begin = small_weights((24, 16), dtype)
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    common = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": DECAY}
    optimizer = lo.APOLLOAdamW([params[0]], match_reference=True, **common)
    peer = apollo_torch.APOLLOAdamW([params[1]], **common)
    for grad in gradients((24, 16), dtype):
        for param, one in zip(params, (optimizer, peer), strict=True):
            param.grad = grad.clone()
            one.step()
    assert (params[0] - params[1]).norm() < TOLERANCE[dtype] * (params[1] - begin).norm()


def test_without_match_reference_the_two_differ_beyond_all_tolerances(
    apollo_torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": DECAY}

    def ours(param: nn.Parameter) -> lo.LowRankOptimizer:
        return lo.APOLLOAdamW([param], rank=RANK, update_proj_gap=GAP, stagger=False, **common)

    group = {"scale": 1.0, "scale_type": "channel"}
    assert compare(apollo_torch, monkeypatch, (40, 24), torch.float64, ours, common, group) > 1e-3
