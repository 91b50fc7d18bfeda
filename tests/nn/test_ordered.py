"""Ordered layers (Maestro): passes, penalty and proximal step against their formulas, drawn ranks, shrinking with the state."""

import copy
import io
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim.nn import OrderedLinear
from lowrank_optim.nn.ordered import row_norms
from lowrank_optim.nn.ordered_penalty import prox_factors
from tests.nn.test_decompositions_transformers import build as build_transformer
from tests.nn.test_decompositions_transformers import gpt2, llama, vit
from tests.oracles.decompositions import F64, closed_form_inputs, closed_form_weight, truncated
from tests.oracles.runs import check_resume_and_in_backward

M, N = 20, 33


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ordered(m: int = M, n: int = N, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return lo.nn.ordered_(nn.Sequential(nn.Linear(n, m, bias=bias, dtype=F64)), include="0")


# ---------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize(("m", "n"), [(20, 33), (33, 20), (24, 24)])
def test_every_prefix_computes_as_the_best_matrix_of_its_rank(m, n):
    dense = nn.Sequential(nn.Linear(n, m, dtype=F64))
    weight, bias, x = dense[0].weight.detach().clone(), dense[0].bias, draw(3, 4, n)
    layer = lo.nn.ordered_(dense, include="0")[0]
    assert isinstance(layer, OrderedLinear)
    assert layer.bias is bias
    assert layer.rank == layer.active_rank == min(m, n)
    torch.testing.assert_close(layer.weight, weight, atol=1e-13, rtol=1e-13)
    gram = [factor.detach() @ factor.detach().mT for factor in (layer.in_factor, layer.out_factor)]
    torch.testing.assert_close(gram[0], gram[1], atol=1e-12, rtol=1e-12)
    for rank in (1, 7, min(m, n)):
        layer.active_rank = rank
        torch.testing.assert_close(layer(x), x @ truncated(weight, rank).mT + bias, atol=1e-11, rtol=1e-11)
    layer.active_rank = 0
    assert torch.equal(layer(x), bias.expand(3, 4, m))


def test_gradients_are_those_of_the_dense_formula_and_zero_beyond_the_prefix():
    layer = ordered()[0]
    for rank, shape in ((7, (3, 4, N)), (20, (N,)), (5, (0, N)), (0, (2, N))):
        layer.active_rank = rank
        layer.zero_grad()
        x = draw(*shape).requires_grad_()
        exact = x.detach().clone().requires_grad_()
        left, right = (f.detach().clone().requires_grad_() for f in (layer.out_factor, layer.in_factor))
        bias = layer.bias.detach().clone().requires_grad_()
        mask = (torch.arange(layer.rank) < rank).to(F64).unsqueeze(1)
        y, expected = layer(x), F.linear(exact, (left * mask).mT @ right, bias)
        turn = torch.cos(torch.arange(y.numel(), dtype=F64)).view(y.shape)
        y.backward(turn)
        expected.backward(turn)
        pairs = [(y, expected), (x.grad, exact.grad), (layer.bias.grad, bias.grad)]
        pairs += [(layer.out_factor.grad, left.grad), (layer.in_factor.grad, right.grad)]
        for found, want in pairs:
            torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)
        assert torch.count_nonzero(layer.in_factor.grad[rank:]) == 0


def test_golden_numbers():
    """6×8 of closed formulas; the numbers were made by the released code in float64."""
    model, x = ordered(6, 8), closed_form_inputs()
    layer, i, t = model[0], torch.arange(6, dtype=F64), torch.arange(12, dtype=F64).unsqueeze(1)
    layer.set_weight(closed_form_weight(6, 8))
    with torch.no_grad():
        layer.bias.copy_(0.01 * i)
        for v, u in zip(layer.in_factor, layer.out_factor, strict=True):  # the largest entry of each row is positive
            sign = v[v.abs().argmax()].sign()
            v.mul_(sign)
            u.mul_(sign)

    def close(found: Tensor, numbers: list[float]) -> None:
        torch.testing.assert_close(found.detach(), torch.tensor(numbers, dtype=F64), atol=2e-6, rtol=0)

    flat = row_norms(layer.in_factor) * row_norms(layer.out_factor)  # of single components
    close(flat, [3.206127, 2.290701, 2.103774, 0.625025, 0.355074, 0.004169])
    assert (row_norms(layer.in_factor) + row_norms(layer.out_factor)).sum().item() == pytest.approx(12.411084, abs=2e-6)
    close(layer.importance(), [8.584869, 5.378742, 3.088041, 0.984268, 0.359243, 0.004169])
    penalty = lo.nn.ordered_penalty(model)
    penalty.backward()
    assert penalty.item() == pytest.approx(17.325049, abs=2e-6)
    first = [-0.140803, 0.214941, -0.270137, 0.294578, -0.28045, 0.225017, -0.133803, 0.022337]
    close(layer.in_factor.grad[0], first)
    close(layer.in_factor.grad[5], [0.068376, 0.146902, -0.062092, -0.437394, -0.261911, 0.575201, 0.906109, 0.379755])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for rank in (3, 6, 1, 4):
        optimizer.zero_grad()
        layer.active_rank = rank
        loss = 0.5 * (model(x) - torch.cos(0.3 * t + 0.5 * i)).square().sum() / 12
        loss = loss + 0.02 * lo.nn.ordered_penalty(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([8.833912, 8.570994, 4.931343, 7.735083], abs=2e-6)
    layer.active_rank = None
    close(layer.importance(), [7.6881, 4.993068, 2.899249, 0.961506, 0.35488, 0.004036])
    rows = [
        [0.920067, -0.388341, -0.598171, 0.889992, -0.134603, -0.776318, 0.772852, 0.17448],
        [0.481234, -0.901814, 0.712562, -0.04018, -0.656282, 0.914694, -0.558568, -0.20373],
        [-0.41144, -0.076667, 0.51069, -0.795276, 0.851753, -0.661646, 0.26231, 0.247909],
        [-0.894131, 0.803671, -0.685864, 0.540768, -0.368321, 0.167607, 0.051721, -0.278985],
        [-0.580661, 0.51724, -0.467766, 0.423662, -0.377981, 0.333796, -0.296025, 0.260331],
        [0.225998, -0.503035, 0.704109, -0.818668, 0.831461, -0.742718, 0.554722, -0.277041],
    ]
    for found, numbers in zip(layer.weight, rows, strict=True):
        close(found, numbers)
    assert lo.nn.OrderedRanks(model).shrink_(0.5, optimizer) == {"0": (6, 4)}
    close(model(x)[0], [0.192799, 0.190644, -0.132489, -0.101121, -0.103508, 0.092017])


def test_types_autocast_and_the_active_rank():
    low = OrderedLinear(N, M, dtype=torch.bfloat16)
    assert low(torch.randn(3, N)).dtype == torch.float32
    assert low.importance().dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OrderedLinear(N, M)(torch.randn(3, N)).dtype == torch.bfloat16
    for rank in (-1, M + 1, True, 2.0):
        with pytest.raises(ValueError, match=r"active_rank is .* from 0 to 20"):
            low.active_rank = rank
    for rank in (0, M + 1):
        with pytest.raises(ValueError, match="rank is"):
            OrderedLinear(N, M, rank=rank)


# ---------------------------------------------------------------------------------------------------------------- penalty


def plain_penalty(factors: list[Tensor]) -> Tensor:
    return sum(factor[b:].norm() for factor in factors for b in range(len(factor)))


def test_the_penalty_is_the_sum_of_the_norms_of_tails_and_counts_tied_layers_once():
    model = nn.ModuleDict({"a": nn.Linear(N, M, dtype=F64), "b": nn.Linear(N, M, dtype=F64), "c": nn.Linear(N, M)})
    model["b"].weight = model["a"].weight
    lo.nn.ordered_(model, include=["a", "b"])
    factors = [model["a"].in_factor, model["a"].out_factor]
    copies = [factor.detach().clone().requires_grad_() for factor in factors]
    penalty, expected = lo.nn.ordered_penalty(model), plain_penalty(copies)
    penalty.backward()
    expected.backward()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    for factor, other in zip(factors, copies, strict=True):
        torch.testing.assert_close(factor.grad, other.grad, atol=1e-12, rtol=1e-12)
        factor.grad = None
    with torch.no_grad():
        for factor in factors:
            factor[11:] = 0
    lo.nn.ordered_penalty(model).backward()
    for factor, other in zip(factors, copies, strict=True):
        cut = other.detach()[:11].clone().requires_grad_()
        plain_penalty([cut]).backward()
        torch.testing.assert_close(factor.grad[:11], cut.grad, atol=1e-12, rtol=1e-12)
        assert torch.count_nonzero(factor.grad[11:]) == 0


def test_the_proximal_step_is_as_written_and_has_true_zeros():
    model = ordered()
    expected = {}
    for name, factor in model[0].named_parameters():
        tails = factor.detach().clone()
        for b in reversed(range(len(tails) if name != "bias" else 0)):
            tails[b:] *= max(0.0, 1 - 0.7 / tails[b:].norm().item())
        expected[name] = tails
    lo.nn.OrderedRanks(model).prox_(0.7)
    for name, factor in model[0].named_parameters():
        torch.testing.assert_close(factor.detach(), expected[name], atol=1e-12, rtol=1e-12)
    zeros = [int((factor == 0).all(1).sum()) for factor in (model[0].in_factor, model[0].out_factor)]
    assert 0 < zeros[0] < M
    assert 0 < zeros[1] < M
    lo.nn.OrderedRanks(model).prox_(1e6)
    assert torch.count_nonzero(model[0].weight) == 0


def test_the_proximal_step_is_the_minimiser():
    """Against gradient descent on ½‖Z − F‖² + τ Σ_b ‖Z_{b:}‖, smoothed."""
    factor, step_size = draw(6, 4) * torch.logspace(0, -1.5, 6, dtype=F64).unsqueeze(1), 0.2
    found = factor * prox_factors(factor.norm(dim=1, keepdim=True), step_size)
    z = factor.clone().requires_grad_()

    def objective(x: Tensor, smooth: float) -> Tensor:
        tails = sum((x[b:].square().sum() + smooth).sqrt() for b in range(6))
        return 0.5 * (x - factor).square().sum() + step_size * tails

    for smooth in (1e-2, 1e-4, 1e-6, 1e-8):
        optimizer = torch.optim.LBFGS([z], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(optimizer: torch.optim.Optimizer = optimizer, smooth: float = smooth) -> Tensor:
            optimizer.zero_grad()
            value = objective(z, smooth)
            value.backward()
            return value

        optimizer.step(closure)
    torch.testing.assert_close(found, z.detach(), atol=2e-4, rtol=0)
    assert objective(found, 0.0) <= objective(z.detach(), 0.0) + 1e-12
    assert torch.count_nonzero(found[-1]) == 0


# ---------------------------------------------------------------------------------------------------------------- draws


def small(*ranks: int) -> nn.Sequential:
    return nn.Sequential(*(OrderedLinear(9, 9, rank=max(rank, 1), dtype=F64) for rank in ranks))


def test_one_layer_draws_every_pair_once_in_a_cycle():
    model = small(3, 5, 2)
    ranks = lo.nn.OrderedRanks(model, seed=3)
    assert ranks.ranks == {"0": 3, "1": 5, "2": 2}
    cycles = []
    for _ in range(3):
        cycle = []
        for _ in range(10):
            with ranks.sample() as drawn:
                ((name, rank),) = drawn.items()
                assert [layer.active_rank for layer in model] == [
                    rank if str(i) == name else layer.rank for i, layer in enumerate(model)
                ]
            cycle.append((name, rank))
        assert len(set(cycle)) == 10
        assert Counter(name for name, _ in cycle) == {"0": 3, "1": 5, "2": 2}
        cycles.append(cycle)
    assert cycles[0] != cycles[1] != cycles[2]
    with ranks.sample():
        pass
    with torch.no_grad():
        model[1].in_factor[2:] = 0
    assert ranks.shrink_(1e-9) == {"0": (3, 3), "1": (5, 2), "2": (2, 2)}
    rest = []
    for _ in range(7):  # a cycle of its own begins
        with ranks.sample() as drawn:
            rest += drawn.items()
    assert Counter(name for name, _ in set(rest)) == {"0": 3, "1": 2, "2": 2}
    assert [layer.active_rank for layer in model] == [3, 2, 2]


def test_independent_draws_are_uniform_in_every_layer():
    ranks = lo.nn.OrderedRanks(small(3, 5), mode="independent", seed=1)
    counts: dict[str, Counter[int]] = {"0": Counter(), "1": Counter()}
    for _ in range(3000):
        with ranks.sample() as drawn:
            assert drawn.keys() == counts.keys()
            for name, rank in drawn.items():
                counts[name][rank] += 1
    assert counts["0"].keys() == {1, 2, 3}
    assert counts["1"].keys() == {1, 2, 3, 4, 5}
    assert all(abs(n - 1000) < 120 for n in counts["0"].values())  # 4.6 standard deviations
    assert all(abs(n - 600) < 100 for n in counts["1"].values())


def test_independent_draws_after_a_cut_are_others():
    model = nn.Sequential(OrderedLinear(40, 40, rank=32, dtype=F64))
    ranks = lo.nn.OrderedRanks(model, mode="independent", seed=1)

    def draws() -> list[int]:
        found = []
        for _ in range(8):
            with ranks.sample() as drawn:
                found.append(drawn["0"])
        return found

    before = draws()
    ranks.shrink_(0.0)
    assert draws() != before
    assert ranks.ranks == {"0": 32}


@pytest.mark.parametrize("mode", ["one_layer", "independent"])
def test_draws_go_on_where_a_run_stopped(mode):
    model = small(3, 5)

    def draws(ranks: lo.nn.OrderedRanks, count: int) -> list[dict[str, int]]:
        found = []
        for _ in range(count):
            with ranks.sample() as drawn:
                found.append(drawn)
        return found

    whole, first, second = (lo.nn.OrderedRanks(model, mode, seed=seed) for seed in (7, 7, 0))
    draws(second, 2)  # what it has drawn of its own seed is forgotten
    expected = draws(whole, 20)
    assert draws(first, 13) == expected[:13]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert draws(second, 7) == expected[13:]


def test_sampling_is_not_nested_ends_with_an_error_and_bears_layers_of_rank_zero():
    model = small(3, 5)
    ranks = lo.nn.OrderedRanks(model)
    with pytest.raises(RuntimeError, match="sampled already"), ranks.sample(), ranks.sample():
        pass
    with pytest.raises(KeyError), ranks.sample():
        raise KeyError
    assert [layer.active_rank for layer in model] == [3, 5]
    with ranks.sample():
        pass
    model[0].load_state_dict({**model[0].state_dict(), "in_factor": torch.empty(0, 9), "out_factor": torch.empty(0, 9)})
    for mode in ("one_layer", "independent"):
        with lo.nn.OrderedRanks(model, mode).sample() as drawn:
            assert drawn.keys() == {"1"}
    assert ranks.shrink_(1e9) == {"0": (0, 0), "1": (5, 0)}
    for mode in ("one_layer", "independent"):
        with lo.nn.OrderedRanks(model, mode).sample() as drawn:
            assert drawn == {}
            assert torch.equal(model[1](draw(3, 9)), model[1].bias.expand(3, 9))


def test_components_recover_the_singular_value_decomposition_of_a_linear_regression():
    """Isotropic inputs: trained with drawn ranks, every prefix ends at the best matrix of its rank."""
    left, right = torch.linalg.qr(draw(7, 3)).Q, torch.linalg.qr(draw(5, 3, seed=1)).Q
    values = torch.tensor([2.0, 1.2, 0.6], dtype=F64)
    target, x = (left * values) @ right.mT, torch.eye(5, dtype=F64)
    model = ordered(7, 5, bias=False)
    ranks, optimizer = lo.nn.OrderedRanks(model), torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.3)

    def train(steps: int, penalty: float) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with ranks.sample():
                (0.5 * (model(x) - x @ target.mT).square().sum()).backward()
            optimizer.step()
            if penalty:
                ranks.prox_(0.4 * penalty)

    train(800, 0.0)
    for rank in range(6):
        model[0].active_rank = rank
        error = (model(x) - x @ target.mT).square().sum().item()
        assert error == pytest.approx(values[rank:].square().sum().item(), abs=1e-6), rank
    model[0].active_rank = None
    train(150, 0.005)  # without it, one factor of a component may be zero and the other not
    assert ranks.shrink_(1e-7, optimizer) == {"0": (5, 3)}
    torch.testing.assert_close(model[0].weight, target, atol=0.05, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- shrinking


def pair_of_models(dtype: torch.dtype = torch.float32, size: int = 96) -> list[nn.Module]:
    """The same model twice, of which `step` trains 8 components a layer. The others are nearly zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, 40), nn.GELU(), nn.Linear(40, size)).to(dtype)
    lo.nn.ordered_(model, include=["0", "2"])
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.in_factor[8:] *= 1e-6
            layer.out_factor[8:] *= 1e-6
    return [model, copy.deepcopy(model)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    """The last loss, as loops keep it."""
    for number in steps:
        for layer in (model[0], model[2]):
            layer.active_rank = 8
        x = torch.randn(16, model[0].in_features, generator=torch.Generator().manual_seed(number))
        x = x.to(model[0].in_factor.dtype)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in (model[0], model[2]):
            layer.active_rank = None
    return loss


def adam(model: nn.Module, **options: object) -> lo.LowRankOptimizer:
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    return lo.LowRankOptimizer(groups, rule=options.pop("rule", "adam"), lr=1e-2, **options)


OPTIMIZERS = {
    "torch.AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "torch.SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "adam": adam,
    "lion": lambda model: adam(model, rule="lion"),
    "16 bits": lambda model: adam(model, state_bits=16, stochastic_rounding=True),
    "error bits": lambda model: adam(model, weight_error_bits=16),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shrunk_model_trains_as_one_whose_last_components_are_left_out(name):
    dtype = torch.bfloat16 if "bits" in name else torch.float32
    (whole, cut), build = pair_of_models(dtype), OPTIMIZERS[name]
    first, second = build(whole), build(cut)
    step(whole, first, range(3))
    last = step(cut, second, range(3))  # kept, so that its graph lives
    factors = dict(cut.named_parameters())
    ranks = lo.nn.OrderedRanks(cut)
    with torch.no_grad():  # Adam has moved them, although their gradients were 0
        for layer in (cut[0], cut[2]):
            layer.in_factor[8:] = 0
    assert ranks.shrink_(1e-7, second) == {"0": (40, 8), "2": (40, 8)}
    assert all(param is factors[name] for name, param in cut.named_parameters())
    assert cut[0].in_factor.untyped_storage().nbytes() == cut[0].in_factor.numel() * dtype.itemsize
    step(whole, first, range(3, 6))
    step(cut, second, range(3, 6))
    assert torch.isfinite(last)
    for name, param in cut.named_parameters():
        expected = whole.get_parameter(name)
        assert torch.equal(param, expected[:8] if "factor" in name else expected), name
        for key, tensor in second.state[param].items():
            if isinstance(tensor, Tensor) and tensor.dim():
                assert tensor.shape == param.shape
                assert torch.equal(tensor, first.state[expected][key][: len(tensor)]), (name, key)


@pytest.mark.parametrize("size", [120, 700])
def test_codes_of_moments_are_cut_as_they_are_or_opened_where_few_are_left(size):
    model, _ = pair_of_models(size=size)
    optimizer = adam(model, state_bits=8)
    step(model, optimizer, range(3))
    factor = model[0].in_factor
    codes = {name: tensor.clone() for name, tensor in optimizer.state[factor].items()}
    moment = optimizer.trained(factor).moments["exp_avg"][:8].clone()
    square = optimizer.trained(factor).moments["exp_avg_sq"][:8].clone()
    with torch.no_grad():
        model[0].in_factor[8:] = 0
        model[2].in_factor[8:] = 0
    lo.nn.OrderedRanks(model).shrink_(1e-7, optimizer)
    state = optimizer.state[factor]
    assert state["exp_avg"].dtype == (torch.int8 if 8 * size >= 4096 else torch.float32)
    if size == 700:
        assert all(torch.equal(state[name], codes[name][: len(state[name])]) for name in state if state[name].dim())
    torch.testing.assert_close(optimizer.trained(factor).moments["exp_avg"], moment, atol=0, rtol=1e-6)
    torch.testing.assert_close(optimizer.trained(factor).moments["exp_avg_sq"], square, atol=0, rtol=1e-6)
    assert state["step"] == 3
    step(model, optimizer, range(3, 6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = lo.nn.ordered_(pair_of_models(size=size)[0].__class__(nn.Linear(size, 40), nn.GELU(), nn.Linear(40, size)))
    other.load_state_dict(saved[0], strict=True)
    assert lo.nn.OrderedRanks(other).ranks == {"0": 8, "2": 8}
    resumed = adam(other, state_bits=8)
    resumed.load_state_dict(saved[1])
    assert torch.equal(step(other, resumed, range(6, 8)), step(model, optimizer, range(6, 8)))


def test_shrinking_between_updates_in_backward():
    models = pair_of_models()
    for model, in_backward in zip(models, (False, True), strict=True):
        optimizer = adam(model)
        handle = lo.update_in_backward(optimizer) if in_backward else None
        step(model, optimizer, range(2))
        assert lo.nn.OrderedRanks(model).shrink_(1e-2, optimizer)["0"] == (40, 8)
        step(model, optimizer, range(2, 5))
        if handle is not None:
            assert all(param.grad is None for param in model.parameters())
            handle.remove()
    for name, param in models[0].named_parameters():
        assert torch.equal(param, models[1].get_parameter(name)), name


def test_gradients_are_cut_and_unfinished_ones_refused():
    model, other = pair_of_models()
    optimizer = adam(model)
    model(torch.randn(4, 96)).sum().backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    lo.nn.OrderedRanks(model).shrink_(1e-2, optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, grads[name][: len(param)])
    optimizer.step()
    waiting = adam(other)
    handle = lo.update_in_backward(waiting, accumulate=2)
    other(torch.randn(4, 96)).sum().backward()
    with pytest.raises(RuntimeError, match="unfinished step"):
        lo.nn.OrderedRanks(other).shrink_(1e-2, waiting)
    assert other[0].rank == 40
    handle.discard()
    handle.remove()


def test_a_run_with_a_penalty_resumes_and_updates_in_backward():
    def make() -> nn.Module:
        return pair_of_models()[0]

    check_resume_and_in_backward(make, adam)


def test_a_projected_factor_begins_afresh_and_rank_zero_goes_on():
    model, _ = pair_of_models()
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4, include="factor"), lr=1e-2)
    step(model, optimizer, range(3))
    lo.nn.OrderedRanks(model).shrink_(1e-2, optimizer)
    assert optimizer.state[model[0].in_factor]["step"] == 0
    assert optimizer.state[model[0].bias]["step"] == 3
    step(model, optimizer, range(3, 5))
    assert lo.nn.OrderedRanks(model).shrink_(1e9, optimizer) == {"0": (8, 0), "2": (8, 0)}
    for layer in (model[0], model[2]):
        assert layer.in_factor.shape == (0, layer.in_features)
    for _ in range(2):
        loss = (model(torch.randn(4, 96)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(torch.randn(4, 96)), model[2].bias.expand(4, 96))
    assert lo.nn.ordered_penalty(model).item() == 0
    assert torch.count_nonzero(lo.nn.merge_(model)[0].weight) == 0


# ---------------------------------------------------------------------------------------------------------------- whole models


def test_tied_frozen_hooked_copied_and_merged_layers():
    model = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 9, bias=False), "c": nn.Linear(9, 9)})
    model["b"].weight = model["a"].weight
    model["c"].weight.requires_grad_(False)
    calls: list[int] = []
    handle = model["a"].register_forward_hook(lambda *_: calls.append(1))
    lo.nn.ordered_(model.eval())
    assert model["a"].in_factor is model["b"].in_factor
    assert model["a"].out_factor is model["b"].out_factor
    assert [name for name, p in model["c"].named_parameters() if p.requires_grad] == ["bias"]
    ranks = lo.nn.OrderedRanks(model, "independent")
    with ranks.sample() as drawn:
        assert drawn.keys() == {"a", "c"}
        assert model["a"].active_rank == model["b"].active_rank == drawn["a"]
    frozen = model["c"].in_factor.clone()
    ranks.prox_(0.1)
    assert torch.equal(model["c"].in_factor, frozen)
    ranks.shrink_(0.5)
    assert model["a"].rank == model["b"].rank < 9
    x = torch.randn(3, 9)
    y = {name: layer(x) for name, layer in model.items()}
    assert calls == [1]
    handle.remove()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), lo.nn.merge_(model)):
        for name, layer in other.items():
            assert not layer.training
            torch.testing.assert_close(layer(x), y[name], atol=1e-6, rtol=1e-5)
    assert model["a"].weight is model["b"].weight
    assert not model["c"].weight.requires_grad


def test_a_checkpoint_brings_its_ranks_and_dense_weights_are_named():
    model = ordered()
    lo.nn.OrderedRanks(model).shrink_(0.3)
    rank, x = model[0].rank, draw(3, N)
    assert 0 < rank < M
    other = ordered()
    other.load_state_dict(model.state_dict(), strict=True)
    assert other[0].rank == rank
    assert torch.equal(other(x), model(x))
    larger = ordered()
    model.load_state_dict(larger.state_dict(), strict=True)
    assert model[0].rank == M
    with torch.device("meta"):
        empty = lo.nn.ordered_(nn.Sequential(nn.Linear(N, M)), include="0")
    assert empty[0].rank == M
    empty.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(empty(x), other(x))
    with pytest.raises(RuntimeError, match=r"dense weight.*ordered_"):
        model.load_state_dict({"0.weight": torch.zeros(M, N)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.in_factor": torch.zeros(3, N), "0.out_factor": torch.zeros(4, M)}, strict=False)
    assert model[0].rank == M


def test_a_compiled_model_follows_the_ranks_and_checkpointing_runs_in_the_context():
    model, x = ordered(), draw(4, N)
    ranks = lo.nn.OrderedRanks(model, seed=1)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(12):
        with ranks.sample() as drawn:
            y = compiled(x)
        model[0].active_rank = drawn["0"]
        assert torch.equal(y, model(x))
        model[0].active_rank = None
    with ranks.sample():
        model(x).square().sum().backward()
        expected = model[0].in_factor.grad.clone()
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(model[0].in_factor.grad, expected)


def test_roles_of_the_parameters():
    groups = lo.param_groups(ordered(), rank=None, weight_decay=0.1)
    found = {name: g.get("decay_factor", 1.0) * g["weight_decay"] for g in groups for name in g["param_names"]}
    assert found == {"0.in_factor": 0.05, "0.out_factor": 0.05, "0.bias": 0.0}
    assert "0.in_factor" in lo.describe(groups)


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_transformers_start_as_they_were_learn_shrink_and_come_back(make, layers):
    model, batch = build_transformer(make)
    exact, names = model(**batch).logits, model.state_dict().keys()
    lo.nn.ordered_(model)
    assert sum(isinstance(module, OrderedLinear) for module in model.modules()) == layers
    torch.testing.assert_close(model(**batch).logits, exact, atol=1e-4, rtol=1e-4)
    ranks = lo.nn.OrderedRanks(model, "independent")
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=3e-3)
    labels = batch.get("input_ids", torch.zeros(40, dtype=torch.int64))

    def loss_of() -> Tensor:
        return model(**batch, labels=labels).loss

    before = loss_of().item()
    for _ in range(4):
        with ranks.sample():
            loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.prox_(0.01)
    assert loss_of().item() < before
    changed = ranks.shrink_(0.05, optimizer)
    assert len(changed) == layers
    assert sum(new for _, new in changed.values()) < sum(old for old, _ in changed.values())
    loss_of().backward()
    optimizer.step()
    logits = model(**batch).logits
    lo.nn.merge_(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named_and_changes_nothing():
    model = ordered()
    ranks = lo.nn.OrderedRanks(model)
    plain = nn.Sequential(nn.Linear(N, M))
    stranger = torch.optim.SGD(plain.parameters(), lr=0.1)
    bfloat16 = lo.nn.OrderedRanks(copy.deepcopy(model).bfloat16())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].in_factor[3, 3] = float("nan")
    infinite = nn.Sequential(nn.Linear(N, M))
    nn.init.constant_(infinite[0].weight, float("inf"))
    adafactor = torch.optim.Adafactor(model.parameters())
    model(draw(3, N)).sum().backward()
    adafactor.step()
    meta = lo.nn.OrderedRanks(copy.deepcopy(model).to("meta"))
    state = ranks.state_dict()
    cases = [
        (lambda: lo.nn.OrderedRanks(plain), "Sequential has no ordered layer; make some"),
        (lambda: lo.nn.ordered_penalty(plain), "no ordered layer"),
        (lambda: lo.nn.OrderedRanks(model, "both"), "mode is 'both'; valid values"),
        (lambda: ranks.shrink_(-1e-9), "threshold is -1e-09"),
        (lambda: ranks.shrink_(float("nan")), "threshold is nan"),
        (lambda: ranks.shrink_("a"), "threshold is 'a'"),
        (lambda: ranks.shrink_(0.1, stranger), "SGD does not hold the factors of 0"),
        (lambda: ranks.shrink_(0.1, 3), "optimizer is 3"),
        (lambda: ranks.shrink_(0.5, adafactor), r"state 'row_var' of Adafactor is \(20, 1\)"),
        (lambda: lo.nn.OrderedRanks(broken).shrink_(0.1), "0 is not finite"),
        (lambda: meta.shrink_(0.1), "0 is on the meta device"),
        (lambda: ranks.prox_(-1), "step_size is -1"),
        (lambda: ranks.prox_(float("inf")), "step_size is inf"),
        (lambda: bfloat16.prox_(0.1), r"factors are torch\.bfloat16"),
        (lambda: ranks.load_state_dict({"seed": 1}), "needed: .*cycle"),
        (lambda: ranks.load_state_dict({**state, "mode": "independent"}), "mode 'independent', this of 'one_layer'"),
        (lambda: ranks.load_state_dict({**state, "cycle": -1}), "at least 0"),
        (lambda: lo.nn.ordered_(infinite, include="0"), r"0\.weight is not finite"),
        (lambda: lo.nn.ordered_(plain, include="nothing"), "nothing"),
        (lambda: lo.nn.ordered_(lo.nn.quantize_weights_(nn.Sequential(nn.Linear(N, M))), include="0"), "in 8 bits"),
    ]
    before = copy.deepcopy(model.state_dict())
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lo.nn.ordered_([])
    with pytest.raises(RuntimeError, match="within `with ranks"), ranks.sample():
        ranks.shrink_(0.1)
    assert ranks.state_dict() == {**state, "position": 1}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lo.nn.merge_(model)
    with pytest.raises(ValueError, match="no ordered layer"), ranks.sample():
        pass


def test_rows_are_kept_of_parameters_that_can_be_cut():
    weight, other = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
    optimizer = lo.LowRankOptimizer([weight], rule="adam")
    for rows, message in (
        ({other: 3}, "none of this optimizer's"),
        ({weight: 7}, "cut to 7"),
        ({weight: -1}, "to -1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.keep_rows(rows)
    optimizer.keep_rows({weight: 6})
    optimizer.keep_rows({weight: 2})
    assert weight.shape == optimizer.state[weight]["exp_avg"].shape == (2, 4)


def test_a_rule_for_matrices_refuses_a_cut_to_nothing_before_anything_is_cut():
    weights = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    optimizer = lo.LowRankOptimizer(weights, rule="muon")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(ValueError, match=r"0\.1 \(0, 4\) is no matrix"):
        optimizer.keep_rows({weights[0]: 3, weights[1]: 0})
    assert [tuple(weight.shape) for weight in weights] == [(6, 4), (6, 4)]
    assert all(optimizer.state[weight]["exp_avg"].shape == (6, 4) for weight in weights)


def test_what_rounding_left_of_a_projected_factor_is_kept():
    weight = nn.Parameter(torch.randn(40, 16).to(torch.bfloat16))
    optimizer = lo.GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-3, weight_error_bits=16)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    whole = lo.full_precision(optimizer, weight)
    optimizer.keep_rows({weight: 24})
    assert torch.equal(lo.full_precision(optimizer, weight), whole[:24])
    assert not torch.equal(whole[:24], weight.detach().float())
