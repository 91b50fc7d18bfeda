"""Parameters of other layouts are trained like the plain matrices that they stand for.

Each test steps the same numbers twice: as the tensor in question and as contiguous 2-D matrices.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
METHODS = ["galore", "galore_adafactor", "fira", "apollo"]
PROJ_TYPES = ["std", "reverse_std", "left", "right", "full"]
PROJECTORS = ["svd", "randomized_svd", "random", "random:gaussian", "coordinate", "coordinate:entries"]
STEPS = 7
# A refresh in between, decay, α: nothing may depend on the layout. Matrices are refreshed together, so that bases are comparable.
OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "update_proj_gap": 3, "stagger": False}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def allowed(name: str, projector: str, proj_type: str) -> bool:
    """Whether this method can project so: coordinates have one side, and norms of lines need lines."""
    if proj_type == "full":
        return "coordinate" not in projector and name.startswith("galore")
    return "entries" not in projector or name.startswith("galore")


def train(
    name: str,
    start: list[Tensor],
    gradients: Callable[[int], list[Tensor]],
    place: Callable[[Tensor], Tensor] = Tensor.contiguous,
    **options: object,
) -> tuple[list[nn.Parameter], lo.LowRankOptimizer]:
    """Train parameters with the values of `start`; `place` chooses how parameters and gradients lie in memory."""
    params = [nn.Parameter(place(tensor.clone())) for tensor in start]
    optimizer = lo.by_name(name)(params, **{**OPTIONS, **options})
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = place(grad.clone())
        optimizer.step()
    return params, optimizer


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=0, atol=tolerance)


def moved(a: Tensor, b: Tensor) -> bool:
    """Whether training has changed nearly all of the tensor."""
    return bool((a.detach() != b).double().mean() > 0.8)


# ----------------------------------------------------------------------------------------------------------------- transposed


@pytest.mark.parametrize(
    ("name", "projector", "proj_type"),
    [c for c in itertools.product(METHODS, PROJECTORS, PROJ_TYPES) if allowed(*c)],
)
def test_a_transposed_weight_is_trained_like_the_linear_weight(name, projector, proj_type):
    for rows, cols in ((20, 12), (12, 20), (16, 16)):  # of the linear weight, (out, in)
        options = {"rank": 5, "projector": projector, "proj_type": proj_type}
        weight = draw(1, rows, cols)

        def gradients(step: int, rows: int = rows, cols: int = cols) -> list[Tensor]:
            return [draw(100 + step, rows, cols)]

        (linear,), optimizer = train(name, [weight], gradients, **options)
        (stored,), transposed = train(
            name, [weight.T], lambda s: [g.T for g in gradients(s)], layout="transposed", **options
        )
        assert stored.shape == (cols, rows)
        assert moved(linear, weight)
        assert_close(stored.T, linear, 1e-7)
        for key, value in optimizer.state[linear].items():
            assert transposed.state[stored][key].shape == value.shape, key
            # Signs of singular vectors may be anything that LAPACK finds.
            assert_close(transposed.state[stored][key].abs(), value.abs(), 1e-7)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_layout_decides_the_side_of_a_transposed_weight(proj_type):
    param = nn.Parameter(torch.zeros(12, 20))  # stands for a Linear weight of 20×12
    optimizer = lo.GaLoreAdamW([param], rank=5, proj_type=proj_type, layout="transposed")
    shapes = {name: tuple(t.shape) for name, t in optimizer.state[param].items() if t.dim()}
    moments = {"std": (20, 5), "reverse_std": (12, 5), "left": (12, 5), "right": (20, 5), "full": (5, 5)}[proj_type]
    assert shapes["exp_avg"] == shapes["exp_avg_sq"] == moments
    bases = {"std": (12, 5), "reverse_std": (20, 5), "left": (20, 5), "right": (12, 5), "full": (20, 5)}
    assert shapes["basis"] == bases[proj_type]


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_transposed_bfloat16_weight_is_trained_like_the_linear_weight(name, stochastic):
    options = {"rank": 5, "projector": "svd", "stochastic_rounding": stochastic}
    weight = draw(1, 20, 12).to(BF16)
    (linear,), _ = train(name, [weight], lambda s: [draw(s, 20, 12).to(BF16)], **options)
    (stored,), _ = train(name, [weight.T], lambda s: [draw(s, 20, 12).T.to(BF16)], layout="transposed", **options)
    # The same noise: differences come from the last bit of float32 products, and are rare.
    assert moved(linear, weight)
    assert float((linear != stored.T).double().mean()) < 0.02
    assert_close(stored.T, linear, 0.04)


# --------------------------------------------------------------------------------------------------------------- convolutions


def as_matrices(tensors: list[Tensor]) -> list[Tensor]:
    return [t.reshape(t.shape[0], -1) for t in tensors]


CONVOLUTIONS = {
    "conv1d": ((16, 6, 3), "conv"),
    "conv2d": ((16, 6, 3, 3), "auto"),
    "conv2d, wide": ((9, 8, 3, 3), "auto"),
    "conv2d, 1x1": ((16, 12, 1, 1), "auto"),
    "conv3d": ((12, 4, 3, 2, 2), "auto"),
    "conv2d, said": ((16, 6, 3, 3), "conv"),
}


@pytest.mark.parametrize(("shape", "layout"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_a_convolution_is_trained_like_the_matrix_of_its_filters(name, shape, layout, dtype):
    options = {"rank": 4, "projector": "svd", "stochastic_rounding": dtype == BF16}
    weight = draw(1, *shape).to(dtype)

    def gradients(step: int) -> list[Tensor]:
        return [draw(50 + step, *shape).to(dtype)]

    (conv,), optimizer = train(name, [weight], gradients, layout=layout, **options)
    (matrix,), plain = train(name, as_matrices([weight]), lambda s: as_matrices(gradients(s)), **options)
    assert moved(matrix, weight.reshape(matrix.shape))
    assert torch.equal(conv.reshape(matrix.shape), matrix)
    for key, value in plain.state[matrix].items():
        assert torch.equal(optimizer.state[conv][key], value), key


FORMATS = {
    "conv2d": ((16, 6, 3, 3), torch.channels_last),
    "conv3d": ((12, 4, 3, 2, 2), torch.channels_last_3d),
}


@pytest.mark.parametrize(("shape", "memory_format"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rank", [4, None], ids=["low-rank", "dense"])
def test_channels_last_and_contiguous_convolutions_are_trained_alike(shape, memory_format, projector, dtype, rank):
    options = {"rank": rank, "projector": projector, "stochastic_rounding": dtype == BF16}
    weight = draw(1, *shape).to(dtype)

    def gradients(step: int) -> list[Tensor]:
        return [draw(50 + step, *shape).to(dtype)]

    (plain,), _ = train("galore", [weight], gradients, **options)
    (last,), _ = train("galore", [weight], gradients, lambda t: t.contiguous(memory_format=memory_format), **options)
    assert last.is_contiguous(memory_format=memory_format)
    assert not last.is_contiguous()
    assert moved(plain, weight)
    assert torch.equal(last, plain)


def test_a_gradient_in_another_memory_format_than_its_parameter_is_read_right():
    weight = draw(1, 16, 6, 3, 3).to(F32)
    finals = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(weight.clone())
        optimizer = lo.GaLoreAdamW([param], rank=4, projector="svd", **OPTIONS)
        for step in range(STEPS):
            param.grad = draw(step, 16, 6, 3, 3).to(F32).contiguous(memory_format=memory_format)
            optimizer.step()
        finals.append(param.detach())
    assert torch.equal(finals[0], finals[1])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_real_convolution_learns_in_both_memory_formats(channels_last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    if channels_last:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4), lr=2e-2, update_proj_gap=10)
    low_rank = {p.shape for p, s in optimizer.state.items() if "basis" in s}
    assert torch.Size([16, 16, 3, 3]) in low_rank
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


# --------------------------------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("shape", [(3, 20, 12), (3, 12, 20), (2, 16, 16), (1, 20, 12)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "proj_type"),
    # With both sides projected, R is diagonal after a refresh but for rounding, which Adam blows up: comparable in float64 only.
    [(d, t) for d in (F32, F64, BF16) for t in PROJ_TYPES if d == F64 or t != "full"],
    ids=str,
)
@pytest.mark.parametrize("rank", [5, 1, 1.0], ids=["rank 5", "rank 1", "full rank"])
def test_a_stack_of_experts_is_trained_like_separate_matrices(shape, rank, dtype, proj_type):
    options = {"rank": rank, "projector": "svd", "proj_type": proj_type, "on_refresh": "rotate"}
    weight = draw(1, *shape).to(dtype)

    def gradients(step: int) -> list[Tensor]:
        return [draw(20 + step, *shape).to(dtype)]

    (stack,), optimizer = train("galore", [weight], gradients, **options)
    matrices, separate = train("galore", list(weight), lambda s: list(gradients(s)[0]), **options)
    assert moved(stack, weight)
    tolerance = {F32: 2e-4, F64: 1e-9, BF16: 0.04}[dtype]
    assert_close(stack, torch.stack([m.detach() for m in matrices]), tolerance)
    if dtype == F64:
        for key in ("basis", "exp_avg", "exp_avg_sq"):
            expected = torch.stack([separate.state[m][key] for m in matrices])
            assert_close(optimizer.state[stack][key].abs(), expected.abs(), 1e-7)


@pytest.mark.parametrize("name", ["fira", "apollo"])
def test_residuals_of_a_stack_are_those_of_separate_matrices(name):
    # Each expert has norms, scales and a limiter of its own. (APOLLO's random bases differ by expert, so it gets the SVD here.)
    options = {"rank": 5, "projector": "svd"}
    weight = draw(1, 3, 20, 12)

    def gradients(step: int) -> list[Tensor]:
        sizes = torch.tensor([1.0, 1e-3, 10.0 * (step + 1)], dtype=F64)  # the limiter acts on the last
        return [draw(20 + step, 3, 20, 12) * sizes.view(3, 1, 1)]

    (stack,), optimizer = train(name, [weight], gradients, **options)
    matrices, separate = train(name, list(weight), lambda s: list(gradients(s)[0]), **options)
    assert_close(stack, torch.stack([m.detach() for m in matrices]), 1e-9)
    limits = torch.stack([separate.state[m]["limiter_norm"] for m in matrices])
    torch.testing.assert_close(optimizer.state[stack]["limiter_norm"], limits, rtol=1e-9, atol=0)


@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_an_expert_without_tokens_stays_as_it_is_while_the_others_train(projector):
    weight = draw(1, 3, 20, 12).to(F32)

    def gradients(step: int) -> list[Tensor]:
        grad = draw(20 + step, 3, 20, 12).to(F32)
        grad[1] = 0.0
        return [grad]

    (stack,), optimizer = train("galore", [weight], gradients, rank=5, projector=projector, weight_decay=0.0)
    assert torch.equal(stack[1], weight[1])
    assert moved(stack[0], weight[0])
    assert moved(stack[2], weight[2])
    basis = optimizer.state[stack]["basis"]
    assert_close(basis.mT @ basis, torch.eye(5).expand(3, 5, 5), 1e-5)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_stack_of_transposed_matrices_is_trained_like_the_transposed_stack(proj_type):
    options = {"rank": 5, "projector": "svd", "proj_type": proj_type}
    weight = draw(1, 3, 20, 12)
    (plain,), _ = train("galore", [weight], lambda s: [draw(s, 3, 20, 12)], **options)
    (stored,), _ = train("galore", [weight.mT], lambda s: [draw(s, 3, 20, 12).mT], layout="transposed", **options)
    assert stored.shape == (3, 12, 20)
    assert_close(stored.mT, plain, 1e-9)


# ------------------------------------------------------------------------------------------------------------------- strides


def column_major(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def windowed(tensor: Tensor) -> Tensor:
    """Every other column of a larger tensor."""
    storage = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    window = storage[..., 1::2]
    window.copy_(tensor)
    return window


@pytest.mark.parametrize("place", [column_major, windowed], ids=["column-major", "window"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 20, 12)], ids=str)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("rank", [5, None], ids=["low-rank", "dense"])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_a_parameter_that_is_not_contiguous_is_trained_like_a_contiguous_one(place, shape, projector, rank, dtype):
    options = {"rank": rank, "projector": projector, "stochastic_rounding": dtype == BF16}
    weight = draw(1, *shape).to(dtype)

    def gradients(step: int) -> list[Tensor]:
        return [draw(20 + step, *shape).to(dtype)]

    (plain,), _ = train("galore", [weight], gradients, **options)
    (other,), _ = train("galore", [weight], gradients, place, **options)
    assert not other.is_contiguous()
    assert moved(plain, weight)
    if dtype == F64:
        assert_close(other, plain, 1e-9)
    else:  # the same noise; the last bit of a float32 product may differ
        assert float((other != plain).double().mean()) < 0.02
        assert_close(other, plain, 0.04)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_leaves_gradients_as_they_are(name):
    params = [
        nn.Parameter(draw(i, *s).to(d))
        for i, s in enumerate(((20, 12), (3, 8, 6), (6, 4, 3, 3), (7,)))
        for d in (F32, BF16)
    ]
    optimizer = lo.by_name(name)(params, rank=3, **OPTIONS)
    for step in range(STEPS):
        kept = []
        for i, param in enumerate(params):
            param.grad = draw(10 * step + i, *param.shape).to(param.dtype)
            kept.append(param.grad.clone())
        optimizer.step()
        for param, grad in zip(params, kept, strict=True):
            assert torch.equal(param.grad, grad)
