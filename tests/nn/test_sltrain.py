"""Sparse plus low-rank layers: against dense float64 formulas, their memory, checkpoints, training, and the way back."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim.kernels import Loaded, backends, sparse_reference
from lowrank_optim.kernels.counter_rng import choose_stratified
from lowrank_optim.nn import SparseLowRankLinear
from lowrank_optim.nn import supports as supports_module
from lowrank_optim.nn.supports import (
    SeededSupport,
    linear_indices,
    support_from_indices,
    support_from_rows,
    support_key,
    uniform_support,
)

M, N, RANK = 44, 36, 5
CPU = torch.device("cpu")
SUPPORTS = ["random", "uniform", "columns", "indices"]


def make_layer(support: str = "random", dtype: torch.dtype = torch.float64, **options: object) -> SparseLowRankLinear:
    """A layer in which no parameter is 0."""
    torch.manual_seed(0)
    given = torch.tensor([0, 5, 35, 36, 700, 701, M * N - 1]) if support == "indices" else support
    layer = SparseLowRankLinear(N, M, **{"rank": RANK, "density": 0.07, "support": given, "dtype": dtype} | options)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn_like(param) * 0.3)
    return layer


def places(layer: SparseLowRankLinear) -> list[tuple[int, int]]:
    """Row and column of each value, from what a checkpoint would store."""
    state = layer.state_dict()
    if "support" in state:
        key = support_key(layer.seed, layer.position)
        index = choose_stratified(key, M * N, layer.sparse_value.numel(), CPU)
        return [divmod(i, N) for i in index.tolist()]
    if "sparse_columns" in state:
        return [(i, j) for i in range(M) for j in state["sparse_columns"].tolist()]
    bounds, columns = state["sparse_rows"].tolist(), [a + 256 * b for a, b in state["sparse_index"].tolist()]
    return [(i, columns[k]) for i in range(M) for k in range(bounds[i], bounds[i + 1])]


def dense_weight(layer: SparseLowRankLinear) -> Tensor:
    """W as a dense matrix, in a way that autograd differentiates."""
    weight = layer.sparse_value.new_zeros(M, N)
    if layer.lora_A is not None:
        s = torch.tanh(layer.scaling) if layer.scaling is not None else (layer.alpha or layer.rank) / layer.rank
        weight = s * (layer.lora_B @ layer.lora_A)
    rows, columns = zip(*places(layer), strict=True)
    return weight.index_put((torch.tensor(rows), torch.tensor(columns)), layer.sparse_value, accumulate=True)


def gradients(layer: SparseLowRankLinear, x: Tensor, dense: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = F.linear(x, dense_weight(layer), layer.bias) if dense else layer(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))).sum().backward()
    found = {name: param.grad for name, param in layer.named_parameters() if param.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same_gradients(layer: SparseLowRankLinear, x: Tensor) -> None:
    ours, theirs = gradients(layer, x, False), gradients(layer, x, True)
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], atol=1e-12, rtol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 8.0}, {"trainable_scaling": True}, {"bias": False}], ids=lambda o: next(iter(o), "plain")
)
def test_outputs_and_gradients_are_those_of_the_dense_formula(support, options):
    layer = make_layer(support, **options)
    assert_same_gradients(layer, torch.randn(3, 7, N, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(N,), (0, N), (2, 0, N), (1, 1, 5, N)], ids=str)
def test_any_leading_shape(shape):
    assert_same_gradients(make_layer(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("elements", [1, 100, 10**9])
@pytest.mark.parametrize("support", ["random", "uniform"])
def test_the_size_of_tiles_changes_nothing(monkeypatch, support, elements):
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "reference")
    monkeypatch.setattr(sparse_reference, "TILE_ELEMENTS", elements)
    assert_same_gradients(make_layer(support), torch.randn(9, N, dtype=torch.float64))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 8.0}, {"trainable_scaling": True}], ids=lambda o: next(iter(o), "plain")
)
def test_a_saved_projection_changes_no_gradient(support, options):
    x = torch.randn(3, 7, N, dtype=torch.float64)
    layer = make_layer(support, save_projection=True, **options)
    assert_same_gradients(layer, x)
    first, second = gradients(layer, x, False), gradients(make_layer(support, **options), x, False)
    assert all(torch.equal(found, second[name]) for name, found in first.items())
    y = layer(x).square().sum()
    once, twice = (torch.autograd.grad(y, layer.lora_B, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("support", ["random", "uniform"])
def test_float32_gradients_of_a_large_layer_are_those_of_the_dense_formula(support):
    """On whichever kernels are there: more rows, columns and tokens than one of their tiles has, none a multiple of it."""
    m, n, tokens = 203, 331, 150
    layer = SparseLowRankLinear(n, m, rank=19, density=0.05, alpha=3.0, support=support)
    nn.init.normal_(layer.lora_B, std=0.3)
    wide, x = copy.deepcopy(layer).double(), torch.randn(tokens, n)
    weight = wide.weight.clone().requires_grad_()
    exact = x.double().requires_grad_()
    out, turn = layer(x.requires_grad_()), torch.randn(tokens, m)
    out.backward(turn)
    expected = F.linear(exact, weight, wide.bias)
    expected.backward(turn.double())
    dw = weight.grad
    for found, want in [
        (out, expected),
        (x.grad, exact.grad),
        (layer.sparse_value.grad, dw.view(-1)[linear_indices(layer.entries, CPU)]),
        (layer.lora_B.grad, 3 / 19 * dw @ wide.lora_A.mT),
        (layer.lora_A.grad, 3 / 19 * wide.lora_B.mT @ dw),
    ]:
        assert (found.double() - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "sparse_value", "bias"])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen):
    layer = make_layer()
    getattr(layer, frozen).requires_grad_(False)
    assert_same_gradients(layer, torch.randn(9, N, dtype=torch.float64))
    assert getattr(layer, frozen).grad is None


def test_an_input_without_gradient():
    layer, x = make_layer(), torch.randn(9, N, dtype=torch.float64)
    expected = gradients(layer, x, True)
    layer.zero_grad()
    y = layer(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))).sum().backward()
    torch.testing.assert_close(layer.sparse_value.grad, expected["sparse_value"], atol=1e-12, rtol=1e-12)


def test_density_one_is_a_dense_layer_and_the_ends_are_low_rank_or_sparse_alone():
    x = torch.randn(9, N, dtype=torch.float64)
    full = make_layer(density=1.0, rank=0)
    assert full.lora_A is None
    assert full.sparse_value.numel() == M * N
    torch.testing.assert_close(full(x), F.linear(x, full.sparse_value.view(M, N), full.bias))
    assert_same_gradients(make_layer(rank=0), x)
    low = make_layer(density=0.0, alpha=10.0)
    assert low.sparse_value is None
    torch.testing.assert_close(low(x), F.linear(x, 2.0 * low.lora_B @ low.lora_A, low.bias))
    assert [name for name, _ in low.named_parameters()] == ["lora_A", "lora_B", "bias"]


def test_a_scale_of_zero_is_trained():
    layer = make_layer(trainable_scaling=True)
    with torch.no_grad():
        layer.scaling.zero_()
    assert_same_gradients(layer, torch.randn(9, N, dtype=torch.float64))
    assert layer.scaling.grad.abs().item() > 1e-3


def test_numbers_of_the_released_code():
    """6×8, rank 2, s = 2, from closed formulas; the numbers were made by the released C++ extension in float64."""
    i, k, j = torch.arange(6.0).double(), torch.arange(2.0).double(), torch.arange(8.0).double()
    t = torch.arange(12.0).double()
    index = torch.tensor(sorted((7 * e + 3) % 48 for e in range(9)))
    layer = SparseLowRankLinear(8, 6, rank=2, alpha=4, support=index, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * torch.cos(1.3 * i[:, None] + 0.7 * k))
        layer.lora_A.copy_(0.2 * torch.sin(0.9 * k[:, None] + 0.4 * j + 0.1))
        layer.sparse_value.copy_(torch.tensor([0.05 * (-1) ** e * (e + 1) for e in range(9)]))
        layer.bias.copy_(0.01 * i)
    x = torch.sin(0.37 * (t[:, None] + 1) * (j + 2)).requires_grad_()
    target = torch.cos(0.3 * t[:, None] + 0.5 * i)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        y = layer(x)
        loss = 0.5 * (y - target).square().sum()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            found = {
                "y": y[0],
                "B": layer.lora_B.grad[1],
                "A": layer.lora_A.grad[1],
                "v": layer.sparse_value.grad,
                "b": layer.bias.grad,
                "x": x.grad[0],
            }
            expected = {
                "y": [0.223483, -0.057755, -0.024462, -0.356544, 0.172642, 0.514135],
                "B": [-0.912938, -1.250924],
                "A": [0.213614, 0.092064, 0.385745, 0.349943, -0.107609, 0.620656, -0.375243, 0.378145],
                "v": [0.638283, -0.271049, 0.135671, -1.544838, 0.340592, -2.896965, 2.634356, -2.667178, 3.109592],
                "b": [0.638691, 3.495523, 5.939222, 6.130444, 6.462524, 4.145563],
                "x": [0.192295, -0.046859, -0.030639, 0.255919, 0.166346, 0.647583, -0.22159, -0.179603],
            }
            for name, numbers in expected.items():
                torch.testing.assert_close(found[name].detach(), torch.tensor(numbers).double(), atol=2e-6, rtol=0)
            found = expected = {}
        optimizer.step()
    assert losses == pytest.approx([21.267556, 19.442329, 17.969516], abs=2e-6)
    last = torch.tensor([0.031906, -0.093121, 0.145692, -0.156768, 0.240777, -0.214857, 0.277995, -0.3269, 0.362761])
    torch.testing.assert_close(layer.sparse_value.detach(), last.double(), atol=2e-6, rtol=0)
    b = [0.11332, 0.094776, 0.052304, -0.005106, -0.063361, -0.067747]
    b += [-0.053262, 0.037288, 0.041776, 0.099112, 0.056222, 0.03978]
    a = [0.007639, 0.101544, 0.147929, 0.186604, 0.200292, 0.157427, 0.117826, 0.049833]
    a += [0.166357, 0.196206, 0.185179, 0.153745, 0.106196, 0.012289, -0.038084, -0.135468]
    for factor, numbers in ((layer.lora_B, b), (layer.lora_A, a)):
        torch.testing.assert_close(factor.detach().flatten(), torch.tensor(numbers).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("support", ["random", "uniform", "columns"])
def test_bfloat16_is_near_to_float32(support):
    exact = make_layer(support).bfloat16().float()
    rounded, x, weights = copy.deepcopy(exact).bfloat16(), torch.randn(64, N).bfloat16(), torch.randn(64, M).bfloat16()
    found = {}
    for layer, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf)
        (y * weights.to(dtype)).sum().backward()
        found[dtype] = {"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}
    for name, expected in found[torch.float32].items():
        ours = found[torch.bfloat16][name]
        assert ours.dtype == torch.bfloat16
        error = (ours.float() - expected).norm() / expected.norm()
        assert 0 < error < 3e-3, name


def test_autocast_gives_its_type_and_gradients_of_the_parameters_type():
    layer, x = make_layer(dtype=torch.float32), torch.randn(9, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.sparse_value.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.03)


def test_an_input_of_another_type_keeps_it():
    layer = make_layer(dtype=torch.bfloat16)
    assert layer(torch.randn(4, N)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)], ids=str)
def test_the_output_may_be_changed_in_place(shape):
    layer, x = make_layer(), torch.randn(shape, dtype=torch.float64)
    F.relu(layer(x), inplace=True).square().sum().backward()
    found = layer.lora_A.grad.clone()
    layer.zero_grad()
    F.relu(F.linear(x, dense_weight(layer), layer.bias)).square().sum().backward()
    torch.testing.assert_close(found, layer.lora_A.grad, atol=1e-12, rtol=1e-12)


def test_a_second_derivative_raises():
    layer, x = make_layer(), torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_input_of_the_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"\(3, 35\).*in_features, 36"):
        make_layer()(torch.randn(3, 35, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------- memory


def largest_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest single allocation of torch's allocator while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


def passes(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    grad = torch.randn(*x.shape[:-1], layer.out_features, dtype=x.dtype)
    return lambda: layer(x).backward(grad)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("support", ["random", "uniform", "columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_is_as_large_as_the_weight(support, dtype, backend, monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
    m, n, weight = 1024, 512, 1024 * 512 * dtype.itemsize
    layer = SparseLowRankLinear(n, m, rank=8, density=0.03, support=support, dtype=dtype)
    x = torch.randn(16, n, dtype=dtype, requires_grad=True)
    passes(layer, x)()  # what a first call makes once
    found = largest_allocation(passes(layer, x))
    if backend or not isinstance(backends()["cpu"], Loaded):  # a slice of rows, in float32 where its parts are added up
        assert 0 < found <= m * n // 4 * max(4, dtype.itemsize)
    else:
        assert 0 < found <= weight // 4
    dense = nn.Linear(n, m, dtype=dtype)
    assert largest_allocation(passes(dense, x)) >= weight


def test_only_the_input_and_parameters_are_saved():
    layer, x, saved, shapes = make_layer(), torch.randn(9, N, dtype=torch.float64, requires_grad=True), [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda t: t
    ):
        layer(x)
    assert set(saved) == {x.data_ptr()} | {param.data_ptr() for param in layer.parameters()}
    layer.save_projection = True
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        layer(x)
    assert sorted(shapes) == sorted([(9, RANK), (9, N), *(tuple(param.shape) for param in layer.parameters())])


def test_a_seeded_support_stores_nothing_and_the_others_two_or_four_bytes_an_entry():
    assert list(make_layer().buffers()) == []
    layer = make_layer("uniform")
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 2 * layer.sparse_value.numel() + 4 * (M + 1)
    assert sum(buffer.nbytes for buffer in make_layer("columns").buffers()) == 4 * round(0.07 * N)
    for n, size in ((32768, 2), (32769, 4)):
        last = SparseLowRankLinear(n, 2, rank=1, support=torch.tensor([0, n - 1, 2 * n - 1]))
        assert last.sparse_index.nbytes == size * 3
        assert linear_indices(last.entries, CPU).tolist() == [0, n - 1, 2 * n - 1]
        assert torch.equal(last.weight.view(-1)[linear_indices(last.entries, CPU)], last.sparse_value)
        last(torch.randn(3, n)).sum().backward()


# ---------------------------------------------------------------------------------------------------------------- supports


@pytest.mark.parametrize("shape", [(44, 36), (1, 100), (100, 1), (257, 129)])
@pytest.mark.parametrize(("size", "seeds"), [(1, 1), (40, 10), (10**6, 20)])
def test_a_seeded_support_is_the_whole_draw_however_many_entries_are_drawn_at_a_time(monkeypatch, shape, size, seeds):
    monkeypatch.setattr(supports_module, "DRAWN", size)
    m, n = shape
    for seed in range(seeds):
        support = SeededSupport(m, n, max(1, math.floor(0.07 * m * n)), support_key(seed, 3))
        index = linear_indices(support, CPU)
        assert torch.equal(index, choose_stratified(support.key, m * n, support.count, CPU))
        pointers, columns = support.compressed(CPU)
        assert torch.equal(linear_indices(support_from_rows(m, n, pointers, columns), CPU), index)
        assert (pointers.dtype, columns.dtype) == (torch.int32, torch.int16)


@pytest.mark.parametrize("support", ["random", "uniform"])
def test_counts_are_exact_and_indices_distinct_ascending_in_range(support):
    for density in (0.03, 0.07, 0.5, 1.0):
        layer = make_layer(support, density=density)
        index = linear_indices(layer.entries, CPU)
        assert index.numel() == layer.sparse_value.numel() == math.floor(density * M * N)
        assert torch.all(index.diff() > 0)
        assert index[0] >= 0
        assert index[-1] < M * N


@pytest.mark.long
def test_rows_of_a_seeded_support_are_balanced_and_every_element_is_as_likely():
    support = SeededSupport(512, 1376, math.floor(0.03 * 512 * 1376), support_key(0, 0))
    rows = torch.bincount(linear_indices(support, CPU) // 1376, minlength=512)
    assert rows.min() >= 39
    assert rows.max() <= 44
    hits = torch.zeros(6 * 8)
    for seed in range(4000):
        hits[linear_indices(SeededSupport(6, 8, 9, support_key(seed, 0)), CPU)] += 1
    expected = 4000 * 9 / 48
    assert (hits - expected).abs().max() < 5 * math.sqrt(expected)


def test_layers_and_seeds_have_supports_of_their_own():
    def index(seed: int, position: int) -> list[int]:
        return linear_indices(make_layer(seed=seed, position=position).entries, CPU).tolist()

    assert index(0, 0) == index(0, 0)
    assert len({tuple(index(seed, position)) for seed in (0, 1) for position in (0, 1)}) == 4


def test_stored_supports_read_back_what_went_in():
    for seed in range(5):
        support = uniform_support(M, N, 100, seed, CPU)
        index = linear_indices(support, CPU)
        assert torch.equal(index, linear_indices(support_from_indices(M, N, index), CPU))
        assert torch.equal(index, linear_indices(support_from_rows(M, N, support.pointers, support.columns), CPU))
    assert (support.columns.dtype, support.pointers.dtype) == (torch.int16, torch.int32)


@pytest.mark.parametrize("index", [[3, 3], [5, 4], [-1, 4], [4, M * N]], ids=str)
def test_bad_indices_raise(index):
    with pytest.raises(ValueError, match="ascending, distinct and in"):
        SparseLowRankLinear(N, M, rank=2, support=torch.tensor(index))


# ---------------------------------------------------------------------------------------------------------------- models


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 16, bias=False)).to(dtype)


def convert(model: nn.Module, **options: object) -> nn.Module:
    return lo.nn.sltrain_(model, **{"rank": 4, "density": 0.1, "init": "fresh"} | options)


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 24, generator=generator), torch.randn(32, 16, generator=generator)
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).float().square().mean()


def test_the_new_layer_keeps_bias_hooks_type_and_training_flag():
    model = make_model(torch.bfloat16).eval()
    bias, calls = model[0].bias, []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    assert convert(model) is model
    layer = model[0]
    assert isinstance(layer, SparseLowRankLinear)
    assert layer.bias is bias
    assert not layer.training
    assert layer.lora_A.dtype == layer.sparse_value.dtype == layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (40, 24)
    assert not layer.weight.requires_grad
    loss_of(model)
    handle.remove()
    loss_of(model)
    assert calls == [1]
    with pytest.raises(AttributeError, match="merge_"):
        layer.weight = nn.Parameter(torch.zeros(40, 24))


def test_the_initial_numbers():
    layer = convert(make_model(torch.float64), rank=12)[0]
    bound = 1 / math.sqrt(24)
    for param in (layer.lora_A.detach(), layer.sparse_value.detach()):
        assert param.abs().max() <= bound
        assert param.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert torch.count_nonzero(layer.lora_B) == 0
    again = convert(make_model(torch.float64), rank=12)[0]
    assert torch.equal(layer.lora_A, again.lora_A)
    assert not torch.equal(layer.lora_A, convert(make_model(torch.float64), rank=12, seed=1)[0].lora_A)


@pytest.mark.parametrize("support", ["random", "uniform", "columns"])
def test_merge_gives_a_plain_model_with_the_same_outputs(support):
    model = convert(make_model(torch.float64), support=support, alpha=16, trainable_scaling=False)
    for param in model.parameters():
        nn.init.normal_(param, std=0.2)
    x = torch.randn(5, 24, dtype=torch.float64)
    expected, bias = model(x), model[0].bias
    merged = lo.nn.merge_(model)
    assert [type(module) for module in merged] == [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
    assert merged[0].bias is bias
    assert merged[3].bias is None
    assert merged[0].weight.requires_grad
    torch.testing.assert_close(merged(x), expected, atol=1e-12, rtol=1e-12)
    assert merged.state_dict().keys() == make_model().state_dict().keys()
    with pytest.raises(ValueError, match="has no layer"):
        lo.nn.merge_(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_model_trains(dtype):
    model = convert(make_model(dtype), density=0.2)
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    optimizer = lo.GaLoreAdamW(groups, lr=1e-2)
    first = loss_of(model).item()
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(40):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model).item() < 0.6 * first
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_param_groups_halve_the_decay_of_factors_and_keep_that_of_values():
    model = convert(make_model(torch.float64), alpha=8)
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    factor = {
        name: group.get("decay_factor", 1.0) * group["weight_decay"]
        for group in groups
        for name in group["param_names"]
    }
    assert {name: factor[f"0.{name}"] for name in ("lora_A", "lora_B", "sparse_value", "bias")} == {
        "lora_A": 0.05,
        "lora_B": 0.05,
        "sparse_value": 0.1,
        "bias": 0.0,
    }
    nn.init.normal_(model[0].lora_B)
    before, optimizer = model[0].weight, lo.GaLoreAdamW(groups, lr=0.01)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (model[0].weight - (1 - 0.001) * before).norm() < 1e-6 * before.norm()
    assert (model[0].weight - before).norm() > 5e-4 * before.norm()


def test_low_rank_updates_of_factors_when_a_pattern_names_them():
    model = convert(make_model())
    groups = lo.param_groups(model, rank=2, include="*.lora_B")
    assert groups[0]["param_names"] == ["0.lora_B", "3.lora_B"] or any(
        group["rank"] == 2 and set(group["param_names"]) == {"0.lora_B", "3.lora_B"} for group in groups
    )
    with pytest.raises(ValueError, match="no parameter is low-rank"):
        lo.param_groups(model, rank=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_training_resumes_to_the_bit(bits):
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = convert(make_model(), seed=seed, alpha=10, rank=3)
        return model, lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-2, state_bits=bits)

    whole, optimizer = build(0)
    train(whole, optimizer, 6)
    half, optimizer = build(0)
    train(half, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = build(7)  # another seed: the support comes from the checkpoint
    assert resumed[0].entries != half[0].entries
    resumed.load_state_dict(saved["model"], strict=True)
    assert resumed[0].entries == half[0].entries
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 3)
    for name, param in whole.named_parameters():
        assert torch.equal(param, dict(resumed.named_parameters())[name]), name


def test_updates_in_backward():
    models = [convert(make_model()) for _ in range(2)]
    for in_backward, model in enumerate(models):
        optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-2)
        handle = lo.update_in_backward(optimizer) if in_backward else None
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    model, x = convert(make_model(torch.float64)), torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(model[0].lora_B)
    model(x).square().sum().backward()
    expected = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(param.grad, old) for param, old in zip(model.parameters(), expected, strict=True))


def test_a_compiled_model_gives_the_same_numbers():
    model, x = convert(make_model(torch.float64)), torch.randn(6, 24, dtype=torch.float64)
    nn.init.normal_(model[0].lora_B)
    model(x).square().sum().backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name])


def test_copies_and_pickles_compute_the_same():
    for support in ("random", "uniform", "columns"):
        layer, x = make_layer(support), torch.randn(3, N, dtype=torch.float64)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for same in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(same(x), layer(x))


# ---------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("target", ["random", "uniform", "indices"])
@pytest.mark.parametrize("source", ["random", "uniform", "indices"])
def test_a_checkpoint_brings_its_support_along(source, target):
    count = {"indices": 7}.get(source)
    density = (7.5 / (M * N)) if count or target == "indices" else 0.07
    saved = make_layer(source, density=density, seed=1, alpha=10, rank=3)
    loaded = make_layer(target, density=density, seed=2, rank=3)
    loaded.load_state_dict(saved.state_dict(), strict=True)
    x = torch.randn(4, N, dtype=torch.float64)
    assert torch.equal(loaded(x), saved(x))
    assert loaded.state_dict().keys() == saved.state_dict().keys()


def test_the_state_dict_has_plain_tensors_only():
    state = make_layer(alpha=10, rank=3).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items() if name in ("support", "scale")} == {
        "support": ((3,), torch.int64),
        "scale": ((), torch.float64),
    }
    assert float(state["scale"]) == 10 / 3
    assert all(type(tensor) is Tensor for tensor in state.values())


def released_state(layer: SparseLowRankLinear) -> dict[str, Tensor]:
    """What the released code saves of such a layer: int64 linear indices, no scale."""
    state = {name: param.detach().clone() for name, param in layer.named_parameters()}
    return state | {"sparse_index": linear_indices(layer.entries, CPU)}


def test_a_checkpoint_of_the_released_code_loads_where_alpha_is_given():
    saved, x = make_layer("uniform", alpha=10.0), torch.randn(4, N, dtype=torch.float64)
    loaded = make_layer("random", alpha=10.0, seed=3)
    loaded.load_state_dict(released_state(saved), strict=True)
    assert torch.equal(loaded(x), saved(x))
    assert loaded.sparse_index.shape == (saved.sparse_value.numel(), 2)
    state = saved.state_dict()
    state["sparse_index"] = saved.sparse_index.view(torch.int16).view(-1).int()  # as saved before columns had two bytes
    older = make_layer("uniform", alpha=10.0, seed=4)
    older.load_state_dict(state, strict=True)
    assert torch.equal(older(x), saved(x))
    with pytest.raises(RuntimeError, match="does not say alpha"):
        make_layer("random").load_state_dict(released_state(saved))
    trained = make_layer("uniform", trainable_scaling=True)
    other = make_layer("random", trainable_scaling=True, seed=3)
    other.load_state_dict(released_state(trained), strict=True)
    assert torch.equal(other(x), trained(x))


def test_checkpoints_that_do_not_fit_raise():
    layer = make_layer()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="trainable_scaling=True"):
        layer.load_state_dict(make_layer(trainable_scaling=True).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*support"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "support"})
    with pytest.raises(RuntimeError, match=r"dense weight.*sltrain_"):
        layer.load_state_dict(state | {"weight": torch.zeros(M, N)})
    with pytest.raises(RuntimeError, match=r"the layer 110 values"):
        layer.load_state_dict(make_layer(density=0.1).state_dict())
    bad = released_state(layer)
    bad["sparse_index"][3] = bad["sparse_index"][2]
    with pytest.raises(RuntimeError, match="ascending, distinct"):
        make_layer(alpha=3.0).load_state_dict(bad)


# ---------------------------------------------------------------------------------------------------------------- from weights


@pytest.mark.parametrize("support", ["random", "uniform", "residual", "columns"])
def test_svd_comes_nearer_to_the_weights_with_every_round(support):
    errors = []
    for rounds in (1, 2, 5, 10):
        model = make_model(torch.float64)
        weight = model[0].weight.detach().clone()
        convert(model, init="svd", support=support, rounds=rounds, alpha=8)
        errors.append((model[0].weight - weight).norm().item())
    values = torch.linalg.svdvals(weight)
    assert errors[0] < values[4:].norm()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.999 * errors[0]
    torch.testing.assert_close(model[0].lora_A.norm(dim=1), model[0].lora_B.norm(dim=0))


def test_svd_of_a_weight_of_that_form_gives_it_back():
    model = make_model(torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 3).double() @ torch.randn(3, 24).double())
        model[0].weight[5, 7] += 12
        model[0].weight[11, 2] -= 12
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    convert(model, rank=3, density=2.5 / 960, init="svd", support="residual", include="0", rounds=50)
    torch.testing.assert_close(model[0].weight, weight)
    assert {tuple(divmod(i, 24)) for i in linear_indices(model[0].entries, CPU).tolist()} == {(5, 7), (11, 2)}
    assert model[0].bias is bias


def test_the_whole_rank_gives_the_weight_and_the_trainable_scale_too():
    model = make_model(torch.float64)
    weight = model[0].weight.detach().clone()
    convert(model, rank=16, init="svd", trainable_scaling=True, include="3")
    convert(model, rank=24, init="svd", alpha=3, include="0")
    torch.testing.assert_close(model[0].weight, weight)
    torch.testing.assert_close(model[3].weight, make_model(torch.float64)[3].weight.detach())


# ---------------------------------------------------------------------------------------------------------------- bad input


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def test_tied_layers_share_their_parameters_and_come_back_tied():
    model, x = Tied().double(), torch.randn(3, 16, dtype=torch.float64)
    convert(model)
    assert model.first.lora_A is model.second.lora_A
    assert model.first.sparse_value is model.second.sparse_value
    assert model.first.bias is not model.second.bias
    assert type(model.head) is nn.Linear
    nn.init.normal_(model.first.lora_B)
    expected = model(x)
    names = [name for group in lo.param_groups(model, rank=None) for name in group["param_names"]]
    assert sorted(names) == sorted(
        ["first.lora_A", "first.lora_B", "first.sparse_value", "first.bias", "second.bias", "head.weight", "head.bias"]
    )
    lo.nn.merge_(model)
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(model(x), expected)


def test_frozen_layers_stay_frozen():
    model = make_model()
    model[0].weight.requires_grad_(False)
    convert(model)
    assert [name for name, param in model[0].named_parameters() if param.requires_grad] == ["bias"]
    assert not lo.nn.merge_(model)[0].weight.requires_grad


def test_weights_tied_to_other_modules_are_refused_before_anything_changes():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 24), "proj": nn.Linear(24, 16), "other": nn.Linear(24, 16)})
    model["embed"].weight = model["proj"].weight
    with pytest.raises(ValueError, match=r"embed\.weight of Embedding is tied .*proj\.weight"):
        convert(model, include=["other", "proj"])
    assert type(model["other"]) is nn.Linear


def test_layers_within_multihead_attention_stay_as_they_are():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "mlp": nn.Linear(16, 16)})
    convert(model)
    assert isinstance(model["mlp"], SparseLowRankLinear)
    assert not isinstance(model["attention"].out_proj, SparseLowRankLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": None}, "init is None; 'fresh'.*'svd'"),
        ({"init": "random"}, "init is 'random'"),
        ({"rank": 17}, r"rank is 17 for 3, 16×40; it must be an integer from 0 to 16"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"density": 1.5}, "density is 1.5 for 0, 40×24"),
        ({"density": -0.1}, "density is -0.1"),
        ({"rank": 0, "density": 0}, "both 0"),
        ({"rank": 0, "density": 1e-9}, "leaves no entry"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 3, "trainable_scaling": True}, "leave alpha out"),
        ({"rank": 0, "trainable_scaling": True}, "nothing to scale"),
        ({"support": "diagonal"}, "support is 'diagonal'; valid"),
        ({"support": "residual"}, "needs init='svd'"),
        ({"init": "svd", "rounds": 0}, "rounds is 0"),
        ({"include": "attn"}, "matches no parameter"),
        ({"include": ["0", "2"]}, "cannot make low-rank|cannot be taken"),
    ],
    ids=str,
)
def test_bad_input_is_named_and_changes_nothing(options, message):
    model = make_model()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert [id(module) for module in model.modules()] == before


def test_models_that_cannot_be_taken():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        lo.nn.sltrain_([nn.Linear(4, 4)], init="fresh")
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        lo.nn.merge_([nn.Linear(4, 4)])
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        convert(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="stored in 8 bits"):
        convert(lo.nn.quantize_weights_(make_model()))
    with pytest.raises(ValueError, match=r"no plain nn\.Linear"):
        convert(nn.Sequential(nn.Conv2d(8, 8, 3)))
    both = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0' matches no plain"):
        convert(both, include=["0", "1"])
    with pytest.raises(ValueError, match="'0' matches no plain"):
        convert(both, include=(pattern for pattern in ("0", "1")))  # which can be read once
    model = make_model()
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(ValueError, match=r"0\.weight is not finite"):
        convert(model, init="svd")


def test_meta_models_are_converted_for_planning():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="meta device"):
        convert(model, init="svd")
    with pytest.raises(ValueError, match="meta device"):
        convert(model, support="uniform")
    convert(model)
    assert model[0].sparse_value.is_meta
    assert model[0].sparse_value.numel() == 96


def test_the_planner_takes_a_converted_model():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 512, bias=False), nn.GELU(), nn.Linear(512, 256, bias=False))

    def planned(model: nn.Module) -> int:
        made = lo.plan(
            model,
            lambda model: lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-3),
            example_batch=torch.zeros(4, 256),
            loss=lambda output: output.sum(),
        )
        return made.weights_bytes

    dense = planned(build())
    ours = planned(lo.nn.sltrain_(build(), rank=8, density=0.03, init="fresh", include=["0", "2"]))
    numbers = 2 * (8 * (512 + 256) + math.floor(0.03 * 512 * 256))
    assert dense == 4 * 2 * 512 * 256
    assert ours == pytest.approx(4 * numbers, rel=0.02)
