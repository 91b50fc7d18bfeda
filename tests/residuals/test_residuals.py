"""Fira, APOLLO and free combinations: against float64 transcriptions, and what must hold whatever the gradients are."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim as lo
from lowrank_optim.kernels import compute as kernels
from lowrank_optim.residuals.registry import residual_from_name

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
RANK, GAP, LR, DECAY, BETAS = 6, 7, 1e-2, 0.1, (0.9, 0.99)


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients with a clear spectrum and sizes that jump, so that the limiter has work to do."""
    rng = torch.Generator().manual_seed(3)
    short = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], short, generator=rng, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], short, generator=rng, dtype=torch.float64)).Q
    spectrum = 1.3 ** -torch.arange(short, dtype=torch.float64)
    out = []
    for _ in range(steps):
        mix = torch.randn(short, short, generator=rng, dtype=torch.float64) * 0.3 + torch.eye(short)
        out.append((u * spectrum) @ mix @ v.T * float(torch.rand(1, generator=rng)) * 5)
    return out


class Transcription:
    """Fira and APOLLO as the papers state them, one matrix, float64, on the side that `std` projects."""

    def __init__(self, weight: Tensor, method: str, alpha: float, released: bool = False, eps: float = 1e-8) -> None:
        self.flip = weight.shape[0] < weight.shape[1]
        self.weight = (weight.T if self.flip else weight).double().clone()
        self.method, self.alpha, self.released, self.eps = method, alpha, released, eps
        self.basis = self.last = None
        self.m = self.v = 0.0
        self.t = 0

    def step(self, grad: Tensor) -> None:
        g = (grad.T if self.flip else grad).double()
        if self.t % GAP == 0:
            # Of the gradient as it is: the released code does not fix signs, so they are LAPACK's for this orientation.
            u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
            new = u[:, :RANK] if self.flip else vh[:RANK].T
            if self.basis is not None and not self.released:
                new = new * torch.where((new * self.basis).sum(0) < 0, -1.0, 1.0)
            self.basis = new
        self.t += 1
        r = g @ self.basis
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * r
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * r * r
        bc1, bc2 = 1 - BETAS[0] ** self.t, 1 - BETAS[1] ** self.t
        if self.released:  # ε beside the uncorrected root, corrections in the step size
            n, lr = self.m / (self.v.sqrt() + self.eps), LR * bc2**0.5 / bc1
        else:
            n, lr = (self.m / bc1) / ((self.v / bc2).sqrt() + self.eps), LR
        guard = 1e-8 if self.released else 0.0
        dims = (0, 1) if self.method == "tensor" else 1
        phi = n.norm(dim=dims, keepdim=True) / (r.norm(dim=dims, keepdim=True) + guard)
        if self.method == "fira":
            inside = self.alpha if self.released else 1.0
            scaled = phi * (g - inside * r @ self.basis.T)
        else:
            scaled = phi * g
        size = float(scaled.norm())
        if self.last is not None:
            growth = max(size / (self.last + guard), 1.01) / 1.01
            scaled, size = scaled / growth, size / growth
        self.last = size
        update = scaled * self.alpha**0.5
        if self.method == "fira":
            update = self.alpha * n @ self.basis.T + scaled
        if self.released:
            self.weight = (self.weight - lr * update) * (1 - LR * DECAY)
        else:
            self.weight = self.weight * (1 - LR * DECAY) - lr * update

    def result(self) -> Tensor:
        return self.weight.T if self.flip else self.weight


def build(method: str, param: nn.Parameter, **options: object) -> lo.LowRankOptimizer:
    options = {"rank": RANK, "update_proj_gap": GAP, "projector": "svd", "stagger": False, **options}
    common = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, **options}
    if method == "fira":
        return lo.FiraAdamW([param], **common)
    return lo.APOLLOAdamW([param], scale_type=method, **common)


def change(after: Tensor, before: Tensor) -> Tensor:
    return after.double() - before.double()


@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["fira", "channel", "tensor"])
def test_equals_the_transcription_over_refreshes(method, shape, dtype, tolerance, released):
    # Small weights: what is compared is the change of the weights, which float32 weights hold only to their own precision.
    start = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.01).to(dtype)
    param = nn.Parameter(start.clone())
    alpha, eps = 0.25, 1e-6 if released else 1e-8
    optimizer = build(method, param, scale=alpha, match_reference=released, eps=eps)
    expected = Transcription(start, method, alpha, released, eps)
    for grad in gradients(shape, 30):
        param.grad = grad.to(dtype)
        optimizer.step()
        expected.step(param.grad)
    error = (param.detach().double() - expected.result()).norm() / change(expected.result(), start).norm()
    assert error < tolerance


@pytest.mark.parametrize("method", ["fira", "channel"])
def test_bfloat16_weights_follow_the_same_arithmetic(method):
    start = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    param = nn.Parameter(start.clone())
    optimizer = build(method, param, scale=0.25)
    expected = Transcription(start, method, 0.25)
    for grad in gradients((40, 24), 20):
        param.grad = grad.to(torch.bfloat16)
        expected.step(param.grad)
        expected.weight = expected.weight.to(torch.bfloat16).double()
        optimizer.step()
    differing = (param.detach().double() != expected.result()).double().mean()
    assert differing < 0.02


@pytest.mark.parametrize("method", ["fira", "channel", "tensor"])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_stack_of_experts_is_its_matrices_one_by_one(method, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", chunk)
    stack = nn.Parameter(torch.randn(3, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    singles = [nn.Parameter(m.clone()) for m in stack.detach()]
    together = build(method, stack)
    apart = [build(method, p) for p in singles]
    for grads in zip(*(gradients((20, 16), 10) for _ in range(3)), strict=True):
        stack.grad = torch.stack([g * (i + 1) for i, g in enumerate(grads)])
        together.step()
        for i, (param, optimizer) in enumerate(zip(singles, apart, strict=True)):
            param.grad = grads[i] * (i + 1)
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in singles]), rtol=1e-9, atol=1e-11)


def test_fira_of_full_rank_is_galore():
    fira, galore = (nn.Parameter(torch.ones(24, 16, dtype=torch.float64)) for _ in range(2))
    options = {"rank": 16, "scale": 1.0, "projector": "svd", "lr": LR, "update_proj_gap": 5}
    optimizers = [lo.FiraAdamW([fira], **options), lo.GaLoreAdamW([galore], **options)]
    for grad in gradients((24, 16), 20):
        for param, optimizer in zip((fira, galore), optimizers, strict=True):
            param.grad = grad
            optimizer.step()
    torch.testing.assert_close(fira, galore, rtol=1e-7, atol=1e-7)


def test_a_non_orthonormal_basis_gives_the_true_norm_of_the_residual():
    grad = gradients((40, 24), 1)[0]
    projector = lo.Random("gaussian")
    space = projector.space((40, 24), RANK, "std", torch.float64)
    basis = projector.basis(space, {}, 5, grad.device)
    reduced, squares = basis.project_with_norms(grad)
    outside = squares - 2 * reduced.square().sum(1, keepdim=True) + basis.lifted_squares(reduced)
    explicit = (grad - reduced @ basis.matrix.T).square().sum(1, keepdim=True)
    torch.testing.assert_close(outside, explicit)


def test_apollo_scale_enters_as_its_square_root():
    ends = []
    for scale in (1.0, 4.0):
        param = nn.Parameter(torch.zeros(40, 24, dtype=torch.float64))
        optimizer = lo.APOLLOAdamW([param], lr=LR, weight_decay=0.0, rank=RANK, scale=scale)
        for grad in gradients((40, 24), 5):
            param.grad = grad
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[1], 2 * ends[0])


def test_apollo_gives_every_layer_its_own_basis_and_stores_none():
    params = [nn.Parameter(torch.ones(40, 24, dtype=torch.float64)) for _ in range(2)]
    optimizer = lo.APOLLOMiniAdamW(params, lr=LR, rank=1)
    assert lo.state_bytes(optimizer).keys() == {"exp_avg", "exp_avg_sq", "last_refresh", "limiter_norm", "step"}
    for param in params:
        param.grad = gradients((40, 24), 1)[0]
    optimizer.step()
    first, second = (optimizer.state[p]["exp_avg"].flatten() for p in params)
    assert first.shape == (40,)
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, dim=0))) < 0.99


@pytest.mark.parametrize("method", ["fira", "channel", "tensor"])
def test_the_limiter_bounds_growth_and_recovers_at_once_from_a_zero_gradient(method):
    param = nn.Parameter(torch.ones(40, 24))
    optimizer = build(method, param, update_proj_gap=1000)
    grads = [g.float() for g in gradients((40, 24), 12)]
    memory = []
    for step, grad in enumerate(grads):
        param.grad = torch.zeros_like(param) if step in (0, 6) else grad
        optimizer.step()
        memory.append(float(optimizer.state[param]["limiter_norm"]))
    assert memory[0] == 0.0
    assert memory[6] == memory[5] > 0  # nothing of a zero gradient enters
    for before, after in itertools.pairwise(memory[1:]):
        assert after <= 1.01 * before * (1 + 1e-5)
    assert memory[7] > 0.5 * memory[5]


@pytest.mark.parametrize("residual", ["norm_scaled", "gradient_scaled", "complement_scaled"])
def test_an_ignored_step_leaves_what_was_remembered_of_the_healthy_experts_too(residual):
    param = nn.Parameter(torch.ones(2, 40, 24))
    optimizer = lo.LowRankOptimizer([param], rule=lo.Adam(), residual=residual, rank=RANK, lr=LR)
    optimizer._mask_on_device = True
    for step in range(3):
        param.grad = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(step))
        if step == 2:
            before = {name: tensor.clone() for name, tensor in optimizer.state[param].items()}
            param.grad[1, 3, 4] = torch.nan
        optimizer.step()
    state = optimizer.state[param]
    assert (before["limiter_norm"] > 0).all()
    for name in before.keys() - {"step"}:
        assert torch.equal(state[name], before[name]), name


def test_without_a_limiter_nothing_is_remembered():
    param = nn.Parameter(torch.ones(40, 24))
    optimizer = build("fira", param, limiter=None)
    param.grad = gradients((40, 24), 1)[0].float()
    optimizer.step()
    assert optimizer.state[param]["limiter_norm"] == 0.0


class Allocations(TorchDispatchMode):
    """Records the largest tensor that is newly allocated, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        inputs |= {x.untyped_storage().data_ptr() for x in (kwargs or {}).values() if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, out.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["fira", "channel", "galore", "sign"])
def test_a_step_allocates_no_matrix_of_the_weights_size(method, shape, dtype, monkeypatch):
    chunk = 128
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", chunk)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    options = {"rank": 2, "lr": LR, "update_proj_gap": 100}
    if method == "galore":
        optimizer = lo.GaLoreAdamW([param], **options)
    elif method == "sign":
        optimizer = lo.LowRankOptimizer([param], rule=lo.Adam(), residual="sign", **options)
    else:
        optimizer = build(method, param, **options)
    grads = gradients(shape, 3)
    for step, grad in enumerate(grads):
        param.grad = grad.to(dtype)
        with Allocations() as seen:
            optimizer.step()
        if step:  # the first step refreshes the subspace
            assert seen.largest <= max(chunk, 2 * max(shape))
    assert 2 * max(shape) < param.numel() / 4


RULES = [
    lo.Adam(),
    lo.Adafactor(scale_parameter=False, relative_step=False),
    lo.Lion(),
    lo.SGD(0.9),
    lo.SGD(0.9, True),
    lo.RMSprop(),
]
PROJECTORS = [
    "svd",
    "randomized_svd",
    "random",
    "random:gaussian",
    "coordinate",
    "coordinate:rows",
    "coordinate:entries",
    "power_iteration",
    "blocks",
    "dct",
]
RESIDUALS = ["none", "sgd", "sign", "error_feedback", "norm_scaled", "gradient_scaled", "complement_scaled"]
REFUSED = {
    *itertools.product(["coordinate:entries", "blocks"], ["norm_scaled", "gradient_scaled", "complement_scaled"]),
    *itertools.product(["random:gaussian"], ["sgd", "sign", "error_feedback", "complement_scaled"]),
}


def relative_error_after_sensing(optimizer_of, steps: int = 300) -> float:
    """‖X − X*‖/‖X*‖ after training X on Gaussian measurements of a matrix of rank 2."""
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(12, 2, generator=rng) @ torch.randn(2, 8, generator=rng)
    operator = torch.randn(2 * 96, 96, generator=rng) / 192**0.5
    param = nn.Parameter(torch.zeros(12, 8))
    optimizer = optimizer_of(param)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(steps):
        param.grad = (operator.T @ (operator @ (param.detach() - target).flatten())).view(12, 8)
        optimizer.step()
        decay.step()
    return float((param.detach() - target).norm() / target.norm())


@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("rule", RULES, ids=["adam", "adafactor", "lion", "momentum", "nesterov", "rmsprop"])
def test_every_combination_trains_matrix_sensing_or_raises_at_construction(rule, projector, residual, policy):
    # What is fed back has waited for its rows to be chosen, and comes at once: momentum takes it worse, Adafactor clips it.
    rates = {"sgd": 0.006, "adafactor": 0.2} if residual == "error_feedback" else {"sgd": 0.02}

    def build_one(param: nn.Parameter) -> lo.LowRankOptimizer:
        return lo.LowRankOptimizer(
            [param],
            rule=rule,
            residual=residual,
            projector=projector,
            on_refresh=policy,
            **({"density": 1.0} if projector == "blocks" else {"rank": 4}),
            update_proj_gap=10,
            lr=rates.get(rule.name, 0.1),
        )

    if (projector, residual) in REFUSED or (projector == "blocks" and policy != "reset"):
        with pytest.raises(ValueError, match="use "):
            build_one(nn.Parameter(torch.zeros(12, 8)))
        return
    assert relative_error_after_sensing(build_one) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "norm_scale"}, "did you mean 'norm_scaled'"),
        ({"residual": "norm_scaled", "proj_type": "full"}, 'proj_type="full" has no rows or columns'),
        ({"residual": "sgd", "residual_lr_scale": -1.0}, "residual_lr_scale is -1.0; it must be at least 0"),
        ({"residual": "norm_scaled", "limiter": 0.5}, "limiter is 0.5; it must be None or at least 1"),
        (
            {"residual": lo.GradientScaled(scale_type="row")},
            "scale_type is 'row'; valid values are 'channel', 'tensor'",
        ),
        ({"residual": "gradient_scaled", "scale": -1.0}, "scale is -1.0; its square root is taken"),
        ({"residual": lo.ComplementScaled(limiter=0.5)}, "limiter is 0.5; it must be None or at least 1"),
        ({"residual": lo.ComplementScaled(complement_scale=-1.0)}, "complement_scale is -1.0; it must be at least 0"),
        (
            {"residual": lo.ComplementScaled(complement_beta=1.0)},
            r"complement_beta is 1.0; it must be None or in \[0, 1\)",
        ),
        ({"residual": "complement_scaled", "proj_type": "full"}, 'proj_type="full" has no rows or columns'),
        ({"rule": lo.SGD(0.0, True)}, "nesterov is True with momentum 0"),
        ({"rule": lo.SGD(1.0)}, r"momentum is 1.0; it must be in \[0, 1\)"),
        ({"rule": lo.RMSprop(alpha=1.0)}, r"alpha is 1.0; it must be in \[0, 1\)"),
        ({"rule": lo.Lion((0.9, 1.0))}, r"betas is \(0.9, 1.0\)"),
    ],
)
def test_parts_out_of_range_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        lo.LowRankOptimizer([nn.Parameter(torch.ones(12, 8))], **{"rule": lo.Adam(), "rank": 4, **options})


def test_a_group_may_have_a_residual_of_its_own():
    optimizer = lo.GaLoreAdamW([{"params": [nn.Parameter(torch.ones(12, 8))], "rank": 4, "residual": "sgd"}])
    assert optimizer.param_groups[0]["residual_lr_scale"] == 1.0
    with pytest.raises(ValueError, match="residual is 'sdg': did you mean 'sgd'"):
        lo.GaLoreAdamW([{"params": [nn.Parameter(torch.ones(12, 8))], "rank": 4, "residual": "sdg"}])


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (lo.SGD(0.9), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9)),
        (lo.SGD(0.9, True), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True)),
        (lo.RMSprop(), lambda p: torch.optim.RMSprop(p, lr=LR)),
    ],
    ids=["momentum", "nesterov", "rmsprop"],
)
def test_rules_on_dense_parameters_equal_torch(rule, reference):
    ours, theirs = (nn.Parameter(torch.ones(40, 24)) for _ in range(2))
    optimizers = [lo.LowRankOptimizer([ours], rule=rule, lr=LR), reference([theirs])]
    for grad in gradients((40, 24), 20):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad.float()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_lion_steps_by_the_sign_of_the_interpolated_momentum():
    param = nn.Parameter(torch.zeros(3))
    optimizer = lo.LowRankOptimizer([param], rule=lo.Lion((0.9, 0.5)), lr=0.1)
    # m: 0, then g₁/2; the second step's sign is that of 0.9·m + 0.1·g₂.
    for grad in (torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-4.0, -1.0, 3.0])):
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1 - 0.1, 0.1 + 0.1, 0.0 - 0.1]))


class _Seen(TorchDispatchMode):
    """The names of the package's operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "lowrank_optim":
            self.names.append(op._schema.name.split("::")[1])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (3, 50, 40)])
@pytest.mark.parametrize("residual", ["norm_scaled", "gradient_scaled"])
def test_norms_of_lines_come_from_the_operation_that_makes_the_direction(residual, shape, bits, monkeypatch):
    """And are those of float64 norms of the same direction and gradient; rank 1, coded in rows of its own, has none."""
    monkeypatch.setattr("lowrank_optim.quantization.coded_moments.MIN_CODED", 1)
    steps = []
    sums = type(residual_from_name(residual)).sums
    monkeypatch.setattr(
        type(residual_from_name(residual)),
        "sums",
        lambda self, step, state, options: (steps.append(step), sums(self, step, state, options))[1],
    )
    for rank in (7, 1):
        weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        optimizer = lo.LowRankOptimizer(
            [{"params": [weight], "rank": rank}], rule=lo.Adam(), residual=residual, lr=0.1, state_bits=bits
        )
        for number in range(3):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2 + number))
            steps.clear()
            with _Seen() as seen:
                optimizer.step()
            measured = [name for name in seen.names if name.endswith("direct_with_norms_")]
            assert len(measured) == (0 if bits < 32 and rank == 1 else 1)
            (step,) = steps
            for norm, matrix in zip(step.norms, (step.direction, step.projected), strict=True):
                want = torch.linalg.vector_norm(matrix.double(), dim=-1, keepdim=True)
                torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0.0)
