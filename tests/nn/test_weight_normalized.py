"""Weight-normalised layers (GradNormLoRP): against autograd of the formula in float64, memory, 8-bit bases, and the way back."""

import copy
import io
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim.nn import CompensatedLinear, QuantizedWeight, WeightNormalizedLinear, weight_normalized_product
from tests.nn.test_decompositions_transformers import build as build_transformer
from tests.nn.test_decompositions_transformers import gpt2, llama, vit
from tests.oracles import reference
from tests.oracles.decompositions import F64, closed_form_inputs, closed_form_weight
from tests.oracles.runs import check_resume_and_in_backward

M, N, RANK = 44, 36, 5
NORMS = list(itertools.product(["column", "row"], [False, True]))


def make_layer(norm: str = "column", detach_norm: bool = False, m: int = M, n: int = N, dtype=F64, **options):
    """A layer in which no parameter is 0 and M are not the norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, dtype=dtype))
    options = {"rank": RANK, "norm": norm, "detach_norm": detach_norm, "include": "0"} | options
    layer = lo.nn.weight_normalized_(model, **options)[0]
    with torch.no_grad():
        for param in (layer.lora_A, layer.lora_B):
            param.copy_(torch.randn_like(param) * 0.3)
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer


def formula(layer: WeightNormalizedLinear, parameters: dict[str, Tensor]) -> Tensor:
    """W as a dense matrix, in a way that autograd differentiates."""
    direction = parameters["base.weight"] + parameters["lora_B"] @ parameters["lora_A"]
    norm = direction.norm(dim=0 if layer.norm == "column" else 1, keepdim=True)
    magnitude = parameters["magnitude"]
    magnitude = magnitude if layer.norm == "column" else magnitude.unsqueeze(1)
    return magnitude * direction / (norm.detach() if layer.detach_norm else norm)


def assert_same_gradients(layer: WeightNormalizedLinear, x: Tensor, tolerance: float = 1e-12) -> None:
    x = x.clone().requires_grad_()
    parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    exact = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y, expected = layer(x), F.linear(exact, formula(layer, parameters), parameters.get("base.bias"))
    turn = torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
    y.backward(turn)
    expected.backward(turn)
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad, exact.grad, atol=tolerance, rtol=tolerance)
    for name, param in layer.named_parameters():
        assert (param.grad is None) == (not param.requires_grad), name
        if param.grad is not None:
            found = parameters[name].grad
            torch.testing.assert_close(param.grad, found, atol=tolerance, rtol=tolerance, msg=name)


# ---------------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize(("norm", "detach_norm"), NORMS)
def test_outputs_and_gradients_are_those_of_the_formula(norm, detach_norm):
    for m, n in ((M, N), (N, M), (N, N)):
        assert_same_gradients(make_layer(norm, detach_norm, m, n), torch.randn(3, 7, n, dtype=F64))
    assert_same_gradients(make_layer(norm, detach_norm, train_base=True), torch.randn(3, 7, N, dtype=F64))


@pytest.mark.parametrize("norm", ["column", "row"])
def test_rows_of_v_at_a_time_change_nothing(monkeypatch, norm):
    for elements in (1, 7 * N):
        monkeypatch.setattr(weight_normalized_product, "cache_elements", lambda device, size=elements: size)
        layer = make_layer(norm, train_base=True)
        assert_same_gradients(layer, torch.randn(9, N, dtype=F64))
        parameters = dict(layer.named_parameters())
        torch.testing.assert_close(layer.weight, formula(layer, parameters).detach(), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("shape", [(N,), (0, N), (2, 0, N), (1, 1, 5, N)], ids=str)
def test_any_leading_shape(shape):
    for norm in ("column", "row"):
        assert_same_gradients(make_layer(norm), torch.randn(shape, dtype=F64))


@pytest.mark.parametrize("norm", ["column", "row"])
@pytest.mark.parametrize("frozen", [["lora_A"], ["lora_B"], ["magnitude"], ["lora_A", "lora_B"]], ids="-".join)
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(norm, frozen):
    layer = make_layer(norm)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    assert_same_gradients(layer, torch.randn(9, N, dtype=F64))


GRADIENTS_OF_M = {
    "row": [1.230588, 1.286717, 1.184943, 1.247637, 1.096312, 1.634933],
    "column": [1.115441, 1.200327, 1.262342, 1.273674, 1.193771, 1.173779, 1.039768, 0.41975],
}
GRADIENTS_OF_B = {
    ("row", False): [-0.059382, 0.033622, -0.007061, -0.105724, -0.03685, 0.011705]
    + [0.005996, -0.02232, -0.008977, -0.015714, 0.012988, 0.051965],
    ("row", True): [-0.047263, 0.056827, -0.02207, -0.076864, -0.045804, -0.062243]
    + [0.001681, -0.060558, 0.009397, -0.056298, 0.028119, 0.083237],
    ("column", False): [-0.069521, 0.049233, 0.008848, -0.102459, -0.051648, 0.007072]
    + [0.009069, -0.029424, 0.001907, -0.026016, -0.004163, 0.056782],
    ("column", True): [-0.051315, 0.053284, -0.020825, -0.077063, -0.043505, -0.059464]
    + [-0.00054, -0.061461, 0.008319, -0.056984, 0.030433, 0.086438],
}
GRADIENTS_OF_A = {
    ("row", False): [-0.009917, 0.005389, -0.000768, 0.004481, -0.021581, 0.008919, 0.020584, -0.069846]
    + [-0.002052, 0.009937, 0.003443, 0.00183, -0.012635, 0.006604, 0.013129, -0.057017],
    ("row", True): [0.135985, -0.095561, 0.029762, 0.035332, -0.012014, -0.039514, 0.080822, -0.079845]
    + [0.035007, 0.039356, -0.076373, 0.102337, -0.042154, -0.02007, 0.054897, -0.054016],
    ("column", False): [-0.008946, 0.011237, 0.009078, -0.010242, -0.01136, 0.004496, 0.010983, -0.072105]
    + [-0.00885, 0.011668, 0.013185, -0.005456, -0.008422, 0.008088, 0.00232, -0.056917],
    ("column", True): [0.135044, -0.096094, 0.030099, 0.034816, -0.01216, -0.039745, 0.08055, -0.080147]
    + [0.035063, 0.039391, -0.077252, 0.100789, -0.042346, -0.020176, 0.054674, -0.054187],
}


@pytest.mark.parametrize(("norm", "detach_norm"), NORMS)
def test_golden_numbers(norm, detach_norm):
    """6×8, rank 2, from closed formulas; M are the norms of W₀, not of V. The gradients are those of the dense G in numpy."""
    i, k = torch.arange(6, dtype=F64).unsqueeze(1), torch.arange(2, dtype=F64)
    j, t = torch.arange(8, dtype=F64), torch.arange(12, dtype=F64).unsqueeze(1)
    model = nn.Sequential(nn.Linear(8, 6, bias=False, dtype=F64))
    with torch.no_grad():
        model[0].weight.copy_(closed_form_weight(6, 8))
    layer = lo.nn.weight_normalized_(model, rank=2, norm=norm, detach_norm=detach_norm, include="0")[0]
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * torch.cos(1.3 * i + 0.7 * k))
        layer.lora_A.copy_(0.2 * torch.sin(0.9 * k.unsqueeze(1) + 0.4 * j + 0.1))
    target = torch.cos(0.3 * t + 0.5 * i.mT)
    loss = 0.5 * (layer(closed_form_inputs()) - target).square().sum() / 12
    loss.backward()
    assert loss.item() == pytest.approx({"row": 8.725718, "column": 8.725714}[norm], abs=1e-6)
    expected = {
        "magnitude": GRADIENTS_OF_M[norm],
        "lora_B": GRADIENTS_OF_B[norm, detach_norm],
        "lora_A": GRADIENTS_OF_A[norm, detach_norm],
    }
    for name, numbers in expected.items():
        found = getattr(layer, name).grad.flatten()
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=F64), atol=2e-6, rtol=0)


@pytest.mark.parametrize("norm", ["column", "row"])
def test_the_layer_starts_as_it_was_and_the_length_of_v_does_not_count(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, dtype=F64))
    x, dense = torch.randn(9, N, dtype=F64), copy.deepcopy(model)
    old = model[0]
    layer = lo.nn.weight_normalized_(model, rank=RANK, norm=norm, include="0")[0]
    assert layer.base is old
    assert layer.bias is old.bias
    torch.testing.assert_close(layer(x), dense(x), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(layer.weight, dense[0].weight.detach(), atol=1e-14, rtol=1e-14)
    layer = make_layer(norm)
    y = layer(x)
    factor = torch.rand(N if norm == "column" else M, dtype=F64) + 0.5
    with torch.no_grad():
        (layer.base.weight.mul_(factor), layer.lora_A.mul_(factor)) if norm == "column" else (
            layer.base.weight.mul_(factor.unsqueeze(1)),
            layer.lora_B.mul_(factor.unsqueeze(1)),
        )
    torch.testing.assert_close(layer(x), y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("norm", ["column", "row"])
def test_columns_and_rows_of_zeros_have_finite_gradients(norm):
    layer = make_layer(norm)
    with torch.no_grad():
        layer.base.weight[3] = layer.base.weight[:, 5] = 0
        layer.lora_B[3] = layer.lora_A[:, 5] = 0
    x = torch.randn(9, N, dtype=F64, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.magnitude):
        assert torch.isfinite(tensor.grad).all()
    assert torch.count_nonzero(layer.weight[3]) == 0
    fresh = nn.Sequential(nn.Linear(N, M, bias=False))
    nn.init.zeros_(fresh[0].weight)
    lo.nn.weight_normalized_(fresh, rank=RANK, norm=norm, include="0")
    fresh(x.float()).sum().backward()
    assert torch.isfinite(fresh[0].lora_B.grad).all()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = [arg for arg in args if isinstance(arg, Tensor)]
        for each in out if isinstance(out, tuple | list) else [out]:
            shared = any(isinstance(each, Tensor) and each.data_ptr() == view.data_ptr() for view in views)
            if isinstance(each, Tensor) and not shared:
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("norm", ["column", "row"])
def test_no_matrix_of_the_size_of_the_weight_is_made(monkeypatch, norm):
    monkeypatch.setattr(weight_normalized_product, "cache_elements", lambda device: 4096)
    model = nn.Sequential(nn.Linear(320, 256))
    lo.nn.weight_normalized_(model, rank=4, norm=norm, include="0")
    with Largest() as seen:
        model(torch.randn(8, 320, requires_grad=True)).square().sum().backward()
    assert 0 < seen.elements <= 4096
    assert model[0].base.weight.grad is None


def test_bfloat16_is_near_to_float32_and_autocast_gives_its_type():
    for norm in ("column", "row"):
        exact = make_layer(norm, dtype=torch.bfloat16).float()
        rounded, x, turn = copy.deepcopy(exact).bfloat16(), torch.randn(64, N).bfloat16(), torch.randn(64, M).bfloat16()
        for layer, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
            (layer(x.to(dtype)) * turn.to(dtype)).sum().backward()
        for name in ("lora_A", "lora_B", "magnitude"):
            ours, theirs = getattr(rounded, name).grad, getattr(exact, name).grad
            assert ours.dtype == torch.bfloat16
            assert 0 < (ours.float() - theirs).norm() < 6e-3 * theirs.norm(), name
        assert rounded(x.float()).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = exact(x.float())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact(x.float()), atol=0.1, rtol=0.02)


def test_a_second_derivative_and_a_wrong_width_raise():
    layer = make_layer()
    x = torch.randn(9, N, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(ValueError, match="in_features, 36"):
        layer(torch.randn(9, M, dtype=F64))


def test_checkpointing_and_compilation_give_the_same_gradients():
    layer, x = make_layer(), torch.randn(9, N, dtype=F64)
    found = []
    for forward in (
        layer,
        lambda x: checkpoint(layer, x, use_reentrant=False),
        torch.compile(layer, backend="aot_eager"),
    ):
        layer.zero_grad()
        forward(x).square().sum().backward()
        found.append(layer.lora_B.grad.clone())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0])


# ---------------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("norm", ["column", "row"])
def test_factors_projected_on_both_sides_train_as_written_down(norm):
    """Two-sided Adam on the factors, refreshed in steps 0 and 2, and plain Adam on M, on gradients of the formula."""
    layer = make_layer(norm)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, target = torch.randn(20, N, dtype=F64), torch.randn(20, M, dtype=F64)
    groups = lo.param_groups(layer, rank=1, include=["lora_A", "lora_B"], proj_type="full", weight_decay=0.1)
    options = {"projector": "svd", "update_proj_gap": 2, "stagger": False, "scale": 1.0, "on_refresh": "rotate"}
    optimizer = lo.GaLoreAdamW(groups, lr=0.02, eps=1e-6, **options)
    assert optimizer.state[layer.lora_B]["exp_avg"].shape == (1, 1)
    assert optimizer.state[layer.lora_B]["basis"].shape == (M, 1)
    own = {"rank": 1, "update_proj_gap": 2, "scale": 1.0, "proj_type": "full", "on_refresh": "rotate"}
    theirs = {name: reference.GaLoreAdamW(lr=0.02, eps=1e-6, weight_decay=0.05, **own) for name in ("lora_A", "lora_B")}
    for name in ("magnitude", "base.bias"):
        theirs[name] = reference.AdamW(lr=0.02, eps=1e-6, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        (layer(x) - target).square().sum().backward()
        optimizer.step()
        loss = (F.linear(x, formula(layer, parameters), parameters["base.bias"]) - target).square().sum()
        grads = torch.autograd.grad(loss, [parameters[name] for name in theirs])
        with torch.no_grad():
            for (name, rule), grad in zip(theirs.items(), grads, strict=True):
                parameters[name].copy_(torch.from_numpy(np.asarray(rule.step(parameters[name].numpy(), grad.numpy()))))
        for name in theirs:
            torch.testing.assert_close(layer.get_parameter(name), parameters[name], atol=1e-6, rtol=1e-5, msg=name)


def test_roles_of_the_parameters():
    layer = make_layer()
    groups = lo.param_groups(layer, rank=None, weight_decay=0.1)
    found = {name: group for group in groups for name in group["param_names"]}
    assert set(found) == {"lora_A", "lora_B", "magnitude", "base.bias"}
    assert [found[name].get("decay_factor", 1.0) * found[name]["weight_decay"] for name in found] == [0, 0, 0.05, 0.05]
    assert "magnitude" in lo.describe(groups)
    trained = make_layer(train_base=True)
    assert "base.weight" in lo.param_groups(trained, rank=4)[0]["param_names"]


def narrow() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96))
    return lo.nn.weight_normalized_(model, rank=12, include=["0", "2"])


def test_resume_and_updates_in_backward_are_exact():
    def build(model: nn.Module) -> lo.LowRankOptimizer:
        groups = lo.param_groups(model, rank=4, include=["lora_A", "lora_B"], proj_type="full")
        return lo.GaLoreAdamW(groups, lr=1e-2, update_proj_gap=2)

    model, optimizer = check_resume_and_in_backward(narrow, build)
    assert not any(param is model[0].base.weight for group in optimizer.param_groups for param in group["params"])


# ---------------------------------------------------------------------------------------------------------------- whole models


def test_a_base_in_8_bits():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(300, 64), nn.Linear(64, 64))
    coded = lo.nn.quantize_weights_(copy.deepcopy(dense), include=["0", "1"])
    decoded = lo.nn.dequantize_weights_(copy.deepcopy(coded))
    models = [lo.nn.weight_normalized_(each, rank=4, include=["0", "1"]) for each in (coded, decoded)]
    assert isinstance(coded[0].base.weight, QuantizedWeight)
    assert not coded[0].base.weight.requires_grad
    x = torch.randn(16, 300)
    for model in models:
        nn.init.normal_(model[0].lora_B, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
    for name in ("0.lora_A", "0.lora_B", "0.magnitude", "1.lora_B"):
        ours, theirs = (model.get_parameter(name).grad for model in models)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    file = io.BytesIO()
    torch.save(coded.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["0.base.weight"].dtype == torch.int8
    other = nn.Sequential(nn.Linear(300, 64), nn.Linear(64, 64))
    lo.nn.weight_normalized_(lo.nn.quantize_weights_(other, include=["0", "1"]), rank=4, seed=3, include=["0", "1"])
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), coded(x))
    y = coded(x)
    lo.nn.merge_(coded)
    assert type(coded[0].weight) is nn.Parameter
    torch.testing.assert_close(coded(x), y, atol=1e-4, rtol=1e-4)
    exact = dense(x)
    later = lo.nn.quantize_weights_(lo.nn.weight_normalized_(dense, rank=4, include=["0", "1"]))
    assert isinstance(later[0].base.weight, QuantizedWeight)
    assert 0 < (later(x) - exact).norm() < 0.02 * exact.norm()


def test_tied_layers_share_and_frozen_ones_stay_frozen():
    model = nn.ModuleDict({"a": nn.Linear(N, N), "b": nn.Linear(N, N, bias=False), "c": nn.Linear(N, N)})
    model["b"].weight = model["a"].weight
    model["c"].weight.requires_grad_(False)
    lo.nn.weight_normalized_(model, rank=RANK)
    assert model["a"].lora_A is model["b"].lora_A
    assert model["a"].magnitude is model["b"].magnitude
    assert [name for name, p in model["c"].named_parameters() if p.requires_grad] == ["base.bias"]
    assert [name for name, p in model["b"].named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "magnitude"]
    lo.nn.merge_(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.requires_grad
    assert not model["c"].weight.requires_grad
    alone = nn.ModuleDict({"a": nn.Linear(N, N), "norm": nn.LayerNorm(N)})
    lo.nn.weight_normalized_(alone, rank=0.25, freeze_rest=True)
    assert alone["a"].rank == 9
    assert {name for name, p in alone.named_parameters() if p.requires_grad} == {"a.lora_A", "a.lora_B", "a.magnitude"}


@pytest.mark.parametrize("function", ["weight_normalized_", "compensate_"])
def test_a_failure_in_a_late_layer_leaves_the_model_as_it_was(monkeypatch, function):
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)).double()
    reference, x, calls = copy.deepcopy(model), torch.randn(50, N, dtype=F64), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    statistics = lo.nn.collect_statistics(reference, [x], include=["0", "1"], side="input")
    kind, name = (
        (CompensatedLinear, "train_") if function == "compensate_" else (WeightNormalizedLinear, "reset_parameters")
    )
    options = (
        {"reference": reference, "statistics": statistics} if function == "compensate_" else {"include": ["0", "1"]}
    )
    works, layers = getattr(kind, name), []

    def fail(layer: nn.Module, **tensors: Tensor) -> None:
        layers.append(layer)
        if len(layers) == 2:
            raise MemoryError("no more")
        works(layer, **tensors)

    monkeypatch.setattr(kind, name, fail)
    convert = partial(getattr(lo.nn, function), **options)
    with pytest.raises(MemoryError):
        convert(model, rank=RANK)
    assert len(layers) == 2
    assert torch.equal(model(x), reference(x))
    assert calls == [1]
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)
    handle.remove()
    assert not model[0]._forward_hooks


def test_hooks_copies_pickles_and_a_second_conversion():
    model = nn.Sequential(nn.Linear(N, M))
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    lo.nn.weight_normalized_(model.eval(), rank=RANK, include="0")
    x = torch.randn(3, N)
    model(x)
    assert calls == [1]
    handle.remove()
    assert not model[0].training
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match=r"has no plain nn\.Linear or Conv1D to take"):
        lo.nn.weight_normalized_(model, rank=RANK, include="0")
    with pytest.raises(ValueError, match="has no plain"):
        lo.nn.factorize_(model, ranks={"0.base": 3})
    with pytest.raises(RuntimeError, match="weight_normalized_"):
        model.load_state_dict({"0.weight": torch.zeros(M, N)}, strict=False)
    with pytest.raises(AttributeError, match="cannot be set"):
        model[0].weight = nn.Parameter(torch.zeros(M, N))


def test_a_model_without_numbers_gets_layers_without_numbers():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(N, M))
    lo.nn.weight_normalized_(model, rank=RANK, include="0")
    assert model[0].magnitude.is_meta
    real = nn.Sequential(nn.Linear(N, M))
    lo.nn.weight_normalized_(real, rank=RANK, include="0")
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, N)
    assert torch.equal(model(x), real(x))


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_transformers_start_as_they_were_learn_and_come_back(make, layers):
    model, batch = build_transformer(make)
    exact, names = model(**batch).logits, model.state_dict().keys()
    lo.nn.weight_normalized_(model, rank=4, freeze_rest=True)
    assert sum(isinstance(module, WeightNormalizedLinear) for module in model.modules()) == layers
    torch.testing.assert_close(model(**batch).logits, exact, atol=1e-4, rtol=1e-4)
    groups = lo.param_groups(model, rank=2, include=["lora_A", "lora_B"], proj_type="full")
    optimizer = lo.GaLoreAdamW(groups, lr=1e-2)
    labels = batch.get("input_ids", torch.zeros(40, dtype=torch.int64))
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = model(**batch).logits
    lo.nn.merge_(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": N + 1}, r"0: rank is 37; it must be an integer from 1 to min\(44, 36\)"),
        ({"rank": True}, "rank is True"),
        ({"rank": None}, "rank is None"),
        ({"norm": "columns"}, "norm is 'columns'; valid values"),
        ({"include": "nothing"}, "nothing"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_changes_nothing(options, message):
    model = nn.Sequential(nn.Linear(N, M))
    old = model[0]
    with pytest.raises(ValueError, match=message):
        lo.nn.weight_normalized_(model, **({"rank": RANK, "include": "0"} | options))
    assert model[0] is old
    assert old.weight.requires_grad


def test_weights_that_cannot_be_taken_are_named():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 24), "proj": nn.Linear(24, 16), "other": nn.Linear(24, 16)})
    model["embed"].weight = model["proj"].weight
    with pytest.raises(ValueError, match=r"embed\.weight of Embedding is tied .*proj\.weight"):
        lo.nn.weight_normalized_(model, rank=RANK, include=["embed", "other"])
    broken = nn.Sequential(nn.Linear(N, M))
    nn.init.constant_(broken[0].weight, float("inf"))
    with pytest.raises(ValueError, match=r"0\.weight is not finite"):
        lo.nn.weight_normalized_(broken, rank=RANK, include="0")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lo.nn.weight_normalized_([], rank=RANK)
    with pytest.raises(ValueError, match="base is a Embedding"):
        WeightNormalizedLinear(nn.Embedding(3, 3), rank=1)
