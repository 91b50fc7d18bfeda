"""The DCT's subspaces: the transform against its definition, the choice, and moments that go on exactly."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.projectors import Refresh
from lowrank_optim.projectors.dct import cosines, in_place, transformed

CPU, F64 = torch.device("cpu"), torch.float64


def definition(size: int) -> Tensor:
    """Q by the formula, a vector a column."""
    rows = [[math.cos(math.pi * i * (2 * j + 1) / (2 * size)) for i in range(size)] for j in range(size)]
    matrix = torch.tensor(rows, dtype=F64) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def refreshed(grads: list[Tensor], rank: int, side: str = "std") -> tuple[lo.SubspaceSpec, list[dict[str, Tensor]]]:
    projector = lo.DCT()
    space = projector.space(tuple(grads[0].shape), rank, side, F64)
    states = [projector.init(space, 1, CPU)]
    for step, grad in enumerate(grads):
        new = projector.refresh(Refresh(grad, space, states[-1], step, first=step == 0))
        assert new is not None
        states.append(new)
    return space, states


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33, 64, 257])
def test_the_transform_is_its_definition(size):
    exact, places = definition(size), torch.arange(size)
    torch.testing.assert_close(cosines(places, places, size, F64), exact, atol=1e-13, rtol=0)
    torch.testing.assert_close(exact.T @ exact, torch.eye(size, dtype=F64), atol=1e-12, rtol=0)
    lines = draw(size, 2, 5, size)
    torch.testing.assert_close(transformed(lines), lines @ exact, atol=1e-12, rtol=1e-12)
    waves = torch.tensor([[size - 1, 0], [size // 2, size // 3]])
    expected = torch.stack([exact[:, index] for index in waves])
    torch.testing.assert_close(cosines(places, waves, size, F64), expected, atol=1e-13, rtol=0)


def test_angles_of_large_matrices_do_not_overflow():
    size = 50_000  # 2·size² is above 2³¹
    places, waves = torch.tensor([0, 49_999]), torch.tensor([49_999, 12_345])
    exact = [
        [math.cos(math.pi * (i * (2 * j + 1) % (4 * size)) / (2 * size)) for i in (49_999, 12_345)] for j in (0, 49_999)
    ]
    found = cosines(places, waves, size, F64)
    torch.testing.assert_close(found, torch.tensor(exact, dtype=F64) * math.sqrt(2 / size), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("shape", "side"), [((40, 24), "right"), ((24, 40), "left"), ((40, 24), "left"), ((2, 20, 16), "right")]
)
def test_the_vectors_of_the_largest_coefficients_are_chosen_and_no_other_choice_holds_more(shape, side):
    grad = draw(4, *shape)
    space, (_, state) = refreshed([grad], 6, side)
    lines = grad if side == "right" else grad.mT
    energy = (lines @ definition(space.basis_rows)).square().sum(-2)
    assert torch.equal(state["indices"].sort(-1).values.long(), energy.topk(6).indices.sort(-1).values)
    reduced = lo.DCT().basis(space, state, 0, CPU).project(grad)
    torch.testing.assert_close(reduced.square().sum((-2, -1)), energy.topk(6).values.sum(-1))
    assert state.keys() == {"indices"}
    assert state["indices"].dtype == torch.int32


@pytest.mark.parametrize("size", [1e-18, 1e12, 1e17])
def test_the_size_of_the_gradient_does_not_matter(size):
    projector, grad = lo.DCT(), draw(5, 40, 24).float()
    space = projector.space((40, 24), 6, "std", torch.float32)
    state = projector.init(space, 1, CPU)
    usual, scaled = (projector.refresh(Refresh(g, space, state, 1, first=True)) for g in (grad, grad * size))
    assert torch.equal(usual["indices"], scaled["indices"])


def test_what_is_chosen_again_keeps_its_place():
    old, chosen = torch.tensor([[7, 1, 4, 9], [0, 1, 2, 3]]), torch.tensor([[9, 5, 0, 1], [3, 2, 1, 0]])
    assert torch.equal(in_place(chosen, old), torch.tensor([[0, 1, 5, 9], [0, 1, 2, 3]]))
    _, states = refreshed([draw(seed, 40, 24) for seed in range(6)], 8)
    for before, after in itertools.pairwise(states[1:]):
        old, new = before["indices"].tolist(), after["indices"].tolist()
        assert len(set(new)) == 8
        shared = set(old) & set(new)
        assert shared
        assert all(old.index(wave) == new.index(wave) for wave in shared)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_transport_is_a_selection_and_exact(batch):
    projector = lo.DCT()
    space = projector.space((*batch, 40, 24), 5, "right", torch.float32)
    old, new = torch.tensor([3, 9, 0, 20, 7]), torch.tensor([7, 9, 1, 3, 2])
    bases = [projector.basis(space, {"indices": each.expand(*batch, 5).to(torch.int32)}, 0, CPU) for each in (old, new)]
    moment = draw(1, *batch, 40, 5).float()
    for power in (1, 2):
        moved = bases[1].transport(moment, bases[0], power)
        expected = torch.stack(
            [moment[..., 4], moment[..., 1], 0 * moment[..., 0], moment[..., 0], 0 * moment[..., 0]], -1
        )
        assert torch.equal(moved, expected)
        by_products = moment @ (bases[0].matrix.mT @ bases[1].matrix).pow(power)
        torch.testing.assert_close(moved, by_products, atol=1e-5, rtol=0)
    assert float(bases[1].overlap(bases[0])) == pytest.approx(0.6)


@pytest.mark.parametrize("policy", ["keep", "rotate"])
def test_moments_of_waves_that_stay_go_on_as_if_no_refresh_had_been(policy):
    """With a refresh at every step; the wave that stays all along has the moments of an Adam on its coefficient."""
    param = nn.Parameter(torch.zeros(20, 12, dtype=F64))
    optimizer = lo.GaLoreAdamW(
        [param], rank=4, projector="dct", update_proj_gap=1, on_refresh=policy, betas=(0.9, 0.99)
    )
    wave, first, second = definition(12)[:, 5], 0.0, 0.0
    left, chosen = draw(0, 20), set()
    for step in range(8):
        grad = draw(step + 1, 20, 12) + 50.0 * left.outer(wave)
        param.grad = grad.clone()
        optimizer.step()
        coefficient = grad @ wave
        first, second = 0.9 * first + 0.1 * coefficient, 0.99 * second + 0.01 * coefficient.square()
        chosen.add(tuple(optimizer.state[param]["indices"].tolist()))
        place = optimizer.state[param]["indices"].tolist().index(5)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"][:, place], first, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"][:, place], second, rtol=1e-11, atol=1e-14)
    assert len(chosen) > 3


@pytest.mark.parametrize(
    "residual", ["none", "sgd", "sign", "error_feedback", "norm_scaled", "gradient_scaled", "complement_scaled"]
)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=["tall", "wide"])
def test_every_residual_steps_as_with_a_stored_basis_of_the_same_vectors(residual, shape):
    @dataclass(frozen=True)
    class Stored(lo.StoredProjector):
        name = "stored_cosines"
        sides = ("left", "right")

        def compute(self, request):
            return {
                "basis": definition(request.space.basis_rows)[
                    :, lo.DCT().refresh(with_indices(request))["indices"].long()
                ]
            }

    def with_indices(request):
        return Refresh(request.grad, request.space, {"indices": torch.arange(6, dtype=torch.int32)}, 0, True)

    def train(projector: lo.Projector) -> Tensor:
        param = nn.Parameter(torch.zeros(shape, dtype=F64))
        optimizer = lo.LowRankOptimizer(
            [param], rule=lo.Adam(), rank=6, projector=projector, residual=residual, lr=0.01, update_proj_gap=100
        )
        for step in range(5):
            param.grad = draw(step, *shape)
            optimizer.step()
        return param.detach()

    # The places of the vectors differ; the subspace is the same, and Adam works on each coefficient for itself.
    torch.testing.assert_close(train(lo.DCT()), train(Stored()), rtol=1e-9, atol=1e-12)


def test_memory_is_that_of_the_indices():
    param = nn.Parameter(torch.zeros(256, 128))
    optimizer = lo.GaLoreAdamW([param], rank=32, projector=lo.DCT())
    param.grad = draw(1, 256, 128).float()
    optimizer.step()
    assert lo.state_bytes(optimizer)["indices"] == 4 * 32
    assert "basis" not in lo.state_bytes(optimizer)


def test_what_needs_a_stored_basis_or_both_sides_is_refused():
    for options, message in (
        ({"basis_bits": 8}, "basis_bits is 8, but projector='dct' stores no basis"),
        ({"overlap_threshold": 0.5}, "overlap_threshold is 0.5, but projector='dct' stores no basis"),
        ({"proj_type": "full"}, "proj_type is 'full', which projector='dct' cannot do"),
    ):
        with pytest.raises(ValueError, match=message):
            lo.GaLoreAdamW([nn.Parameter(torch.zeros(24, 16))], rank=4, projector="dct", **options)


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (3, 0, 12)])
def test_a_process_without_rows_transforms_nothing(shape):
    assert transformed(torch.empty(shape)).shape == shape
