"""FoldedAdam (FOAM): the numbers of its equations, what it stores, matrices of every kind, few bits, resume, bad input."""

import math

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.oracles.runs import check_resume_and_in_backward

LR, DECAY, STEPS = 0.01, 0.1, 6
BETAS, EPS = (0.9, 0.95), 1e-6
SHAPES = ((12, 8), (5, 23), (3, 6, 10))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(shape, step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """With a mean that neighbours share, columns of different sizes, and a row of zeros."""
    grad = numbers(*shape, seed=100 + step) + 0.5 * numbers(*shape[:-1], 1, seed=50 + step)
    grad = grad * torch.logspace(-2, 1, shape[-1], dtype=torch.float64)
    grad[..., 1, :] = 0.0
    return grad.to(dtype)


def trained(rule: lo.Rule, shape, dtype=torch.float64, steps=STEPS, **options) -> torch.Tensor:
    weight = nn.Parameter(numbers(*shape, dtype=dtype))
    optimizer = lo.LowRankOptimizer([weight], rule=rule, lr=LR, weight_decay=DECAY, **options)
    for step in range(steps):
        weight.grad = gradient(shape, step, dtype)
        optimizer.step()
    return weight.detach()


# ------------------------------------------------------------------------------------- the equations, an element at a time


def expected(shape, fold: int, kappa: float, scale: float, released: bool = False) -> torch.Tensor:
    """Six steps, block by block and element by element; what is missing of a row's last block counts as zeros."""
    weight, cols = numbers(*shape).view(-1, shape[-1]).tolist(), shape[-1]
    beta1, beta2 = BETAS
    moments: dict[tuple[int, int], tuple[float, float]] = {}
    for step in range(STEPS):
        t = step + 1
        bc1, bc2 = 1.0 - beta1**t, 1.0 - beta2**t
        for i, row in enumerate(gradient(shape, step).view(-1, cols).tolist()):
            for first in range(0, cols, fold):
                block = row[first : first + fold]
                mean, square = sum(block) / fold, sum(g * g for g in block) / fold
                m, v = moments.get((i, first), (0.0, 0.0))
                m, v = beta1 * m + (1.0 - beta1) * mean, beta2 * v + (1.0 - beta2) * square
                moments[i, first] = m, v
                for j, g in enumerate(block, first):
                    rest = g - mean
                    above, below = m + kappa * rest, v + (kappa * rest) ** 2
                    if released:  # step size η√bc₂/bc₁, ε beside the root, and decay last
                        change = math.sqrt(bc2) / bc1 * scale * above / (math.sqrt(below) + EPS)
                        weight[i][j] = (1.0 - LR * DECAY) * (weight[i][j] - LR * change)
                    else:
                        change = scale * (above / bc1) / (math.sqrt(below / bc2) + EPS)
                        weight[i][j] = (1.0 - LR * DECAY) * weight[i][j] - LR * change
    return torch.tensor(weight, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("level", "kappa", "scale"), [(2, 1.0, 0.25), (1, 0.5, 1.0), (3, 0.0, 1.0), (0, 1.0, 2.0)])
def test_the_numbers_are_those_of_the_equations(shape, level, kappa, scale):
    rule = lo.FoldedAdam(BETAS, EPS, level=level, residual_scale=kappa, step_scale=scale)
    want = expected(shape, 2**level, kappa, scale)
    assert float((want - numbers(*shape)).abs().max()) > 0.01
    torch.testing.assert_close(trained(rule, shape), want, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(trained(rule, shape, torch.float32), want.float(), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_match_reference_has_the_numbers_of_the_released_code(shape):
    rule = lo.FoldedAdam(BETAS, EPS, step_scale=0.25)
    want = expected(shape, 4, 1.0, 0.25, released=True)
    assert not torch.allclose(want, expected(shape, 4, 1.0, 0.25), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(trained(rule, shape, match_reference=True), want, rtol=0.0, atol=1e-10)


def test_level_0_is_adam():
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 1e-7)):
        found, adam = (trained(rule(BETAS, EPS), (12, 23), dtype) for rule in (Level0, lo.Adam))
        torch.testing.assert_close(found, adam, rtol=0.0, atol=atol)


def Level0(betas, eps):
    return lo.FoldedAdam(betas, eps, level=0)


# ------------------------------------------------------------------------------------------------------------------- state


def test_moments_have_a_column_for_each_block_of_neighbours():
    weights = {level: nn.Parameter(numbers(6, 23)) for level in (0, 2, 8)}
    for level, weight in weights.items():
        optimizer = lo.LowRankOptimizer([weight], rule=lo.FoldedAdam(level=level))
        weight.grad = gradient((6, 23), 0)
        optimizer.step()
        state = optimizer.state[weight]
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (6, {0: 23, 2: 6, 8: 1}[level])
    torch.testing.assert_close(state["exp_avg"][:, 0], 0.1 * gradient((6, 23), 0).sum(1) / 256)


@pytest.mark.parametrize(("bits", "bound"), [(16, 5e-3), (8, 0.03), (4, 0.4)])
def test_moments_in_few_bits_change_updates_by_little(bits, bound):
    shape, rule = (128, 256), lo.FoldedAdam(BETAS)
    start, exact = numbers(*shape, dtype=torch.float32), trained(rule, shape, torch.float32)
    found = trained(rule, shape, torch.float32, state_bits=bits)
    assert 0.0 < float((found - exact).norm()) < bound * float((exact - start).norm())


def test_columns_of_codes_have_scales_by_the_squares_of_their_blocks():
    weight = nn.Parameter(numbers(128, 256, dtype=torch.float32))
    optimizer = lo.LowRankOptimizer([weight], rule=lo.FoldedAdam(BETAS), state_bits=8)
    weight.grad = gradient((128, 256), 0, torch.float32)
    optimizer.step()
    state = optimizer.state[weight]
    assert (state["exp_avg"].dtype, tuple(state["exp_avg"].shape)) == (torch.int8, (128, 64))
    squares = weight.grad.double().square().view(128, 64, 4).mean(-1)
    squares = torch.cat([squares[:1], squares[2:]])
    fourth = (squares / squares.sum(1, keepdim=True)).pow(4).sum(0) ** 0.125
    scale = (fourth / fourth.max()).to(torch.bfloat16).float()
    torch.testing.assert_close(state["col_scale"], scale.view(1, 64), rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_run_resumes_to_the_bit_with_updates_in_backward(bits):
    def build(model):
        options = {"state_bits": bits, "level": 1}
        return lo.FOAMAdamW(lo.param_groups(model, **lo.FOAMAdamW.matrix_options), **options)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 90), nn.GELU(), nn.Linear(90, 96))

    check_resume_and_in_backward(make, build)


def test_another_level_is_a_new_layout_of_the_state():
    weight = nn.Parameter(numbers(12, 16))
    optimizer = lo.LowRankOptimizer([weight], rule=lo.FoldedAdam())
    weight.grad = gradient((12, 16), 0)
    optimizer.step()
    optimizer.param_groups[0]["level"] = 3
    with pytest.raises(ValueError, match=r"call optimizer.change_group\(0"):
        optimizer.step()
    optimizer.param_groups[0]["level"] = 2
    optimizer.change_group(0, level=3)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].shape == (12, 2)
    assert float(optimizer.state[weight]["step"]) == 1.0
    other = lo.LowRankOptimizer([nn.Parameter(numbers(12, 16))], rule=lo.FoldedAdam())
    with pytest.raises(
        ValueError, match=r"exp_avg is torch.float64 \(12, 2\) in the checkpoint, torch.float64 \(12, 4\) here"
    ):
        other.load_state_dict(optimizer.state_dict())


# ------------------------------------------------------------------------------------------------------ matrices of every kind


def moved(rule: lo.Rule, weight: torch.Tensor, grad: torch.Tensor, **group) -> torch.Tensor:
    """What one step takes from the weights."""
    param = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    optimizer = lo.LowRankOptimizer([{"params": [param], **group}], rule=rule, lr=1.0)
    param.grad = grad
    optimizer.step()
    return weight - param.detach()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_trained_by_its_matrix_view(order):
    weight, grad = numbers(8, 6, 3, 3), numbers(8, 6, 3, 3, seed=1)
    found = moved(lo.FoldedAdam(), *(tensor.contiguous(memory_format=order) for tensor in (weight, grad)))
    want = moved(lo.FoldedAdam(), weight.reshape(8, 54), grad.reshape(8, 54))
    assert float(want.abs().max()) > 0.5
    torch.testing.assert_close(found.reshape(8, 54), want)


def test_neighbours_of_a_transposed_matrix_are_those_of_its_layout():
    weight, grad = numbers(12, 7), gradient((12, 7), 0)
    found = moved(lo.FoldedAdam(), weight, grad, layout="transposed")
    torch.testing.assert_close(found.T, moved(lo.FoldedAdam(), weight.T.contiguous(), grad.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_updated_in_float32(dtype):
    weight, grad = numbers(40, 26).to(dtype), numbers(40, 26, seed=1).to(dtype)
    found = moved(lo.FoldedAdam(), weight, grad)
    want = weight - (weight.float() - moved(lo.FoldedAdam(), weight.double(), grad.double()).float()).to(dtype)
    torch.testing.assert_close(found, want, rtol=0.0, atol=2**-6 if dtype == torch.bfloat16 else 2**-9)


def test_a_linear_layer_with_8_bit_weights_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    lo.nn.quantize_weights_(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lo.FOAMAdamW(lo.param_groups(model, **lo.FOAMAdamW.matrix_options), lr=0.4)
    model(numbers(16, 64, dtype=torch.float32)).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, grad in zip(model.parameters(), before, grads, strict=True):
        change = (old - p.detach()).float()
        want = moved(lo.FoldedAdam((0.9, 0.95), step_scale=0.1), torch.zeros(64, 64), grad.float())
        assert float((change - want).norm() / want.norm()) < 0.1


# ------------------------------------------------------------------------------------------------------------------ the preset


def test_foam_folds_matrices_and_trains_all_else_by_adamw():
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(20, 12), "up": nn.Linear(12, 14), "lm_head": nn.Linear(14, 20, bias=False)}
    model = nn.ModuleDict(layers)
    optimizer = lo.FOAMAdamW(lo.param_groups(model, **lo.FOAMAdamW.matrix_options), weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    others = {name: nn.Parameter(p.clone()) for name, p in before.items() if name != "up.weight"}
    decayed, bias = [p for p in others.values() if p.ndim > 1], {"params": [others["up.bias"]], "weight_decay": 0.0}
    reference = torch.optim.AdamW([{"params": decayed}, bias], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    matrix = nn.Parameter(before["up.weight"].clone())
    rule = lo.FoldedAdam((0.9, 0.95), level=2, step_scale=0.25)
    alone = lo.LowRankOptimizer([matrix], rule=rule, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for number, (name, p) in enumerate(model.named_parameters()):
            p.grad = numbers(*p.shape, seed=10 * step + number, dtype=torch.float32)
            others.get(name, matrix).grad = p.grad.clone()
        for each in (optimizer, reference, alone):
            each.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), others.get(name, matrix).detach(), rtol=0.0, atol=1e-6)
    assert optimizer.state[model["up"].weight]["exp_avg"].shape == (14, 3)


# -------------------------------------------------------------------------------------------------------------------- bad input


def test_vectors_are_refused_by_name_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"parameter bias \(5,\) is no matrix, and the rule 'folded_adam'.*lo.Adam\(\)"
    ):
        lo.LowRankOptimizer([("bias", nn.Parameter(torch.zeros(5)))], rule=lo.FoldedAdam())


@pytest.mark.parametrize("size", [{"rank": 4}, {"density": 0.5, "projector": "coordinate"}], ids=str)
def test_subspaces_are_refused_by_name_with_the_way_out(size):
    group = {"params": [("up", nn.Parameter(torch.zeros(12, 8)))], **size}
    with pytest.raises(
        ValueError, match=r"parameter up \(12, 8\) is in a group with rank.*'folded_adam' works on whole"
    ):
        lo.LowRankOptimizer([group], rule=lo.FoldedAdam())
    optimizer = lo.LowRankOptimizer([nn.Parameter(torch.zeros(12, 8))], rule=lo.FoldedAdam())
    with pytest.raises(ValueError, match="works on whole"):
        optimizer.change_group(0, rank=4, rule="folded_adam")


def test_groups_that_say_nothing_of_the_rule_are_refused():
    with pytest.raises(ValueError, match=r"FOAMAdamW\(lo.param_groups\(model, rule='folded_adam'\)\)"):
        lo.FOAMAdamW(nn.Linear(4, 4).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": -1}, "level is -1; it must be an int from 0 to 10"),
        ({"level": 11}, "level is 11"),
        ({"level": 2.0}, "level is 2.0"),
        ({"level": True}, "level is True"),
        ({"residual_scale": -0.5}, "residual_scale is -0.5; it must be at least 0"),
        ({"step_scale": 0.0}, "step_scale is 0.0; it must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lo.LowRankOptimizer([nn.Parameter(torch.zeros(5, 4))], rule=lo.FoldedAdam(**options))


def test_operands_that_do_not_fit_are_refused_before_anything_changes():
    def call(weight=(4, 10), grad=(4, 10), moment=(4, 3), fold=4):
        weight, grad, m, v = (torch.zeros(shape) for shape in (weight, grad, moment, moment))
        scalars = torch.tensor([0.9, 0.99, 1e-8, 1.0, 1.0, 0.1, 1.0], dtype=torch.float64)
        torch.ops.lowrank_optim.folded_adam_dense_(weight, grad, m, v, scalars, None, None, fold)

    call()
    for given, message in (
        ({"fold": 3}, "fold is 3; needed: a power of two from 1 to 1024"),
        ({"fold": 2048}, "fold is 2048"),
        ({"moment": (4, 2)}, r"exp_avg is \(4, 2\).*needed: \(4, 3\), one column for each 4"),
        ({"grad": (4, 9)}, "the weight's shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**given)
