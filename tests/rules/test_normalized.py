"""RowNorm, Sinkhorn and SAGE: the numbers of their equations, no state without momentum, matrices of every kind, bad input."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.oracles.runs import check_resume_and_in_backward

SHAPES = ((12, 7), (7, 12), (3, 6, 5))
LR, DECAY, STEPS = 0.01, 0.1, 6


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(shape, step: int) -> torch.Tensor:
    """With rows and columns of different sizes, and a row and a column of zeros."""
    grad = numbers(*shape, seed=100 + step)
    grad = grad * torch.logspace(0, -3, shape[-2]).double()[:, None] * torch.logspace(-2, 1, shape[-1]).double()
    grad[..., 1, :] = 0.0
    grad[..., 2] = 0.0
    return grad


def trained(rule: lo.Rule, shape, **options) -> torch.Tensor:
    weight = nn.Parameter(numbers(*shape))
    optimizer = lo.LowRankOptimizer([weight], rule=rule, lr=LR, weight_decay=DECAY, **options)
    for step in range(STEPS):
        weight.grad = gradient(shape, step)
        optimizer.step()
    return weight.detach()


def matrices(tensor: torch.Tensor):
    return tensor.view(-1, *tensor.shape[-2:])


# ------------------------------------------------------------------------------------- the equations, an element at a time


def row_norm(m: torch.Tensor, axis: str, unit: str, eps: float) -> torch.Tensor:
    out = torch.zeros_like(m)
    lines = m if axis == "rows" else m.T
    for i, line in enumerate(lines.tolist()):
        size = math.sqrt(sum(x * x for x in line) / (len(line) if unit == "rms" else 1))
        for j, x in enumerate(line):
            out[(i, j) if axis == "rows" else (j, i)] = x / max(size, eps)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("axis", "unit", "momentum"), [("rows", "rms", 0.0), ("rows", "norm", 0.9), ("columns", "rms", 0.8)]
)
def test_row_norm_has_the_numbers_of_its_equation(shape, axis, unit, momentum):
    found = trained(lo.RowNorm(momentum, axis, unit, norm_eps=1e-3), shape)
    for n, weight in enumerate(matrices(numbers(*shape))):
        m = torch.zeros_like(weight)
        for step in range(STEPS):
            m = momentum * m + (1.0 - momentum) * matrices(gradient(shape, step))[n]
            weight = (1.0 - LR * DECAY) * weight - LR * row_norm(m, axis, unit, 1e-3)
        torch.testing.assert_close(matrices(found)[n], weight, rtol=0.0, atol=1e-10)


def sinkhorn(x: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    m, n = x.shape
    for _ in range(iterations):
        x = torch.stack([math.sqrt(n) * row / (row.norm() + eps) for row in x])
        x = torch.stack([math.sqrt(m) * column / (column.norm() + eps) for column in x.T], 1)
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("iterations", "momentum"), [(5, 0.0), (1, 0.0), (3, 0.9)])
def test_sinkhorn_has_the_numbers_of_its_equation(shape, iterations, momentum):
    found = trained(lo.Sinkhorn(momentum, iterations, step_scale=0.5, norm_eps=1e-3), shape)
    for n, weight in enumerate(matrices(numbers(*shape))):
        m = torch.zeros_like(weight)
        for step in range(STEPS):
            m = momentum * m + (1.0 - momentum) * matrices(gradient(shape, step))[n]
            weight = (1.0 - LR * DECAY) * weight - 0.5 * LR * sinkhorn(m, iterations, 1e-3)
        torch.testing.assert_close(matrices(found)[n], weight, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_sage_has_the_numbers_of_its_equations(shape):
    beta1, beta2 = 0.9, 0.8
    found = trained(lo.SAGE((beta1, beta2)), shape)
    for n, weight in enumerate(matrices(numbers(*shape))):
        m, mean = torch.zeros_like(weight), torch.zeros(shape[-1]).double()
        for step in range(STEPS):
            grad = matrices(gradient(shape, step))[n]
            now = grad.abs().mean(0)
            mean = beta2 * mean + (1.0 - beta2) * now
            corrected = mean / (1.0 - beta2 ** (step + 1))
            damping = [
                min(float(corrected.square().mean().sqrt() / c), float(now.square().mean().sqrt() / s), 1.0)
                if s > 0
                else 1.0
                for c, s in zip(corrected, now, strict=True)
            ]
            direction = torch.tensor(damping, dtype=torch.float64) * torch.sign(beta1 * m + (1.0 - beta1) * grad)
            m = beta2 * m + (1.0 - beta2) * grad
            weight = (1.0 - LR * DECAY) * weight - LR * direction
        torch.testing.assert_close(matrices(found)[n], weight, rtol=0.0, atol=1e-10)


def test_rows_and_columns_of_sinkhorn_are_of_one_size():
    x = (
        lo.Sinkhorn(iterations=40)
        .direction(
            gradient((12, 7), 0),
            {},
            lo.Sinkhorn(iterations=40).options(),
            lo.Context(1.0, 1.0, torch.zeros(12, 7), None),
        )
        .matrix
    )
    rows, columns = x.square().mean(1), x.square().mean(0)
    kept = [j for j in range(7) if j != 2]
    torch.testing.assert_close(columns[kept], torch.ones(6).double(), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(rows[2:], rows[2:3].expand(10), rtol=1e-6, atol=0.0)
    assert float(rows[1]) == 0.0
    assert float(columns[2]) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-9, 1e15])
def test_sinkhorn_stays_finite_where_squares_vanish_or_are_large(scale):
    grad = gradient((12, 7), 0).float()
    grad[3] *= scale
    grad[:, 4] *= scale
    rule = lo.Sinkhorn()
    found = rule.direction(grad, {}, rule.options(), lo.Context(1.0, 1.0, torch.zeros(12, 7), None)).matrix
    assert bool(torch.isfinite(found).all())
    assert 0.1 < float(found.square().mean().sqrt()) < 2.0


# --------------------------------------------------------------------------------------------------- with and without state


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("rule", [lo.RowNorm(), lo.Sinkhorn()], ids=["row_norm", "sinkhorn"])
def test_without_momentum_there_is_no_state_but_the_counter(rule, bits):
    weight = nn.Parameter(numbers(80, 64, dtype=torch.float32))
    optimizer = lo.LowRankOptimizer([weight], rule=rule, lr=LR, state_bits=bits)
    weight.grad = numbers(80, 64, seed=1, dtype=torch.float32)
    optimizer.step()
    assert list(optimizer.state[weight]) == ["step"]
    saved = optimizer.state_dict()
    assert [list(state) for state in saved["state"].values()] == [["step"]]
    optimizer.load_state_dict(saved)
    assert sum(lo.state_bytes(optimizer).values()) == 4


@pytest.mark.parametrize("rule", [lo.RowNorm(), lo.Sinkhorn()], ids=["row_norm", "sinkhorn"])
def test_momentum_begins_and_ends_with_change_group_only(rule):
    weight = nn.Parameter(numbers(12, 7))
    optimizer = lo.LowRankOptimizer([weight], rule=rule, lr=LR)
    weight.grad = gradient((12, 7), 0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"change_group\(0"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.change_group(0, momentum=0.9)
    weight.grad = gradient((12, 7), 1)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * gradient((12, 7), 1))
    assert float(optimizer.state[weight]["step"]) == 2.0
    optimizer.change_group(0, momentum=0.0)
    assert list(optimizer.state[weight]) == ["step"]


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize(
    "rule", [lo.RowNorm(0.9), lo.RowNorm(), lo.Sinkhorn(), lo.SAGE()], ids=lambda rule: repr(rule)[:20]
)
def test_a_run_resumes_to_the_bit_with_updates_in_backward(rule, rank, bits):
    def build(model):
        kept = [p for p in model.parameters() if p.ndim == 2]
        groups = [
            {"params": kept, "rank": rank, "rule": rule},
            {"params": [p for p in model.parameters() if p.ndim == 1]},
        ]
        return lo.LowRankOptimizer(
            groups, rule="adam", lr=1e-2, update_proj_gap=2, on_refresh="rotate", state_bits=bits
        )

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96))

    check_resume_and_in_backward(make, build)


# ------------------------------------------------------------------------------------------------------ matrices of every kind


def moved(rule: lo.Rule, weight: torch.Tensor, grad: torch.Tensor, **group) -> torch.Tensor:
    """What one step takes from the weights."""
    param = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    optimizer = lo.LowRankOptimizer([{"params": [param], **group}], rule=rule, lr=1.0)
    param.grad = grad
    optimizer.step()
    return weight - param.detach()


RULES = [lo.RowNorm(), lo.RowNorm(axis="columns"), lo.RowNorm(0.5), lo.Sinkhorn(), lo.SAGE()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule)[:26])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_trained_by_its_matrix_view(rule, channels_last):
    order = torch.channels_last if channels_last else torch.contiguous_format
    weight, grad = numbers(8, 6, 3, 3), numbers(8, 6, 3, 3, seed=1)
    found = moved(rule, weight.contiguous(memory_format=order), grad.contiguous(memory_format=order))
    expected = moved(rule, weight.reshape(8, 54), grad.reshape(8, 54))
    assert float(expected.abs().max()) > 0.5
    torch.testing.assert_close(found.reshape(8, 54), expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule)[:26])
def test_a_transposed_matrix_has_the_rows_of_its_layout(rule):
    weight, grad = numbers(12, 7), gradient((12, 7), 0)
    found = moved(rule, weight, grad, layout="transposed")
    torch.testing.assert_close(found.T, moved(rule, weight.T.contiguous(), grad.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_updated_in_float32(dtype):
    weight, grad = numbers(40, 24).to(dtype), numbers(40, 24, seed=1).to(dtype)
    for rule in (lo.RowNorm(), lo.RowNorm(0.5), lo.Sinkhorn()):
        found = moved(rule, weight, grad)
        expected = weight - (weight.float() - moved(rule, weight.double(), grad.double()).float()).to(dtype)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2**-6 if dtype == torch.bfloat16 else 2**-9)


def test_a_linear_layer_with_8_bit_weights_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    lo.nn.quantize_weights_(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lo.LowRankOptimizer(lo.param_groups(model, rule=lo.RowNorm()), rule="row_norm", lr=0.05)
    x = numbers(16, 64, dtype=torch.float32)
    model(x).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, grad in zip(model.parameters(), before, grads, strict=True):
        change = (old - p.detach()).float()
        expected = 0.05 * grad / grad.square().mean(1, keepdim=True).sqrt()
        assert float((change - expected).norm() / expected.norm()) < 0.1


# -------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rule", [lo.RowNorm(), lo.Sinkhorn(), lo.SAGE()], ids=["row_norm", "sinkhorn", "sage"])
def test_vectors_are_refused_by_name_with_the_way_out(rule):
    with pytest.raises(
        ValueError, match=rf"parameter bias \(5,\) is no matrix, and the rule '{rule.name}'.*lo.Adam\(\)"
    ):
        lo.LowRankOptimizer([("bias", nn.Parameter(torch.zeros(5)))], rule=rule)


def test_vectors_of_a_group_go_to_the_dense_rule():
    group = {"params": [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5, 4))], "rule": "row_norm"}
    optimizer = lo.LowRankOptimizer([group], rule="adam")
    assert [sorted(optimizer.state[p]) for p in group["params"]] == [["exp_avg", "exp_avg_sq", "step"], ["step"]]


BAD = [
    (lo.RowNorm, {"momentum": 1.0}, r"momentum is 1.0; it must be in \[0, 1\)"),
    (lo.RowNorm, {"axis": "row"}, "axis is 'row'; valid values are 'rows', 'columns'"),
    (lo.RowNorm, {"unit": "l2"}, "unit is 'l2'; valid values are 'rms', 'norm'"),
    (lo.RowNorm, {"norm_eps": 0.0}, "norm_eps is 0.0; it must be above 0"),
    (lo.Sinkhorn, {"momentum": -0.1}, "momentum is -0.1"),
    (lo.Sinkhorn, {"iterations": 0}, "iterations is 0; it must be an int from 1 to 999"),
    (lo.Sinkhorn, {"iterations": 2.5}, "iterations is 2.5"),
    (lo.Sinkhorn, {"step_scale": 0.0}, "step_scale is 0.0; it must be above 0"),
    (lo.SAGE, {"betas": (0.9, 1.0)}, "betas is"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_values_out_of_range_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        lo.LowRankOptimizer([nn.Parameter(torch.zeros(5, 4))], rule=kind(**options))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_sums_that_normalise_show_whether_a_gradient_is_finite(axis, monkeypatch):
    """The gradient is read for them once, and no other sums are taken; without them, as in backward, the numbers are the same."""
    measured, line_sums = [], lo.kernels.line_sums
    monkeypatch.setattr(lo.kernels, "line_sums", lambda x, *rest: measured.append(x) or line_sums(x, *rest))
    monkeypatch.setattr(lo.kernels, "norms", lambda tensors: pytest.fail("read once more"))
    rule = lo.RowNorm(axis=axis)
    params = [nn.Parameter(numbers(9, 40, seed=i, dtype=torch.float32)) for i in range(3)]
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, other = (lo.LowRankOptimizer(group, rule=rule, lr=LR) for group in (params, others))
    for i, (param, same) in enumerate(zip(params, others, strict=True)):
        param.grad = numbers(9, 40, seed=10 + i, dtype=torch.float32) * 1e10  # the fourth power would be too large
        same.grad = param.grad.clone()
    params[1].grad[3, 5] = others[1].grad[3, 5] = math.nan
    before = [param.detach().clone() for param in params]
    with pytest.warns(RuntimeWarning, match="skipped the update of 0.1"):
        optimizer.step()
    assert [x.data_ptr() for x in measured] == [param.grad.data_ptr() for param in params]
    assert [torch.equal(param, old) for param, old in zip(params, before, strict=True)] == [False, True, False]
    assert optimizer.skipped_updates() == {"0.1": 1}
    monkeypatch.undo()
    for param in others[::2]:
        other.step_param(param)
    with pytest.warns(RuntimeWarning, match="skipped the update of 0.1"):
        other.step_param(others[1])
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


def test_a_profiler_changes_no_bits_of_row_norm():
    ends = []
    for is_profiled in (False, True):
        weight = nn.Parameter(numbers(40, 300, dtype=torch.float32))
        optimizer = lo.LowRankOptimizer([weight], rule=lo.RowNorm(), lr=LR)
        weight.grad = numbers(40, 300, seed=1, dtype=torch.float32)
        with torch.profiler.profile() if is_profiled else nullcontext():
            optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)
