"""Subspaces that explore: what is kept is the leading part, what is drawn is uniform, or follows the singular values."""

import pytest
import torch
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim.kernels.counter_rng import uniform
from lowrank_optim.projectors import Refresh, from_name
from lowrank_optim.projectors.randomized_svd import drawn, eigenvectors

CPU = torch.device("cpu")
F64 = torch.float64
SHAPES = {"tall": (60, 33), "wide": (33, 60), "square": (40, 40), "stack": (3, 30, 18)}
RANK = 8


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """With a spectrum that falls."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    left, values, right = torch.linalg.svd(made, full_matrices=False)
    fall = values * 0.8 ** torch.arange(values.shape[-1])
    return ((left * fall.unsqueeze(-2)) @ right).to(dtype)


def refreshed(
    projector: lo.Projector, grads: list[Tensor], keys: list[int], rank: int = RANK, side: str = "std"
) -> Tensor:
    """The last of the bases."""
    dtype = torch.float32 if grads[0].dtype == torch.float32 else F64
    space = projector.space(tuple(grads[0].shape), rank, side, dtype)
    state = projector.init(space, 0, CPU)
    for step, (grad, key) in enumerate(zip(grads, keys, strict=True)):
        new = projector.refresh(Refresh(grad, space, state, key, first=step == 0))
        assert new is not None
        state = new
    return state["basis"]


@pytest.mark.parametrize("explore", ["complement", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, RANK, None], ids=["1", "8", "full"])
def test_bases_are_orthonormal_cold_and_warm_also_at_full_rank(explore, dtype, shape, rank):
    rank, grads = rank or min(shape[-2:]), [draw(step, *shape, dtype=dtype) for step in range(3)]
    for count in (1, 3):
        basis = refreshed(lo.RandomizedSVD(explore=explore), grads[:count], [11, 12, 13][:count], rank).double()
        error = basis.mT @ basis - torch.eye(rank, dtype=F64)
        assert error.abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.itemsize


@pytest.mark.parametrize("leading", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_leading_vectors_are_kept_and_the_others_are_a_new_sample_of_their_complement(shape, leading):
    projector, kept = lo.RandomizedSVD(8, 4, 4, "complement", leading), round(leading * RANK)
    grad = draw(1, *shape)
    exact = refreshed(lo.SVD(), [grad], [0])[..., :kept]
    first, second = (refreshed(projector, [grad], [key]) for key in (5, 6))
    for basis in (first, second):
        inside = exact.mT @ basis[..., :kept]
        torch.testing.assert_close(inside.abs(), torch.eye(kept, dtype=F64).expand_as(inside), atol=2e-2, rtol=0)
    if leading < 1.0:
        overlap = (first[..., kept:].mT @ second[..., kept:]).square().sum((-2, -1)) / (RANK - kept)
        assert overlap.max() < 0.75
    else:
        torch.testing.assert_close((first.mT @ second).square().sum((-2, -1)).mean(), torch.tensor(RANK, dtype=F64))


@pytest.mark.long
def test_the_sample_of_the_complement_has_no_preferred_direction():
    """E of P Pᵀ over many keys is a multiple of the identity on what is orthogonal to the leading vector."""
    grad, projector = draw(2, 24, 6), lo.RandomizedSVD(8, 4, 4, "complement", 0.34)
    leading = torch.linalg.svd(grad).Vh[0]
    mean = sum(b @ b.T for b in (refreshed(projector, [grad], [key], 3) for key in range(1, 1501))) / 1500
    rest = torch.eye(6, dtype=F64) - leading.outer(leading)
    torch.testing.assert_close(mean, leading.outer(leading) + rest * (2 / 5), atol=0.05, rtol=0)


@pytest.mark.long
def test_sampled_vectors_are_singular_vectors_with_probabilities_that_follow_their_values():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=F64)
    gram = torch.diag(values.square())
    vectors = eigenvectors(gram).flip(-1)
    count = torch.zeros(5, dtype=F64)

    def chances(key: int) -> Tensor:
        return uniform(key, (5,), CPU, F64)

    for key in range(1, 4001):
        count += drawn(vectors, gram, 1, chances(key)).square().sum(-1)
    torch.testing.assert_close(count / 4000, values / 16, atol=0.025, rtol=0)
    # Of two, drawn one after the other: P(both of the first) = p₁p₂/(1 − p₁) + p₂p₁/(1 − p₂).
    both = (
        sum(drawn(vectors, gram, 2, chances(key)).square().sum(-1)[:2].sum().item() > 1.5 for key in range(1, 4001))
        / 4000
    )
    assert abs(both - (0.5 * 0.25 / 0.5 + 0.25 * 0.5 / 0.75)) < 0.03


def test_a_sample_has_the_exact_vectors_in_order_and_misses_none_that_alone_matters():
    grad = torch.zeros(30, 20, dtype=F64)
    grad[torch.arange(20), torch.arange(20)] = 0.9 ** torch.arange(20, dtype=F64)
    basis = refreshed(lo.RandomizedSVD(8, 30, 30, "sample"), [grad], [9], 6)
    chosen = basis.abs().argmax(0)
    torch.testing.assert_close(basis.abs().amax(0), torch.ones(6, dtype=F64), atol=1e-3, rtol=0)
    assert torch.equal(chosen, chosen.sort().values)
    assert chosen.max() >= 6
    low = torch.zeros(30, 20, dtype=F64)
    low[3, 4], low[5, 6] = 1.0, 2.0  # of rank 2: zero singular values are never drawn before these
    inside = refreshed(lo.RandomizedSVD(explore="sample"), [low], [9], 6)
    torch.testing.assert_close((low @ inside).square().sum(), torch.tensor(5.0, dtype=F64))


@pytest.mark.parametrize("explore", ["complement", "sample"])
def test_every_parameter_and_every_refresh_draws_anew_and_a_copy_draws_the_same(explore):
    grad, projector = draw(3, 40, 24), lo.RandomizedSVD(explore=explore)
    first, again, other = (refreshed(projector, [grad, grad], keys) for keys in ([1, 2], [1, 2], [1, 3]))
    assert torch.equal(first, again)
    assert (first.mT @ other).square().sum() / RANK < 0.9


def test_names_say_what_is_explored_and_come_back_from_checkpoints(tmp_path):
    default = lo.RandomizedSVD()
    assert lo.RandomizedSVD(explore="complement").name == "randomized_svd:complement"
    assert lo.RandomizedSVD(4, 3, 2, "sample").name == "randomized_svd:4,3,2,sample"
    assert lo.RandomizedSVD(explore="complement", leading=1 / 3).name == f"randomized_svd:complement,{1 / 3!r}"
    assert default.name == "randomized_svd"
    for projector in (lo.RandomizedSVD(explore="complement", leading=1 / 3), lo.RandomizedSVD(4, explore="sample")):
        assert from_name(projector.name) == projector
        param = torch.nn.Parameter(torch.ones(24, 16))
        optimizer = lo.GaLoreAdamW([param], rank=4, projector=projector)
        param.grad = draw(1, 24, 16).float()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "c.pt")
        resumed = lo.GaLoreAdamW([param], rank=4, projector=projector.name)
        resumed.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
        assert resumed.plan_of(param).projector == projector
        with pytest.raises(ValueError, match="projector"):
            lo.GaLoreAdamW([param], rank=4).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"explore": "all"}, "explore is 'all'; valid values are None, 'complement', 'sample'"),
        ({"leading": 0.0}, r"leading is 0.0; it must be in \(0, 1\]"),
        ({"leading": 1.5}, r"leading is 1.5; it must be in \(0, 1\]"),
    ],
)
def test_bad_values_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        lo.RandomizedSVD(**fields)
