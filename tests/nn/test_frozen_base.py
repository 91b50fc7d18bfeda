"""Frozen-base adapters (SVFit, SALT, LoLDU, NOLA, Tucker cores) against dense float64 formulas, and in models."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim.nn import adapted, nola
from lowrank_optim.nn.decompositions import leading_ldu
from tests.oracles import frozen_base as oracle
from tests.oracles.runs import check_resume_and_in_backward

F64 = torch.float64
CONVERT = {
    "svfit": (lo.nn.svfit_, {"rank": 5}),
    "salt": (lo.nn.salt_, {"rank": 3, "lora_rank": 4, "alpha": 6}),
    "loldu": (lo.nn.loldu_, {"rank": 5}),
    "nola": (lo.nn.nola_, {"rank": 3, "bases": 7, "alpha": 6}),
}
"""Options of the dense formulas: s = 1.5 and 2."""
FORMULA = {"salt": {"s": 1.5}, "nola": {"rank": 3, "s": 2.0}}
TRAINED = {
    "svfit": {"shift": (5,)},
    "salt": {"scale": (3,), "shift": (3,), "lora_A": (4, 20), "lora_B": (12, 4)},
    "loldu": {"shift": (5,)},
    "nola": {"coefficients_A": (7,), "coefficients_B": (7,)},
}
each_method = pytest.mark.parametrize("name", list(CONVERT))


def network(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in pairwise(sizes)]
    return nn.Sequential(*layers).to(dtype)


def convert(name: str, model: nn.Module, **options: object) -> nn.Module:
    function, usual = CONVERT[name]
    return function(model, **usual | options)


def perturb(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Move the trained parameters from where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator, dtype=F64).to(param) * size)
    return model


def own(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters, as leaves."""
    params = layer.named_parameters(recurse=False)
    return {name: p.detach().clone().requires_grad_() for name, p in params if p.requires_grad}


def weighted(y: Tensor) -> Tensor:
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))).sum()


# ------------------------------------------------------------------------------------------------------------- the formulas


@each_method
@pytest.mark.parametrize(("m", "n"), [(26, 14), (14, 26), (17, 17)], ids=["tall", "wide", "square"])
def test_outputs_and_gradients_are_those_of_the_dense_formula(name, m, n):
    model = network(n, m, dtype=F64)[0]
    weight = model[0].weight.detach().clone()
    layer = perturb(convert(name, model, freeze_rest=False, include="0"))[0]
    x = torch.randn(4, 3, n, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    same, params = x.detach().clone().requires_grad_(), own(layer)
    bias = layer.base.bias.detach().clone().requires_grad_()
    whole = weight + oracle.DENSE[name](weight, params, **FORMULA.get(name, {}))
    y, expected = layer(x), F.linear(same, whole, bias)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert (expected - F.linear(same, weight, bias)).abs().max() > 0.1
    weighted(y).backward()
    weighted(expected).backward()
    torch.testing.assert_close(x.grad, same.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.bias.grad, bias.grad, atol=1e-12, rtol=1e-12)
    for key, value in params.items():
        torch.testing.assert_close(layer.get_parameter(key).grad, value.grad, atol=1e-12, rtol=1e-12, msg=key)
        assert value.grad.abs().max() > 1e-3, key
    lo.nn.merge_(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight.detach(), whole.detach(), atol=1e-13, rtol=1e-13)
    assert model[0].bias is layer.bias


CONVOLUTIONS = [
    {"kernel_size": 3, "stride": 2, "padding": (1, 2)},
    {"kernel_size": (4, 5), "padding": "same", "padding_mode": "circular", "dilation": (1, 2)},
    {"kernel_size": (2, 3), "padding": (1, 2), "padding_mode": "reflect", "bias": False},
]


def test_a_core_with_a_kernel_rank_computes_under_autocast():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    perturb(lo.nn.tucker_adapters_(model, rank=2, kernel_rank=2, include="0"))
    x = torch.randn(2, 4, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel_rank", [None, 2])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["strided", "circular", "reflect"])
def test_a_core_beside_a_convolution_is_the_dense_formula(options, kernel_rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(7, 10, dtype=F64, **options))
    weight, plain = model[0].weight.detach().clone(), copy.deepcopy(model[0])
    perturb(lo.nn.tucker_adapters_(model, rank=4, alpha=2, kernel_rank=kernel_rank, include="0"))
    layer, x = model[0], torch.randn(2, 7, 9, 11, dtype=F64, requires_grad=True)
    sides = weight.shape[2:] if kernel_rank is None else (2, 2)
    assert layer.core.shape == (4, 4, *sides)
    same, params = x.detach().clone().requires_grad_(), own(layer)
    whole = weight + oracle.tucker(weight, params, s=0.5)
    expected = torch.func.functional_call(plain, {"weight": whole}, same)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    weighted(layer(x)).backward()
    weighted(expected).backward()
    torch.testing.assert_close(x.grad, same.grad, atol=1e-12, rtol=1e-12)
    for key, value in params.items():
        torch.testing.assert_close(layer.get_parameter(key).grad, value.grad, atol=1e-12, rtol=1e-12, msg=key)
    lo.nn.merge_(model)
    assert type(model[0]) is nn.Conv2d
    assert str(model[0]) == str(plain)
    torch.testing.assert_close(model[0].weight.detach(), whole.detach(), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 9, 3, padding="same"), nn.Conv3d(2, 9, (1, 2, 3), stride=2)], ids=str)
def test_a_core_beside_other_convolutions_and_few_channels(layer):
    model = nn.Sequential(copy.deepcopy(layer).double())
    start = model[0].weight.detach().clone()
    perturb(lo.nn.tucker_adapters_(model, rank=5, include="0"))
    kernel = tuple(model[0].base.kernel_size)
    assert model[0].core.shape == (5, 2, *kernel)  # the two channels of the input are all there are
    x = torch.randn(2, *(7,) * len(kernel), dtype=F64)  # without a batch
    y = model(x)
    lo.nn.merge_(model)
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=1e-12)
    assert (model[0].weight - start).abs().max() > 0.05


def test_a_rank_as_a_fraction_is_of_each_side():
    layers = nn.Sequential(nn.Conv2d(12, 40, 3))
    assert lo.nn.tucker_adapters_(layers, rank=0.25, include="0")[0].core.shape == (10, 3, 3, 3)
    model = network(12, 40)
    assert convert("svfit", model, rank=0.25)[0][0].shift.shape == (3,)


def test_singular_values_less_themselves_leave_the_rest():
    """ΔW = −U_r Σ_r V_rᵀ: the norm of what is left is that of the other singular values."""
    weight = network(14, 26, dtype=F64)[0][0].weight.detach()
    layer = lo.nn.SVFitLinear(network(14, 26, dtype=F64)[0][0], rank=6)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(layer.singular_values.detach(), values[:6])
    with torch.no_grad():
        layer.shift.copy_(-layer.singular_values)
    torch.testing.assert_close(layer.weight.norm(), values[6:].norm())


def test_the_low_rank_part_of_salt_touches_no_leading_direction():
    layer = perturb(convert("salt", network(14, 26, dtype=F64), rank=6))[0][0]
    with torch.no_grad():
        layer.scale.zero_()
        layer.shift.zero_()
    change = layer.weight - layer.base.weight
    assert change.norm() > 0.5
    assert (layer.left.mT @ change).abs().max() < 1e-14
    assert (change @ layer.right.mT).abs().max() < 1e-14
    values = torch.linalg.svdvals(layer.base.weight)[:6]
    torch.testing.assert_close(torch.diagonal(layer.left.mT @ layer.weight @ layer.right.mT), values)


@pytest.mark.parametrize(("m", "n"), [(9, 15), (15, 9), (12, 12)])
def test_an_ldu_of_the_whole_rank_is_the_weight(m, n):
    weight = torch.randn(m, n, dtype=F64, generator=torch.Generator().manual_seed(3))
    left, pivots, right = leading_ldu(weight, min(m, n))
    torch.testing.assert_close(left * pivots @ right, weight, atol=1e-12, rtol=1e-12)
    assert left.abs().max() == 1
    assert right.diagonal().eq(1).all()
    for found, expected in zip((left, pivots, right), oracle.ldu(weight), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_random_bases_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    model = perturb(convert("nola", network(20, 12, dtype=F64)))
    x = torch.randn(5, 20, dtype=F64)
    found = []
    for part in (1, 150, 1 << 20):  # one basis, some, all
        monkeypatch.setattr(nola, "PART", part)
        model.zero_grad()
        weighted(model(x)).backward()
        found.append([model(x).detach(), model[0][0].coefficients_A.grad, model[0][0].coefficients_B.grad])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-13, rtol=1e-13)
    bases = next(iter(nola._bases(3, 400, torch.empty(100), 0.5)))[1]
    assert bases.abs().max() <= 0.5
    assert abs(float(bases.mean())) < 0.01
    assert float(bases.var()) == pytest.approx(0.25 / 3, rel=0.03)


def test_the_mixture_starts_with_the_variance_of_lora():
    layer = lo.nn.NOLALinear(nn.Linear(300, 200), rank=16, bases=500)
    a, b = layer.factors(layer.coefficients_A.detach(), layer.coefficients_B.detach())
    assert not b.any()
    assert float(a.var()) == pytest.approx(1 / 900, rel=0.2)
    other = lo.nn.NOLALinear(nn.Linear(300, 200), rank=16, bases=500, position=1)
    assert not torch.equal(other.coefficients_A, layer.coefficients_A)


def test_a_second_derivative_of_the_mixture_raises():
    layer = convert("nola", network(20, 12))[0][0]
    (grad,) = torch.autograd.grad(layer(torch.randn(2, 20)).square().sum(), layer.coefficients_B, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------- in models


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_starts_as_it_was_and_only_the_adapters_train(name, dtype):
    model, x = network(20, 12, dtype=dtype), torch.randn(3, 20).to(dtype)
    before, weight, bias = model(x), model[0][0].weight, model[0][0].bias
    assert convert(name, model) is model
    layer = model[0][0]
    assert torch.equal(model(x), before)
    assert (layer.base.weight is weight) & (layer.bias is bias)
    trained = {key: tuple(p.shape) for key, p in layer.named_parameters() if p.requires_grad}
    assert trained == TRAINED[name]
    assert all(p.dtype == dtype for p in layer.parameters())
    model(x).float().square().sum().backward()
    assert weight.grad is bias.grad is None
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters(recurse=False))
    loose = convert(name, network(20, 12, dtype=dtype), freeze_rest=False)
    assert [key for key, p in loose[0][0].base.named_parameters() if p.requires_grad] == ["bias"]
    assert adapted.AdaptedLinear.forward is type(layer).forward


@each_method
def test_bfloat16_is_near_to_float32_and_autocast_gives_its_type(name):
    exact, x = perturb(convert(name, network(20, 12))), torch.randn(50, 20)
    small = copy.deepcopy(exact).bfloat16()
    y = exact(x)
    assert (small(x.bfloat16()).float() - y).norm() < 0.03 * y.norm()
    assert (small[0][0].weight.float() - exact[0][0].weight).norm() < 0.03 * exact[0][0].weight.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = exact(x)
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - y).norm() < 0.03 * y.norm()
    cast.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in exact.parameters() if p.requires_grad)


@each_method
def test_the_new_layer_keeps_hooks_and_training_flag_and_gives_them_back(name):
    model, calls = network(20, 12).eval(), []
    handle = model[0][0].register_forward_hook(lambda *_: calls.append(1))
    convert(name, model)
    assert not model[0][0].training
    model(torch.zeros(1, 20))
    assert calls == [1]
    lo.nn.merge_(model)(torch.zeros(1, 20))
    assert calls == [1, 1]
    handle.remove()
    model(torch.zeros(1, 20))
    assert calls == [1, 1]


@each_method
def test_tied_layers_share_what_is_trained_and_come_back_tied(name):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)).double()
    model[2].weight = model[0].weight
    before = [layer.bias for layer in model]
    perturb(convert(name, model, include="0"))
    assert type(model[1]) is nn.Linear
    assert model[0].left is model[2].left if name != "nola" else model[0].stored is model[2].stored
    for key in own(model[0]):
        assert model[0].get_parameter(key) is model[2].get_parameter(key)
    assert [layer.bias for layer in model] == before
    x = torch.randn(3, 16, dtype=F64)
    y = model(x)
    lo.nn.merge_(model)
    assert model[2].weight is model[0].weight
    torch.testing.assert_close(model(x), y)


@each_method
def test_eight_bit_weights_stay_as_they_are(name):
    model = lo.nn.quantize_weights_(network(20, 12, 24), include=["0.0", "1.0"])
    decoded = model[0][0].weight.detach().decoded()
    plain = copy.deepcopy(model)
    x = torch.randn(30, 20)
    convert(name, model, include=["0.0", "1.0"])
    assert isinstance(model[0][0].base.weight, lo.nn.QuantizedWeight)
    assert torch.equal(model(x), plain(x))
    codes = model[0][0].base.weight.codes.clone()
    optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None), rule="adam", lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(x) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model[0][0].base.weight.codes, codes)
    state = model.state_dict()
    assert state["0.0.base.weight"].dtype == torch.int8
    again = convert(name, lo.nn.quantize_weights_(network(20, 12, 24)), include=["0.0", "1.0"])
    again.load_state_dict(state, strict=True)
    assert torch.equal(again(x), model(x))
    change, y = model[0][0].change(), model(x)
    lo.nn.merge_(model)
    torch.testing.assert_close(model[0][0].weight.detach(), decoded + change.detach())
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


@each_method
def test_groups_say_how_each_parameter_decays(name):
    model = convert(name, network(20, 12), freeze_rest=False)
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    decays = {
        key: group["weight_decay"] * group.get("decay_factor", 1.0) for group in groups for key in group["param_names"]
    }
    linear = {f"0.0.{key}": 0.1 for key in ("shift", "scale") if key in TRAINED[name]}
    halves = {f"0.0.{key}": 0.05 for key in TRAINED[name] if key not in ("shift", "scale")}
    assert decays == {**linear, **halves, "0.0.base.bias": 0.0}
    shown = str(lo.describe(lo.GaLoreAdamW(groups, lr=1e-3)))
    assert all(key in shown for key in linear | halves)
    with pytest.raises(ValueError, match="no parameter is low-rank"):
        lo.param_groups(model, rank=2)


def test_a_core_and_its_factors_share_the_decay():
    model = lo.nn.tucker_adapters_(nn.Sequential(nn.Conv2d(4, 6, 3)), rank=2, kernel_rank=2, include="0")
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    names = [key for group in groups for key in group["param_names"]]
    assert names == [
        f"0.{key}" for key in ("core", "input_factor", "output_factor", "kernel_factor_0", "kernel_factor_1")
    ]
    assert {group["decay_factor"] for group in groups} == {0.2}


@pytest.mark.parametrize("name", [*CONVERT, "tucker"])
def test_a_run_resumes_to_the_bit_and_updates_in_backward(name):
    class Rows(nn.Module):
        """A convolution over rows of 96 numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(1, 6, 5, padding=2), nn.Conv1d(6, 1, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.unsqueeze(1)).tanh()).squeeze(1)

    def make() -> nn.Module:
        if name != "tucker":
            return convert(name, network(96, 40, 96))
        torch.manual_seed(0)
        return lo.nn.tucker_adapters_(Rows(), rank=3, kernel_rank=2, include=["first", "last"])

    def build(model: nn.Module) -> lo.LowRankOptimizer:
        return lo.LowRankOptimizer(lo.param_groups(model, rank=None, weight_decay=0.1), rule="adam", lr=1e-2)

    model, optimizer = check_resume_and_in_backward(make, build)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) * 8 == sum(
        optimizer.state[p][key].numel() * 4 for p in trained for key in ("exp_avg", "exp_avg_sq")
    )
    start = make()
    for key, param in model.named_parameters():
        assert param.requires_grad != torch.equal(param, start.get_parameter(key)), key


@pytest.mark.parametrize("name", [*CONVERT, "tucker"])
def test_a_checkpoint_brings_all_along_and_is_plain(name):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if name == "tucker":
            conv = nn.Sequential(nn.Conv2d(6, 8, 3))
            return lo.nn.tucker_adapters_(conv, rank=3, alpha=1 + seed, seed=seed, include="0")
        seeded = {"seed": seed, "alpha": 2 + seed} if name in ("salt", "nola") else {}
        return convert(name, nn.Sequential(nn.Linear(20, 12)), include="0", **seeded)

    model, other = perturb(make(0)), make(1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is Tensor for value in state.values())
    x = torch.randn(2, 6, 5, 5) if name == "tucker" else torch.randn(5, 20)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), model(x))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))
    with torch.device("meta"):
        bare = make(1)
    bare.load_state_dict(state, assign=True)
    assert torch.equal(bare(x), model(x))
    for key in ("0.key", "0.scaling"):
        if key in state:
            with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
                make(0).load_state_dict({k: v for k, v in state.items() if k != key})
    plain = {key.replace("base.", ""): value for key, value in state.items() if "base" in key}
    with pytest.raises(RuntimeError, match=r"0\.weight is a dense weight; .* Load it into the plain model first"):
        make(0).load_state_dict(plain)


def test_compiled_and_recomputed_passes_give_the_same_gradients():
    """All methods in one model, which is compiled once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Flatten(), *(nn.Linear(20, 20) for _ in CONVERT))
    for place, name in enumerate(CONVERT, start=2):
        convert(name, model, include=str(place), freeze_rest=False)
    lo.nn.tucker_adapters_(model, rank=2, kernel_rank=2, include="0", freeze_rest=False)
    perturb(model)
    x = torch.randn(6, 3, 5)

    def gradients(run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        weighted(run(x)).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    assert len(expected) == 1 + 4 + 1 + 2 + 4 + 5  # the last: biases
    for run in (lambda x: checkpoint(model, x, use_reentrant=False), torch.compile(model, backend="eager")):
        torch.testing.assert_close(gradients(run), expected, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- the planner


def test_the_planner_knows_the_layers_by_name():
    def planned(name: str, weight_bits: int = 16, **options: object) -> lo.MemoryPlan:
        model = network(256, 512) if name != "tucker" else nn.Sequential(nn.Conv1d(256, 512, 3))
        x = torch.zeros(4, 256) if name != "tucker" else torch.zeros(4, 256, 8)
        return lo.plan(
            model,
            "GaLoreAdamW",
            parametrization=(name, {**options, "include": "0"}),
            example_batch=x,
            loss=lambda out: out.sum(),
            device="cpu",
            weight_bits=weight_bits,
        )

    dense = 256 * 512 + 512
    for name, options, fixed, trained in (
        ("svfit", {"rank": 16}, 16 * 768 + 16, 16),
        ("salt", {"rank": 16, "lora_rank": 8}, 16 * 768 + 16, 2 * 16 + 8 * 768),
        ("loldu", {"rank": 16}, 16 * 768 + 16, 16),
        ("nola", {"rank": 4, "bases": 1000}, 0, 2000),
        ("tucker", {"rank": 16}, 256 * 512 * 2, 16 * 16 * 3 + 16 * 768),
    ):
        made = planned(name, **options)
        assert made.weights_bytes == pytest.approx(4 * (dense + fixed + trained), rel=2e-3), name
        assert made.optimizer_state_bytes == pytest.approx(8 * trained, abs=4096), name
    with pytest.raises(ValueError, match=r"svfit: .*rank"):
        planned("svfit")
    coded = planned("salt", rank=16, lora_rank=8, weight_bits=8)
    beside = 4 * (512 + 16 * 768 + 3 * 16 + 8 * 768)  # bias, singular vectors, vectors, factors
    assert coded.weights_bytes == pytest.approx(256 * 512 + 4 * 512 + beside, rel=5e-3)
    with pytest.raises(ValueError, match="tucker and weight_bits=8 do not go together"):
        planned("tucker", rank=16, weight_bits=8)


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svfit", {"rank": 13}, r"0\.0: rank is 13; it must be an integer from 1 to min\(12, 20\) = 12"),
        ("svfit", {"rank": None}, "rank is None"),
        ("loldu", {"rank": 1.5}, "rank is 1.5; it must be an integer of at least 1, or a fraction"),
        ("loldu", {"rank": True}, "rank is True"),
        ("nola", {"rank": 0}, "rank is 0"),
        ("salt", {"rank": 9}, r"0\.0: lora_rank is 4; it must be an integer from 1 to min\(12, 20\) − 9 = 3"),
        ("salt", {"lora_rank": 0}, "lora_rank is 0"),
        ("salt", {"alpha": -1.0}, "alpha is -1.0; it must be positive, or None"),
        ("nola", {"alpha": math.nan}, "alpha is nan"),
        ("nola", {"bases": 0}, "bases is 0; it must be an integer of at least 1"),
        ("nola", {"bases": 2.0}, "bases is 2.0"),
        ("svfit", {"include": "nowhere"}, "nowhere"),
        ("svfit", {"exclude": "nowhere"}, "nowhere"),
        ("nola", {"include": "conv"}, "has no plain nn.Linear or Conv1D to take with include='conv'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(name, options, message):
    model = network(20, 12)
    model.conv = nn.Conv1d(12, 12, 1)
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        convert(name, model, **options)
    assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
    assert type(model[0][0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": None}, "rank is None"),
        ({"kernel_rank": 0}, "kernel_rank is 0; it must be an integer of at least 1, or None"),
        ({"kernel_rank": 1.5}, "kernel_rank is 1.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"include": "grouped"}, r"grouped: groups is 2; the core joins all channels"),
        ({"include": "linear"}, "has no plain convolution to take with include='linear'"),
        ({"include": "transposed"}, "has no plain convolution to take with include='transposed'"),
    ],
)
def test_bad_input_of_tucker_adapters_changes_nothing(options, message):
    layers = {"plain": nn.Conv2d(4, 6, 3), "grouped": nn.Conv2d(4, 6, 3, groups=2), "linear": nn.Linear(4, 4)}
    model = nn.ModuleDict(layers | {"transposed": nn.ConvTranspose2d(4, 6, 3)})
    before = str(model)
    with pytest.raises(ValueError, match=message):
        lo.nn.tucker_adapters_(model, **{"rank": 2, "include": "plain"} | options)
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


@each_method
def test_layers_that_cannot_get_an_adapter_are_named(name):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        convert(name, "model")
    with pytest.raises(ValueError, match="the model is itself"):
        convert(name, nn.Linear(20, 12))
    with pytest.raises(ValueError, match=r"no plain nn\.Linear or Conv1D"):
        convert(name, nn.Sequential(nn.Conv2d(4, 4, 3)))
    twice = convert(name, network(20, 12, 24), include="0.0")
    with pytest.raises(ValueError, match=r"0\.0\.base lies in a \w+; a layer has one adapter"):
        convert(name, twice)
    convert(name, twice, include="1.0")
    tied = nn.ModuleDict({"embed": nn.Embedding(20, 12), "proj": nn.Linear(12, 20)})
    tied["proj"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match="is tied to the weight of a linear layer"):
        convert(name, tied, include="proj")
    with pytest.raises(ValueError, match=r"base is a Conv2d; it must be"):
        type(twice[0][0])(nn.Conv2d(4, 4, 1), rank=2)
    if name != "nola":
        broken = network(20, 12, 24)
        nn.init.constant_(broken[1][0].weight, math.inf)
        with pytest.raises(ValueError, match=r"1\.0: the weight is not finite"):
            convert(name, broken)
        assert type(broken[0][0]) is nn.Linear
    with pytest.raises(AttributeError, match="cannot be set"):
        twice[0][0].weight = torch.zeros(12, 20)


def test_a_core_needs_a_convolution_and_a_layer_has_one():
    with pytest.raises(ValueError, match=r"base is a Linear; it must be an nn\.Conv1d"):
        lo.nn.TuckerConvolution(nn.Linear(3, 3), rank=1)
    model = lo.nn.tucker_adapters_(nn.Sequential(nn.Conv2d(4, 6, 3)), rank=2, include="0")
    with pytest.raises(ValueError, match=r"0\.base lies in a TuckerConvolution"):
        lo.nn.tucker_adapters_(model, rank=2)


def test_a_pivot_of_zero_is_named():
    model = network(20, 12, dtype=F64)
    with torch.no_grad():
        model[0][0].weight[:, 3] = model[0][0].weight[:, :3] @ torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with pytest.raises(ValueError, match=r"0\.0: pivot 4 of the weight is 0 to rounding.*take a rank below 4"):
        convert("loldu", model)
    assert convert("loldu", model, rank=3)[0][0].rank == 3
