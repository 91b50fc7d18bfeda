"""Alice: against a float64 transcription that forms every matrix, and what its residual must not make of rounding and zeros."""

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.kernels.counter_rng import PURPOSE_BASIS, derive_key, gaussian, make_key

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
RANK, GAP, LR, DECAY, BETAS = 6, 7, 1e-2, 0.1, (0.8, 0.9)
ALPHA, OUTSIDE, GAMMA = 0.3, 0.4, 1.01


def gradients(shape: tuple[int, ...], steps: int, seed: int = 3) -> list[Tensor]:
    """With a falling spectrum, of sizes that jump, so that the limiter has work to do."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = 1.3 ** -torch.arange(shape[1], dtype=torch.float64)
    return [
        torch.randn(shape, generator=rng, dtype=torch.float64) * spectrum * float(torch.rand(1, generator=rng)) * 5
        for _ in range(steps)
    ]


class Transcription:
    """The paper's algorithm for one matrix, in its own orientation: the columns of G are long, U has r of their dimensions."""

    def __init__(self, weight: Tensor, released: bool) -> None:
        self.turn = weight.shape[0] >= weight.shape[1]
        self.weight = (weight.T if self.turn else weight).double().clone()
        m, n = self.weight.shape
        self.first = self.second = torch.zeros(RANK, n, dtype=torch.float64)
        self.power = torch.zeros(n, dtype=torch.float64)
        self.begun = torch.zeros(n, dtype=torch.bool)
        self.released, self.last, self.t, self.length = released, 0.0, 0, (m - RANK) ** 0.5

    def step(self, grad: Tensor, basis: Tensor) -> None:
        g = (grad.T if self.turn else grad).double()
        self.t += 1
        sigma = basis.T @ g
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * sigma
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * sigma**2
        bc1, bc2 = 1 - BETAS[0] ** self.t, 1 - BETAS[1] ** self.t
        if self.released:
            omega, lr = self.first / (self.second.sqrt() + 1e-8), LR * bc2**0.5 / bc1
        else:
            omega, lr = (self.first / bc1) / ((self.second / bc2).sqrt() + 1e-8), LR
        outside = g - basis @ sigma
        seen = (outside**2).sum(0)
        power = BETAS[0] * self.power + (1 - BETAS[0]) * seen
        self.power = power if self.released else torch.where(self.begun, power, seen)
        self.begun |= seen > 0
        scaled = self.length * outside @ torch.diag(self.power**-0.5)
        size = float(scaled.norm())
        if self.last > 0:
            growth = max(size / (self.last + (1e-8 if self.released else 0.0)), GAMMA) / GAMMA
            scaled, size = scaled / growth, size / growth
        self.last = size
        update = ALPHA * (lr * basis @ omega + LR * OUTSIDE * scaled)
        if self.released:
            self.weight = (self.weight - update) * (1 - LR * DECAY)
        else:
            self.weight = self.weight * (1 - LR * DECAY) - update

    def result(self) -> Tensor:
        return self.weight.T if self.turn else self.weight


def build(param: nn.Parameter, **options: object) -> lo.AliceAdamW:
    usual = {"rank": RANK, "update_proj_gap": GAP, "stagger": False, "lr": LR, "betas": BETAS, "weight_decay": DECAY}
    return lo.AliceAdamW([param], **{**usual, "limiter": GAMMA, **options})


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)) * 0.01)


@pytest.mark.parametrize("released", [False, True], ids=["default", "p from 0"])
@pytest.mark.parametrize("projector", ["svd", "randomized_svd:complement,0.5", "randomized_svd:sample", "dct"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_transcription_over_refreshes(shape, dtype, tolerance, projector, released):
    param = parameter(shape, dtype)
    start = param.detach().clone()
    optimizer, expected = build(param, projector=projector, match_reference=released), Transcription(start, released)
    for grad in gradients(shape, 30):
        param.grad = grad.to(dtype)
        optimizer.step()
        plan = optimizer.plan_of(param)
        basis = plan.projector.basis(plan.space, optimizer.state[param], 0, param.device)
        expected.step(param.grad, basis.matrix.double())
    moved = (expected.result() - start.double()).norm()
    assert (param.detach().double() - expected.result()).norm() / moved < tolerance


def test_the_default_subspace_is_a_few_leading_vectors_and_a_sample_of_what_is_orthogonal_to_them():
    param = parameter((40, 24))
    optimizer = build(param, update_proj_gap=1)
    bases = []
    for grad in gradients((40, 24), 3):
        param.grad = grad
        optimizer.step()
        bases.append(optimizer.state[param]["basis"].clone())
        leading = torch.linalg.svd(grad).Vh[0]
        assert float((bases[-1][:, 0] @ leading).abs()) > 0.99
        torch.testing.assert_close(bases[-1].T @ bases[-1], torch.eye(RANK, dtype=torch.float64))
    for step, basis in enumerate(bases):
        key = derive_key(make_key(0, 0, step, PURPOSE_BASIS), 2)
        sample = gaussian(key, (24, RANK - 1), param.device, torch.float64)
        sample = torch.linalg.qr(sample - basis[:, :1] @ (basis[:, :1].T @ sample)).Q
        torch.testing.assert_close(sample @ sample.T, basis[:, 1:] @ basis[:, 1:].T)
    overlap = (bases[1][:, 1:].T @ bases[2][:, 1:]).square().sum() / (RANK - 1)
    assert overlap < 0.6  # of 5 random vectors in 23 dimensions 0.22 on average


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rounding_outside_of_the_subspace_is_not_blown_up(dtype):
    """A gradient of rank below r has nothing outside, but for rounding: divided by its own size it would be a step of full size."""
    ours, without = parameter((40, 24), dtype), parameter((40, 24), dtype)
    left, right = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (40, 24))
    options = {"projector": "svd", "update_proj_gap": 1}
    optimizers = [build(ours, **options), build(without, complement_scale=0.0, **options)]
    for step in range(12):
        for param, optimizer in zip((ours, without), optimizers, strict=True):
            param.grad = (left * (1.0 + step)) @ right.T
            optimizer.step()
    assert torch.equal(ours, without)
    assert not optimizers[0].state[ours]["complement_power"].any()


def test_a_gradient_that_moves_into_the_subspace_stays_there():
    """p falls to nothing then, and a C of rounding errors over it would grow and grow."""
    param = parameter((40, 24), torch.float32)
    optimizer = build(param, projector="svd", update_proj_gap=1000, weight_decay=0.0)
    grads = [grad.float() for grad in gradients((40, 24), 120)]
    for step, grad in enumerate(grads):
        if step:
            basis = optimizer.state[param]["basis"]
            grad = grad if step < 3 else grad @ basis @ basis.T
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        change = param.detach() - before
        if step > 3:
            outside = change - change @ optimizer.state[param]["basis"] @ optimizer.state[param]["basis"].T
            assert outside.norm() < 1e-3 * change.norm(), step


def test_a_full_rank_subspace_leaves_nothing():
    param, other = parameter((24, 16)), parameter((24, 16))
    optimizers = [build(param, rank=16, projector="svd"), build(other, rank=16, projector="svd", complement_scale=0.0)]
    for grad in gradients((24, 16), 9):
        for each, optimizer in zip((param, other), optimizers, strict=True):
            each.grad = grad
            optimizer.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_that_are_zero_or_not_finite_leave_the_limiter_and_a_nan_leaves_p(value):
    param = parameter((40, 24))
    optimizer = build(param)
    for grad in gradients((40, 24), 3):
        param.grad = grad
        optimizer.step()
    state = optimizer.state[param]
    before = {name: state[name].clone() for name in ("limiter_norm", "complement_power")}
    param.grad = torch.full((40, 24), value, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(state["limiter_norm"], before["limiter_norm"])
    kept = before["complement_power"] * (BETAS[0] if value == 0.0 else 1.0)
    torch.testing.assert_close(state["complement_power"], kept)


def test_a_line_that_begins_late_begins_at_its_own_size():
    param = parameter((40, 24))
    optimizer = build(param, projector="svd", update_proj_gap=1000)
    grads = gradients((40, 24), 4)
    for step, grad in enumerate(grads):
        param.grad = grad.clone()
        param.grad[5] *= step >= 2
        optimizer.step()
        if step == 1:
            assert optimizer.state[param]["complement_power"][5] == 0.0
        if step == 2:
            basis = optimizer.state[param]["basis"]
            outside = grad[5] - basis @ (basis.T @ grad[5])
            torch.testing.assert_close(optimizer.state[param]["complement_power"][5], outside.square().sum())


def test_a_stack_of_experts_is_its_matrices_one_by_one():
    stack = nn.Parameter(torch.randn(3, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    singles = [nn.Parameter(m.clone()) for m in stack.detach()]
    together, apart = build(stack, projector="svd"), [build(p, projector="svd") for p in singles]
    for grads in zip(*(gradients((20, 16), 10, seed) for seed in range(3)), strict=True):
        stack.grad = torch.stack(grads)
        together.step()
        for param, optimizer, grad in zip(singles, apart, grads, strict=True):
            param.grad = grad
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in singles]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"state_bits": 8, "basis_bits": 16}, {"state_bits": 8, "basis_bits": 8}], ids=str
)
def test_memory_is_that_of_fira_and_one_number_for_each_line(options):
    sizes = {}
    for kind in (lo.AliceAdamW, lo.FiraAdamW):
        param = nn.Parameter(torch.zeros(512, 384, dtype=torch.bfloat16))
        optimizer = kind([param], rank=256, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        sizes[kind] = sum(lo.state_bytes(optimizer).values())
    assert sizes[lo.AliceAdamW] == sizes[lo.FiraAdamW] + 4 * 512
    assert sizes[lo.AliceAdamW] < 1.03 * sizes[lo.FiraAdamW]


def test_the_defaults_are_those_of_the_paper_and_bad_ones_raise():
    (group,) = build(parameter((40, 24)), betas=(0.7, 0.9)).param_groups
    assert (group["scale"], group["complement_scale"], group["limiter"]) == (0.3, 0.4, 1.01)
    assert (group["betas"], group["complement_beta"]) == ((0.7, 0.9), None)
    assert lo.by_name("alice") is lo.AliceAdamW
    for options, message in (
        ({"complement_scale": -0.1}, "complement_scale is -0.1; it must be at least 0"),
        ({"limiter": 0.9}, "limiter is 0.9; it must be None or at least 1"),
        ({"betas": 0.9}, r"betas is 0.9; it must be two numbers in \[0, 1\)"),
        ({"projector": "random:gaussian"}, "is not orthonormal"),
        ({"proj_type": "full"}, 'proj_type="full" has no rows or columns'),
    ):
        with pytest.raises(ValueError, match=message):
            build(parameter((40, 24)), **options)
