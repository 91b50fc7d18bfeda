"""Spectral layers: their passes against the dense gradient in float64, what they store, and the way into a model and out of it."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_optim as lo
from lowrank_optim.nn import SpectralLinear
from lowrank_optim.nn.spectral_linear import draw_triplets

F64 = torch.float64
SHAPES = {"tall": (44, 20), "wide": (18, 36), "square": (24, 24)}


def make_layer(m: int = 44, n: int = 20, rank: int = 5, dtype: torch.dtype = F64, **options: object) -> SpectralLinear:
    """A layer whose trained vectors are at no right angles any more."""
    torch.manual_seed(0)
    layer = SpectralLinear(n, m, rank=rank, dtype=dtype, **options)
    with torch.no_grad():
        for vectors in (layer.u_active, layer.v_active):
            vectors += 0.1 * torch.randn_like(vectors)
            vectors /= vectors.norm(dim=0)
    return layer


def whole(layer: SpectralLinear) -> tuple[Tensor, Tensor, Tensor]:
    """(U, Σ, V) from parameters and buffers, column by column."""
    u, v = (torch.empty(k, layer.sigma.numel(), dtype=F64) for k in (layer.out_features, layer.in_features))
    rank = layer.u_active.shape[1]
    for column, place in enumerate(layer.order.tolist()):
        trained = column < rank
        u[:, place] = layer.u_active[:, column] if trained else layer.u_frozen[:, column - rank]
        v[:, place] = layer.v_active[:, column] if trained else layer.v_frozen[:, column - rank]
    return u.detach(), layer.sigma.detach().double(), v.detach()


def run(layer: SpectralLinear, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, its cotangent, and gradients, of a loss whose cotangent is a cosine."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    turn = torch.cos(torch.arange(y.numel(), dtype=F64)).bfloat16().to(y.dtype).view(y.shape)
    y.backward(turn)
    found = {name: param.grad for name, param in layer.named_parameters() if param.grad is not None}
    return y.detach(), turn, {"x": x.grad, **found}


def formula(layer: SpectralLinear, x: Tensor, turn: Tensor, enhanced: bool, tangent: bool) -> dict[str, Tensor]:
    """The gradients from the dense one, G = ∂yᵀ x."""
    u, sigma, v = whole(layer)
    grad = turn.reshape(-1, layer.out_features).mT @ x.reshape(-1, layer.in_features)
    own = layer.order[: layer.rank].tolist()
    scale = torch.ones(len(own), dtype=F64) if enhanced else sigma[own]
    of_u, of_v = grad @ v[:, own] * scale, grad.mT @ u[:, own] * scale
    if tangent:
        of_u = of_u - u[:, own] * (u[:, own] * of_u).sum(0)
        of_v = of_v - v[:, own] * (v[:, own] * of_v).sum(0)
    weight = u @ torch.diag(sigma) @ v.mT
    values = torch.diag(u.mT @ grad @ v)
    bias = turn.reshape(-1, layer.out_features).sum(0)
    return {"x": turn @ weight, "sigma": values, "u_active": of_u, "v_active": of_v, "bias": bias}


# ---------------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("enhanced", "tangent"), [(True, False), (False, False), (True, True)])
def test_outputs_and_gradients_are_those_of_the_dense_formula(shape, enhanced, tangent):
    layer = make_layer(*SHAPES[shape], enhanced=enhanced, tangent=tangent)
    x = torch.randn(3, 7, layer.in_features, dtype=F64)
    y, turn, found = run(layer, x)
    u, sigma, v = whole(layer)
    torch.testing.assert_close(y, F.linear(x, u @ torch.diag(sigma) @ v.mT, layer.bias), atol=1e-12, rtol=1e-12)
    expected = formula(layer, x, turn, enhanced, tangent)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-12, rtol=1e-12, msg=name)


def test_without_the_enhancement_the_gradients_are_those_of_autograd():
    layer = make_layer(enhanced=False)
    x = torch.randn(9, 20, dtype=F64)
    _, turn, found = run(layer, x)
    parts = {name: getattr(layer, name).detach().clone().requires_grad_() for name in ("sigma", "u_active", "v_active")}
    values = parts["sigma"][layer.order.long()]
    weight = (parts["u_active"] * values[:5]) @ parts["v_active"].mT
    weight = weight + (layer.u_frozen * values[5:]) @ layer.v_frozen.mT
    (F.linear(x, weight, layer.bias.detach()) * turn).sum().backward()
    for name, part in parts.items():
        torch.testing.assert_close(found[name], part.grad, atol=1e-12, rtol=1e-12, msg=name)


def test_a_step_of_sgd_on_all_true_gradients_changes_the_weight_as_its_gradient_says():
    """r = d: to the first order, W changes by −η Σ_i (u_iᵀ G v_i u_i v_iᵀ + Σ_i² ((u_i u_iᵀ) G + G (v_i v_iᵀ)))."""
    layer, rate = make_layer(24, 24, rank=24, enhanced=False), 1e-7
    assert layer.u_frozen.shape == (24, 0)
    x = torch.randn(9, 24, dtype=F64)
    _, turn, _ = run(layer, x)
    u, sigma, v = whole(layer)
    grad, before = turn.mT @ x, layer.weight
    torch.optim.SGD(layer.parameters(), lr=rate).step()
    outer = u * torch.diag(u.mT @ grad @ v)
    square = torch.diag(sigma.square())
    expected = outer @ v.mT + grad @ v @ square @ v.mT + u @ square @ u.mT @ grad
    torch.testing.assert_close((before - layer.weight) / rate, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (1, 1, 5, 20)], ids=str)
def test_any_leading_shape(shape):
    layer, x = make_layer(), torch.randn(shape, dtype=F64)
    y, turn, found = run(layer, x)
    assert y.shape == (*shape[:-1], 44)
    for name, grad in formula(layer, x, turn, True, False).items():
        torch.testing.assert_close(found[name], grad, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("frozen", ["sigma", "u_active", "v_active", "bias"])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen):
    layer, x = make_layer(), torch.randn(9, 20, dtype=F64)
    getattr(layer, frozen).requires_grad_(False)
    _, turn, found = run(layer, x)
    expected = formula(layer, x, turn, True, False)
    assert found.keys() == expected.keys() - {frozen}
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-12, rtol=1e-12, msg=name)


def test_a_saved_projection_changes_no_gradient_and_nothing_else_is_saved():
    x, saved = torch.randn(9, 20, dtype=F64), {}
    layers = {kept: make_layer(save_projection=kept) for kept in (False, True)}
    (y, _, first), (again, _, second) = (run(layer, x) for layer in layers.values())
    assert torch.equal(y, again)
    assert all(torch.equal(grad, second[name]) for name, grad in first.items())
    for kept, layer in layers.items():
        shapes = saved.setdefault(kept, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
    own = [tuple(tensor.shape) for tensor in layers[True].state_dict().values()]
    assert sorted(saved[False]) == sorted([(9, 20), *own])
    assert sorted(saved[True]) == sorted([(9, 20), (9, 5), (9, 15), *own])


def test_bfloat16_is_near_to_float32_and_autocast_gives_its_type():
    exact = make_layer(dtype=torch.bfloat16).float()
    rounded, x = copy.deepcopy(exact).bfloat16(), torch.randn(64, 20).bfloat16()
    _, _, expected = run(exact, x.float())
    _, _, found = run(rounded, x)
    for name, grad in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert 0 < (found[name].float() - grad).norm() / grad.norm() < 1e-2, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = exact(x.float())
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert exact.u_active.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact(x.float()), atol=0.03, rtol=0.03)
    assert rounded(x.float()).dtype == torch.float32


def test_a_second_derivative_raises_and_a_wrong_width_is_named():
    layer, x = make_layer(), torch.randn(3, 20, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(ValueError, match=r"\(3, 19\).*in_features, 20"):
        layer(torch.randn(3, 19, dtype=F64))


def test_a_compiled_model_and_a_checkpointed_one_give_the_same_gradients():
    model, x = nn.Sequential(make_layer(), nn.GELU()), torch.randn(6, 20, dtype=F64, requires_grad=True)
    model(x).square().sum().backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters()}
    again = torch.utils.checkpoint.checkpoint
    for other in (torch.compile(model, backend="aot_eager"), lambda x: again(model, x, use_reentrant=False)):
        model.zero_grad()
        other(x).square().sum().backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.grad, expected[name])


# ---------------------------------------------------------------------------------------------------------------- the draw


def test_triplets_are_drawn_with_the_probabilities_of_the_mixture():
    sigma, draws = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), 500
    for mixture in (0.5, 0.0):
        first = torch.tensor([int(draw_triplets(sigma, 1, mixture, key)[0]) for key in range(draws)])
        share = mixture / 5 + (1 - mixture) * sigma / 10
        found = torch.bincount(first, minlength=5) / draws
        assert ((found - share).abs() <= 4 * (share * (1 - share) / draws).sqrt()).all()
    pairs = torch.cat([draw_triplets(sigma, 2, 0.0, key)[:2] for key in range(draws)])
    p = sigma / 10
    either = torch.stack([p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)])
    assert (torch.bincount(pairs, minlength=5) / draws - either).abs().max() < 0.06


def test_a_draw_is_a_permutation_and_zeros_are_as_likely_where_all_are():
    for sigma, count in ((torch.zeros(7), 3), (torch.linspace(1, 0, 7), 7), (torch.tensor([math.nan, 1, 2]), 2)):
        order = draw_triplets(sigma, count, 0.0, 5)
        assert order.dtype == torch.int32
        assert sorted(order.tolist()) == list(range(len(sigma)))
        assert order[:count].tolist() == sorted(order[:count].tolist())
        assert order[count:].tolist() == sorted(order[count:].tolist())
    first = torch.cat([draw_triplets(torch.zeros(7), 3, 0.0, key)[:3] for key in range(500)])
    counts = torch.bincount(first, minlength=7) / 500
    assert (counts - 3 / 7).abs().max() < 0.08


def test_seeds_and_layers_have_draws_of_their_own():
    def active(seed: int, position: int) -> tuple[int, ...]:
        return tuple(make_layer(seed=seed, position=position).active.tolist())

    assert active(0, 0) == active(0, 0)
    assert len({active(seed, position) for seed in (0, 1) for position in (0, 1)}) == 4


# ---------------------------------------------------------------------------------------------------------------- models


def make_model(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False)).to(dtype)


def convert(model: nn.Module, **options: object) -> nn.Module:
    return lo.nn.spectral_(model, **{"rank": 4, "include": ["0", "2"]} | options)


def test_a_model_computes_what_it_did_and_comes_back():
    model, x = make_model().eval(), torch.randn(5, 24, dtype=F64)
    expected, bias, weight, calls = model(x), model[0].bias, model[0].weight.detach().clone(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    assert convert(model) is model
    assert isinstance(model[0], SpectralLinear)
    assert model[0].bias is bias
    assert not model[0].training
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-12, rtol=1e-12)
    assert torch.all(model[0].sigma.diff() < 0)
    assert not model[0].weight.requires_grad
    handle.remove()
    model(x)
    assert calls == [1]
    with pytest.raises(AttributeError, match="merge_"):
        model[0].weight = nn.Parameter(weight)
    merged = lo.nn.merge_(model)
    assert [type(module) for module in merged] == [nn.Linear, nn.GELU, nn.Linear]
    assert merged[0].bias is bias
    torch.testing.assert_close(merged(x), expected, atol=1e-12, rtol=1e-12)


def test_weights_take_the_numbers_that_the_docstring_says():
    model = convert(make_model(torch.bfloat16), rank=4)
    for layer, (m, n) in ((model[0], (40, 24)), (model[2], (16, 40))):
        d = min(m, n)
        own = {name: tensor for name, tensor in layer.state_dict().items() if name not in ("bias", "order")}
        assert {tensor.dtype for tensor in own.values()} == {torch.bfloat16}
        assert sum(tensor.numel() for tensor in own.values()) == d * (m + n) + d
        assert sum(param.numel() for name, param in layer.named_parameters() if name != "bias") == 4 * (m + n) + d
        assert (layer.order.dtype, layer.order.numel()) == (torch.int32, d)
        assert all(type(tensor) is Tensor for tensor in layer.state_dict().values())


def test_a_rank_of_all_and_more_trains_all_triplets():
    model, x = make_model(), torch.randn(5, 24, dtype=F64)
    expected = model(x)
    convert(model, rank=20)
    assert [model[i].rank for i in (0, 2)] == [20, 16]
    assert model[2].active.tolist() == list(range(16))
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)


def test_tied_layers_share_parameters_and_frozen_weights_stay_frozen():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)])
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    lo.nn.spectral_(model, rank=3)
    assert model[1].sigma is model[0].sigma
    assert model[1].u_frozen is model[0].u_frozen
    assert model[1].bias is not model[0].bias
    assert not any(param.requires_grad for param in model[2].parameters())
    lo.nn.merge_(model)
    assert model[1].weight is model[0].weight
    assert not model[2].weight.requires_grad


def test_param_groups_let_values_decay_and_vectors_not():
    groups = lo.param_groups(convert(make_model()), rank=None, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay == {
        "0.sigma": 0.1,
        "2.sigma": 0.1,
        **dict.fromkeys(("0.u_active", "0.v_active", "0.bias", "2.u_active", "2.v_active"), 0.0),
    }
    table = lo.describe(groups)
    assert "0.u_active" in table
    assert "no decay" in table


def test_a_checkpoint_of_the_plain_model_loads_and_one_of_its_own_exactly():
    plain, x = make_model(), torch.randn(5, 24, dtype=F64)
    plain[0].weight.data.mul_(3)
    model = convert(make_model())
    model.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=1e-12)
    other = convert(make_model(), seed=3)
    assert not torch.equal(other[0].order, model[0].order)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    state = plain.state_dict() | {"0.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"dense weight.*spectral_"):
        other.load_state_dict(state)


def test_copies_pickles_and_conversions_compute_the_same():
    layer, x = make_layer(), torch.randn(3, 20, dtype=F64)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for same in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(same(x), layer(x))
    assert layer.float().order.dtype == torch.int32


def test_a_model_on_the_meta_device_is_changed_without_numbers_and_takes_a_checkpoint():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(24, 40, dtype=F64), nn.GELU(), nn.Linear(40, 16, bias=False, dtype=F64))
    convert(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    source, x = convert(make_model()), torch.randn(5, 24, dtype=F64)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(x), source(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.linear.weight = self.embed.weight


def not_finite() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = math.inf
    return model


BAD = {
    "rank zero": (lambda: nn.Sequential(nn.Linear(8, 8)), {"rank": 0}, "rank is 0"),
    "rank a fraction": (lambda: nn.Sequential(nn.Linear(8, 8)), {"rank": 0.5}, "rank is 0.5"),
    "mixture": (lambda: nn.Sequential(nn.Linear(8, 8)), {"mixture": 1.5, "include": "0"}, r"mixture is 1\.5"),
    "rank true": (lambda: nn.Sequential(nn.Linear(8, 8)), {"rank": True}, "rank is True"),
    "a pattern": (lambda: nn.Sequential(nn.Linear(8, 8)), {"include": "lin"}, "lin"),
    "no layer": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1)), {}, "no plain"),
    "tied": (Tied, {"include": "linear"}, "tied"),
    "not finite": (not_finite, {"include": "0"}, r"0\.weight is not finite"),
    "int8": (
        lambda: lo.nn.quantize_weights_(nn.Sequential(nn.Linear(256, 256)), include="0"),
        {"include": "0"},
        "dequantize_weights_",
    ),
    "the model itself": (lambda: nn.Linear(8, 8), {"include": "weight"}, "itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case):
    make, options, message = BAD[case]
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lo.nn.spectral_(model, **{"rank": 2} | options)
    assert [type(module) for module in model.modules()] == before


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lo.nn.spectral_([nn.Linear(3, 3)])
