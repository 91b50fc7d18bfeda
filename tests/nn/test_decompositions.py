"""Low-rank decompositions of trained layers, against regressions and whitened SVDs in float64 (`oracles.decompositions`)."""

import copy
import io
import math
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.nn import CompensatedLinear, LowRankEmbedding, LowRankLinear, Moments, TokenCounts
from lowrank_optim.nn.decompositions import output_axes, project_outputs
from lowrank_optim.nn.select_ranks import normalized, threshold
from tests.oracles.decompositions import (
    F64,
    best_affine_of_rank,
    closed_form_inputs,
    closed_form_weight,
    eora_pair,
    mean_square,
    truncated,
)
from tests.oracles.runs import check_resume_and_in_backward


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def correlated(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Rows with a mean and directions of very different variance."""
    mixing = draw(cols, cols, seed=seed + 1) * torch.logspace(0.5, -1.5, cols, dtype=F64)
    return draw(rows, cols, seed=seed) @ mixing.mT + draw(cols, seed=seed + 2)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """A model of one layer."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return nn.Sequential(layer)


def by_features(model: nn.Module, data: list[Tensor], side: str = "auto", **options: object) -> nn.Module:
    statistics = lo.nn.collect_statistics(model, data, side=side, include="0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lo.nn.factorize_(copy.deepcopy(model), method="features", statistics=statistics, include="0", **options)


SHAPES = [(20, 33), (33, 20), (24, 24)]


# ---------------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_svd_gives_the_best_matrix_in_balanced_factors(m, n):
    weight, bias = draw(m, n), draw(m, seed=5)
    model = linear(weight, bias)
    old = model[0].bias
    layer = lo.nn.factorize_(model, rank=5, include="0")[0]
    assert isinstance(layer, LowRankLinear)
    assert layer.bias is old
    torch.testing.assert_close(layer.weight, truncated(weight, 5), atol=1e-11, rtol=1e-11)
    tail = torch.linalg.svdvals(weight)[5:].square().sum().sqrt()
    assert (layer.weight - weight).norm().item() == pytest.approx(tail.item(), rel=1e-12)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    torch.testing.assert_close(a @ a.mT, b.mT @ b, atol=1e-12, rtol=1e-12)
    x = draw(3, 4, n, seed=7)
    torch.testing.assert_close(layer(x), x @ truncated(weight, 5).mT + bias, atol=1e-11, rtol=1e-11)


def test_golden_numbers_of_the_best_matrix():
    layer = lo.nn.factorize_(linear(closed_form_weight(6, 8)), rank=2, include="0")[0]
    rows = [
        [-0.166904, 0.242089, -0.207859, 0.02498, 0.216106, -0.340156, 0.234552, 0.035806],
        [0.585597, -0.852319, 0.755233, -0.1625, -0.631572, 1.053343, -0.732169, -0.123476],
        [0.141516, -0.229859, 0.39389, -0.649219, 0.879389, -0.887226, 0.562741, -0.01229],
        [-0.585296, 0.876298, -0.970917, 0.785906, -0.423677, 0.114323, -0.024305, 0.105473],
        [-0.371628, 0.562305, -0.66876, 0.649879, -0.524287, 0.355017, -0.198398, 0.062628],
        [0.389993, -0.601238, 0.800426, -0.966555, 1.031662, -0.905234, 0.553283, -0.057536],
    ]
    torch.testing.assert_close(layer.weight, torch.tensor(rows, dtype=F64), atol=2e-6, rtol=0)
    assert (layer.weight - closed_form_weight(6, 8)).norm().item() == pytest.approx(2.223199, abs=2e-6)


def test_golden_numbers_of_the_best_outputs():
    weight, x = closed_form_weight(6, 8), closed_form_inputs()
    model = linear(weight, 0.01 * torch.arange(6, dtype=F64))
    for rank, ours, plain in ((2, 3.0226, 3.1799), (3, 0.3251, 0.4509)):
        found = by_features(model, [x], rank=rank)
        assert (model(x) - found(x)).square().sum(1).mean().item() == pytest.approx(ours, abs=5e-5)
        assert mean_square(weight - truncated(weight, rank), x) == pytest.approx(plain, abs=5e-5)


def test_golden_numbers_of_factors_for_features():
    """The matrix and the new bias at rank 2, by numpy from the covariance of the outputs."""
    model = linear(closed_form_weight(6, 8), 0.01 * torch.arange(6, dtype=F64))
    layer = by_features(model, [closed_form_inputs()], rank=2)[0]
    rows = [
        [-0.154951, 0.213037, -0.179664, 0.03619, 0.144781, -0.238224, 0.16842, 0.016622],
        [0.637523, -0.875499, 0.734821, -0.138765, -0.611202, 0.996565, -0.703634, -0.067892],
        [0.132927, -0.244533, 0.423005, -0.653087, 0.8287, -0.804129, 0.512094, -0.04474],
        [-0.625916, 0.919229, -0.981147, 0.737058, -0.32032, -0.004333, 0.056648, 0.096096],
        [-0.346592, 0.534924, -0.656089, 0.669078, -0.57711, 0.420659, -0.244063, 0.065998],
        [0.343053, -0.563864, 0.799123, -1.008651, 1.101874, -0.977978, 0.607208, -0.082299],
    ]
    torch.testing.assert_close(layer.weight, torch.tensor(rows, dtype=F64), atol=2e-6, rtol=0)
    bias = [0.255215, -0.023866, -0.090912, -0.075647, -0.017643, 0.020193]
    torch.testing.assert_close(layer.bias.detach(), torch.tensor(bias, dtype=F64), atol=2e-6, rtol=0)


def test_golden_numbers_of_an_embedding():
    """A table 10×6 of which row r comes r + 1 times, at rank 2, by numpy: two rows, the bias, and the mean error."""
    table, ids = closed_form_weight(10, 6), torch.arange(10).repeat_interleave(torch.arange(1, 11))
    model = nn.Sequential(OrderedDict(embed=nn.Embedding.from_pretrained(table.clone(), freeze=False)))
    statistics = lo.nn.collect_statistics(model, [ids], include="embed")
    lo.nn.factorize_(model, ranks={"embed": 2}, method="features", statistics=statistics)
    rows = [
        [-0.122374, 0.448101, -0.425152, 0.304641, -0.228882, 0.078318],
        [0.196433, -0.706591, 1.012261, -0.139352, -0.968136, 0.813702],
    ]
    torch.testing.assert_close(model[0].weight[:2], torch.tensor(rows, dtype=F64), atol=2e-6, rtol=0)
    mean = [-0.042954, 0.142589, 0.057976, -0.097826, -0.069898, 0.069831]
    torch.testing.assert_close(model[0].bias.detach(), torch.tensor(mean, dtype=F64), atol=2e-6, rtol=0)
    error = (table[ids] - model(ids)).square().sum(1).mean().item()
    assert error == pytest.approx(1.083645, abs=2e-6)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_features_give_the_best_affine_map_of_a_rank(m, n, side):
    weight, bias, x = draw(m, n), draw(m, seed=5), correlated(300, n)
    model = linear(weight, bias)
    found = by_features(model, [x[:100], x[100:130], x[130:]], side, rank=6)
    slope, offset = best_affine_of_rank(x, x @ weight.mT + bias, 6)
    fresh = draw(10, n, seed=9)
    torch.testing.assert_close(found(fresh), fresh @ slope.mT + offset, atol=1e-8, rtol=1e-8)
    b = found[0].lora_B.detach()
    torch.testing.assert_close(b.mT @ b, torch.eye(6, dtype=F64), atol=1e-12, rtol=0)
    tail = torch.linalg.eigvalsh(torch.cov((x @ weight.mT).mT, correction=0))[:-6].sum().item()
    error = (model(x) - found(x)).square().sum(1).mean().item()
    assert error == pytest.approx(tail, rel=1e-10)


def test_features_are_never_worse_than_svd_on_their_data():
    weight, x = draw(20, 33), correlated(300, 33)
    model = linear(weight, draw(20, seed=5))
    for rank in range(1, 13):
        ours, plain = by_features(model, [x], rank=rank), lo.nn.factorize_(copy.deepcopy(model), rank=rank, include="0")
        errors = [(model(x) - other(x)).square().sum().item() for other in (ours, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-12), rank


def test_the_bias_moves_the_new_bias_only():
    weight, x = draw(20, 33), correlated(300, 33)
    shifted = [by_features(linear(weight, bias), [x], rank=4)[0] for bias in (None, torch.full((20,), 7.0, dtype=F64))]
    torch.testing.assert_close(shifted[0].weight, shifted[1].weight, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(shifted[1].bias - shifted[0].bias, torch.full((20,), 7.0, dtype=F64), atol=1e-9, rtol=0)


def test_all_directions_reproduce_the_matrix():
    weight, moment = draw(20, 33), torch.cov(correlated(300, 33).mT)
    for matrix, h in ((weight, moment), (weight.mT, moment[:20, :20])):
        _, axes = output_axes(matrix, h)
        left, right = project_outputs(matrix, axes)
        torch.testing.assert_close(left @ right, matrix, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_takes_the_smallest_rank_that_keeps_it(share):
    weight, x = draw(20, 33) * torch.logspace(0, -2, 33, dtype=F64), correlated(300, 33)
    model = linear(weight)
    for values, found in (
        (torch.linalg.svdvals(weight).square(), lo.nn.factorize_(copy.deepcopy(model), energy=share, include="0")),
        (torch.linalg.eigvalsh(torch.cov((x @ weight.mT).mT)).flip(0), by_features(model, [x], energy=share)),
    ):
        rank = found[0].rank
        assert values[:rank].sum() >= share * values.sum() > values[: rank - 1].sum()


def test_an_embedding_by_svd_and_by_features():
    table, ids = draw(40, 16) + 3, torch.randint(0, 30, (9, 50), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(OrderedDict(embed=nn.Embedding.from_pretrained(table, freeze=False)))
    statistics = lo.nn.collect_statistics(model, [ids[:4], ids[4:]], include="embed")
    counts = torch.bincount(ids.flatten(), minlength=40)
    assert torch.equal(statistics["embed"].counts, counts)
    plain = lo.nn.factorize_(copy.deepcopy(model), rank=5, include="embed")
    torch.testing.assert_close(plain[0].weight, truncated(table, 5), atol=1e-10, rtol=1e-10)
    assert plain[0].bias is None
    ours = lo.nn.factorize_(copy.deepcopy(model), ranks={"embed": 5}, method="features", statistics=statistics)
    assert isinstance(ours[0], LowRankEmbedding)
    # The projection of centred rows on leading axes, every token once for each time that it comes.
    rows = table[ids.flatten()]
    right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:5]
    expected = rows.mean(0) + (table - rows.mean(0)) @ right.mT @ right
    torch.testing.assert_close(ours[0].weight, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours(ids), expected[ids], atol=1e-10, rtol=1e-10)
    errors = [(model(ids) - other(ids)).square().sum() for other in (ours, plain)]
    assert errors[0] < errors[1]
    back = lo.nn.merge_(ours)
    assert type(back[0]) is nn.Embedding
    torch.testing.assert_close(back(ids), expected[ids], atol=1e-10, rtol=1e-10)


def test_an_embedding_keeps_its_options():
    model = nn.Sequential(nn.Embedding(40, 16, padding_idx=3, scale_grad_by_freq=True))
    layer = lo.nn.factorize_(model, ranks={"0": 5})[0]
    layer(torch.tensor([3, 4, 4])).sum().backward()
    assert torch.count_nonzero(layer.table.grad[3]) == 0
    expected = layer.lora_B.detach().sum(0)
    torch.testing.assert_close(layer.table.grad[4], expected)  # twice, divided by its frequency
    back = lo.nn.merge_(model)[0]
    assert (back.padding_idx, back.scale_grad_by_freq, back.sparse) == (3, True, False)


def test_a_low_rank_layer_computes_as_a_dense_one():
    layer = LowRankLinear(33, 20, rank=6, dtype=F64)
    x = draw(2, 5, 33).requires_grad_()
    cotangent = draw(2, 5, 20, seed=1)
    y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B, layer.bias], cotangent)
    dense, flat = (layer.lora_B @ layer.lora_A).detach(), cotangent.reshape(-1, 20)
    g = flat.mT @ x.detach().reshape(-1, 33)
    expected = [cotangent @ dense, layer.lora_B.mT @ g, g @ layer.lora_A.mT, flat.sum(0)]
    torch.testing.assert_close(y, x @ dense.mT + layer.bias)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert layer(x[:0]).shape == (0, 5, 20)
    low = LowRankLinear(33, 20, rank=6, dtype=torch.bfloat16)
    assert low(x.float()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LowRankLinear(33, 20, rank=6)(x.float()).dtype == torch.bfloat16
    big = LowRankLinear(400, 300, rank=50)
    assert big.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_statistics_are_mean_and_covariance_of_all_rows(dtype):
    x = correlated(200, 12).to(dtype)
    model = nn.Sequential(nn.Linear(12, 30, dtype=dtype), nn.ReLU(), nn.Linear(30, 7, dtype=dtype))
    batches = [x[:50].view(5, 10, 12), x[50:51], x[51:]]
    found = lo.nn.collect_statistics(model, batches, include=["0", "2"])
    assert {name: (s.side, s.count) for name, s in found.items()} == {"0": ("input", 200), "2": ("output", 200)}
    for name, rows in (("0", x), ("2", model(x).detach())):
        rows = rows.double()
        torch.testing.assert_close(found[name].mean, rows.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[name].covariance, torch.cov(rows.mT, correction=0), atol=1e-5, rtol=1e-6)
        moment = rows.mT @ rows / 200
        torch.testing.assert_close(found[name].second_moment, moment, atol=1e-5, rtol=1e-6)
    other = lo.nn.collect_statistics(model, [x[torch.randperm(200)]], include=["0", "2"])
    torch.testing.assert_close(
        other["0"].covariance, found["0"].covariance, atol=1e-12 if dtype == F64 else 1e-5, rtol=0
    )


def test_a_large_mean_cancels_nothing():
    x = (correlated(4000, 6) * 1e-3 + 100).float()
    found = lo.nn.collect_statistics(linear(draw(8, 6).float()), x.split(500), include="0")["0"]
    exact = torch.cov(x.double().mT, correction=0)
    assert (found.covariance - exact).norm() < 1e-6 * exact.norm()


class Attention(nn.Module):
    """Two layers with the same input, one with it in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, dtype=F64) for _ in range(3))

    def forward(self, x: Tensor, skip: bool = False, attention_mask: Tensor | None = None) -> Tensor:
        return self.q(x) + self.k(x) + (0 if skip else self.v(x))


def test_layers_with_the_same_input_share_their_statistics():
    model, x = Attention(), draw(6, 10, 8)
    found = lo.nn.collect_statistics(model, x.split(2))
    assert found["q"].covariance is found["k"].covariance is found["v"].covariance
    partly = lo.nn.collect_statistics(model, [(x[:2],), (x[2:4], True), (x[4:],)])
    assert partly["q"].covariance is partly["k"].covariance
    expected = torch.cat([x[:2], x[4:]]).view(-1, 8)
    assert (partly["q"].count, partly["v"].count) == (60, 40)
    torch.testing.assert_close(partly["v"].covariance, torch.cov(expected.mT, correction=0))
    torch.testing.assert_close(partly["q"].covariance, torch.cov(x.view(-1, 8).mT, correction=0))


def test_masked_positions_do_not_count_and_rows_can_be_limited():
    model, x, mask = Attention(), draw(6, 10, 8), torch.ones(6, 10, dtype=torch.int64)
    mask[:, 7:] = 0
    found = lo.nn.collect_statistics(model, [{"x": x, "attention_mask": mask}])["q"]
    assert found.count == 42
    torch.testing.assert_close(found.mean, x[:, :7].reshape(-1, 8).mean(0))
    few = lo.nn.collect_statistics(model, x.split(1), rows=25)["q"]
    assert few.count == 25
    torch.testing.assert_close(few.mean, x.view(-1, 8)[:25].mean(0))


def test_collecting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    model[2].eval()
    x = draw(50, 8).float()
    found = lo.nn.collect_statistics(model, [x], include=["0", "2"], side="input")
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert not any(module._forward_hooks for module in model)
    torch.testing.assert_close(found["2"].mean, model[0](x).mean(0).double(), atol=1e-6, rtol=1e-6)  # without dropout

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no")

    broken = nn.Sequential(nn.Linear(8, 8), Failing())
    with pytest.raises(KeyError):
        lo.nn.collect_statistics(broken, [x])
    assert not broken[0]._forward_hooks
    assert broken.training


# ---------------------------------------------------------------------------------------------------------------- pairs


def compensated(weight: Tensor, poor: Tensor, x: Tensor, rank: int) -> nn.Module:
    reference = linear(weight)
    statistics = lo.nn.collect_statistics(reference, [x], side="input", include="0")
    return lo.nn.compensate_(linear(poor), reference, rank=rank, statistics=statistics)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_pair_is_what_the_paper_has_where_its_inverse_exists(m, n):
    weight, x = draw(m, n), correlated(300, n)
    poor = (weight * 2).round() / 2
    layer = compensated(weight, poor, x, 5)[0]
    assert isinstance(layer, CompensatedLinear)
    expected = eora_pair(weight - poor, x, 5)
    pair = (layer.lora_B @ layer.lora_A).detach()
    torch.testing.assert_close(pair, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(layer(x), x @ (poor + expected).mT, atol=1e-7, rtol=1e-7)
    b, lost = layer.lora_B.detach(), weight - poor
    torch.testing.assert_close(b.mT @ b, torch.eye(5, dtype=F64), atol=1e-12, rtol=0)
    moment = x.mT @ x / len(x)
    tail = torch.linalg.eigvalsh(lost @ moment @ lost.mT)[:-5].sum().item()
    assert mean_square(lost - pair, x) == pytest.approx(tail, rel=1e-9)
    assert tail <= mean_square(lost - truncated(lost, 5), x)


def test_golden_numbers_of_a_pair():
    weight, x = closed_form_weight(6, 8), closed_form_inputs()
    poor = (2 * weight).round() / 2
    pair = compensated(weight, poor, x, 2)[0].weight - poor
    assert mean_square(weight - poor - pair, x) == pytest.approx(0.06559, abs=5e-6)
    assert mean_square(weight - poor - truncated(weight - poor, 2), x) == pytest.approx(0.08738, abs=5e-6)
    rows = [
        [-0.005795, -0.013463, -0.174291, -0.020919, -0.164723, 0.178017, -0.142337, 0.123331],
        [-0.059729, 0.045477, -0.226409, -0.061047, -0.137927, 0.008708, -0.035285, -0.068527],
        [0.084691, -0.088844, 0.113418, 0.066119, -0.010701, 0.229129, -0.1393, 0.27432],
        [0.074793, -0.071953, 0.155619, 0.063851, 0.045648, 0.137846, -0.072445, 0.194937],
        [-0.067159, 0.069641, -0.096848, -0.053112, 0.001621, -0.173659, 0.104162, -0.211636],
        [-0.027027, 0.016819, -0.134482, -0.030777, -0.094237, 0.041198, -0.045179, -0.003675],
    ]
    torch.testing.assert_close(pair, torch.tensor(rows, dtype=F64), atol=2e-6, rtol=0)


def test_golden_numbers_of_a_pair_of_five_rows():
    """Where E[x xᵀ] has no inverse: entries stay small, and rows that were not there lose nothing."""
    weight, x = closed_form_weight(6, 8), closed_form_inputs()
    poor = (2 * weight).round() / 2
    pair = compensated(weight, poor, x[:5], 2)[0].weight - poor
    assert pair.abs().max().item() == pytest.approx(0.232425, abs=2e-6)
    for rows, before, after in ((x[:5], None, 0.031228), (x[5:], 0.839704, 0.651622)):
        assert mean_square(weight - poor - pair, rows) == pytest.approx(after, abs=2e-6)
        assert before is None or mean_square(weight - poor, rows) == pytest.approx(before, abs=2e-6)


def test_a_pair_of_few_rows_makes_no_input_worse():
    weight, few, fresh = closed_form_weight(20, 33), correlated(5, 33), correlated(200, 33, seed=7)
    poor = (weight * 2).round() / 2
    for rank in (2, 8):
        pair = compensated(weight, poor, few, rank)[0]
        lost = (x @ (weight - pair.weight).mT for x in (few, fresh))
        before = (x @ (weight - poor).mT for x in (few, fresh))
        for after, ahead in zip(lost, before, strict=True):
            assert (after.norm(dim=1) <= ahead.norm(dim=1) * (1 + 1e-10)).all()
    assert mean_square(weight - pair.weight, few) < 1e-20  # five rows span five directions


def test_nothing_lost_gives_a_zero_pair():
    weight = draw(20, 33)
    layer = compensated(weight, weight, correlated(100, 33), 4)[0]
    assert torch.count_nonzero(layer.lora_A) == 0
    assert torch.equal(layer.weight, weight)


def test_a_pair_for_nothing_is_features_without_centring():
    weight, x = draw(20, 33), correlated(300, 33)
    x = torch.cat([x, -x])  # mean 0
    pair, features = compensated(weight, torch.zeros_like(weight), x, 5)[0], by_features(linear(weight), [x], rank=5)[0]
    torch.testing.assert_close(pair.weight, features.weight, atol=1e-9, rtol=1e-9)


def test_eight_bit_weights_stay_as_they_are_beside_a_pair():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16()
    x = correlated(400, 48).bfloat16()
    statistics = lo.nn.collect_statistics(reference, [x], side="input", include=["0", "2"])
    coded = lo.nn.quantize_weights_(copy.deepcopy(reference), include=["0", "2"])
    codes = coded[0].weight.codes.clone()
    calls: list[int] = []
    handle = coded[0].register_forward_hook(lambda *_: calls.append(1))
    before = coded(x)
    model = lo.nn.compensate_(coded, reference, rank=8, statistics=statistics, freeze_rest=True)
    assert isinstance(model[0].base.weight, lo.nn.QuantizedWeight)
    assert torch.equal(model[0].base.weight.codes, codes)
    calls.clear()
    after, exact = model(x), reference(x)
    assert calls == [1]
    handle.remove()
    assert (model(x).float() - exact.float()).norm() < (before.float() - exact.float()).norm()
    assert calls == [1]
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    state = model.state_dict()
    assert state["0.base.weight"].dtype == torch.int8
    assert "0.base.weight_scale" in state
    again = lo.nn.quantize_weights_(copy.deepcopy(reference), include=["0", "2"])
    lo.nn.compensate_(again, reference, rank=8, statistics=statistics).load_state_dict(state)
    assert torch.equal(again(x), after)
    merged = lo.nn.merge_(model)
    assert type(merged[0]) is nn.Linear
    assert merged[0].weight.dtype == torch.bfloat16
    assert merged.state_dict().keys() == reference.state_dict().keys()
    assert (merged(x).float() - after.float()).norm() < 0.01 * after.float().norm()


def test_a_pair_beside_two_factors():
    reference, x = linear(draw(40, 33), draw(40, seed=3)), correlated(300, 33)
    statistics = lo.nn.collect_statistics(reference, [x], side="input", include="0")
    model = lo.nn.factorize_(copy.deepcopy(reference), rank=6, include="0")
    lo.nn.compensate_(model, reference.state_dict(), rank=4, statistics=statistics)
    expected = truncated(reference[0].weight.detach(), 6)
    expected = expected + eora_pair(reference[0].weight.detach() - expected, x, 4)
    torch.testing.assert_close(model[0].weight, expected, atol=1e-8, rtol=1e-8)
    y = model(x)
    assert isinstance(lo.nn.merge_(model)[0], nn.Linear)
    torch.testing.assert_close(model(x), y, atol=1e-9, rtol=1e-9)
    assert model[0].bias is not None


# ---------------------------------------------------------------------------------------------------------------- ranks


def golden_matrices() -> list[Tensor]:
    i, j = torch.arange(6, dtype=F64).unsqueeze(1), torch.arange(8, dtype=F64)
    return [
        closed_form_weight(6, 8),
        0.5 * closed_form_weight(10, 7),
        torch.cos(i) * torch.sin(1 + j) + 0.05 * closed_form_weight(6, 8),
        closed_form_weight(7, 7).mT,
    ]


def golden_spectra() -> list[Tensor]:
    return [normalized(torch.linalg.svdvals(matrix), "minmax") for matrix in golden_matrices()]


def test_golden_singular_values_of_the_four_matrices():
    expected = [
        [3.206127, 2.290701, 2.103774, 0.625025, 0.355074, 0.004169],
        [1.617943, 1.610876, 1.514238, 1.09937, 0.344235, 0.054275, 0.006067],
        [3.674382, 0.151833, 0.111543, 0.030552, 0.022359, 0.000167],
        [3.22635, 3.049835, 2.110554, 0.425244, 0.207588, 0.008254, 0.00065],
    ]
    for matrix, values in zip(golden_matrices(), expected, strict=True):
        found = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(found, torch.tensor(values, dtype=F64), atol=2e-6, rtol=0)
        low, high = values[-1], values[0]
        own = torch.tensor([(v - low) / (high - low) for v in reversed(values)], dtype=F64)
        torch.testing.assert_close(normalized(found, "minmax"), own, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("target", "k", "cut"), [(0.1, 0.005, 5), (0.3, 0.03, 8), (0.5, 0.135, 13), (0.7, 0.715, 19)])
def test_golden_numbers_of_the_threshold(target, k, cut):
    spectra = golden_spectra()
    found, cuts = threshold(spectra, target, 0.005)
    assert (found, sum(cuts), sum(map(len, spectra))) == (pytest.approx(k, abs=1e-9), cut, 26)
    exact, cuts = threshold(spectra, target, None)
    assert found - 0.005 <= exact <= found
    assert sum(cuts) == max(4, math.ceil(26 * target - 1e-9))  # the least of each is 0; all others differ


@pytest.mark.parametrize(
    ("k", "cuts"), [(0.05, [1, 2, 5, 2]), (0.115, [2, 2, 5, 3]), (0.3, [3, 3, 5, 4]), (0.5, [3, 3, 5, 4])]
)
def test_golden_counts_below_a_threshold(k, cuts):
    assert [int((values < k).sum()) for values in golden_spectra()] == cuts


def decaying(seed: int = 0) -> nn.ModuleDict:
    """Matrices whose singular values fall at different speeds."""
    model = nn.ModuleDict()
    for index, (m, n, speed) in enumerate([(24, 24, 0.05), (40, 24, 0.3), (24, 40, 0.6)]):
        left, right = (
            torch.linalg.qr(draw(m, 24, seed=seed + index))[0],
            torch.linalg.qr(draw(n, 24, seed=9 + index))[0],
        )
        weight = (left * torch.exp(-speed * torch.arange(24, dtype=F64))) @ right.mT
        model[f"layer{index}"] = linear(weight)[0]
    return model


@pytest.mark.parametrize("normalize", ["minmax", "max"])
@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_ranks_fall_with_the_reduction_and_do_not_depend_on_the_scale(normalize, budget):
    model = decaying()
    options = {"normalize": normalize, "budget": budget}
    before: dict[str, int] = {}
    for reduction in (0.2, 0.4, 0.6, 0.8):
        ranks = lo.nn.select_ranks(model, reduction=reduction, **options)
        assert all(ranks[name] <= rank for name, rank in before.items())
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled["layer1"].weight *= 1024.0
        assert lo.nn.select_ranks(scaled, reduction=reduction, **options) == ranks
        if budget == "parameters":
            whole = sum(param.numel() for param in model.parameters())
            left = lo.nn.factorize_(copy.deepcopy(model), ranks=ranks)
            assert sum(param.numel() for param in left.parameters()) <= (1 - reduction) * whole
        before = ranks
    assert before["layer2"] < before["layer1"] < 24


@pytest.mark.parametrize("min_ratio", [0.0, 0.7, 0.85])
def test_low_rank_components_are_those_of_which_enough_is_cut(min_ratio):
    model = decaying()
    spectra = {name: torch.linalg.svdvals(layer.weight.detach()) for name, layer in model.items()}
    relative = {name: (s - s[-1]) / (s[0] - s[-1]) for name, s in spectra.items()}
    level = torch.cat(list(relative.values())).sort().values[36 - 1]  # the 36th of 72
    kept = {name: int((values > level).sum()) for name, values in relative.items()}
    expected = {}
    for name, rank in kept.items():
        m, n = model[name].weight.shape
        if rank * (m + n) < m * n and (24 - rank) / 24 >= min_ratio:
            expected[name] = rank
    assert lo.nn.select_ranks(model, reduction=0.5, min_ratio=min_ratio) == expected
    assert len(expected) == {0.0: 2, 0.7: 1, 0.85: 0}[min_ratio]


def test_a_flat_spectrum_has_nothing_to_cut():
    model = decaying()
    with torch.no_grad():
        model["layer0"].weight.copy_(torch.eye(24, dtype=F64))
    ranks = lo.nn.select_ranks(model, reduction=0.6, min_ratio=0.0)
    assert "layer0" not in ranks
    assert all(rank >= 1 for rank in ranks.values())
    with pytest.raises(ValueError, match=r"at most 0\.6389"):  # 46 of 72: one direction stays everywhere
        lo.nn.select_ranks(model, reduction=0.95)


def test_low_rank_components_are_factorised_and_trained_alone():
    model = decaying()
    model["norm"] = nn.LayerNorm(24)
    ranks = lo.nn.select_ranks(model, reduction=0.5)
    assert 0 < len(ranks) < 3
    for param in model.parameters():
        param.requires_grad_(False)
    lo.nn.factorize_(model, ranks=ranks, freeze_rest=True)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {f"{name}.{factor}" for name in ranks for factor in ("lora_A", "lora_B")}
    assert {name: module.rank for name, module in model.items() if isinstance(module, LowRankLinear)} == ranks
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    assert {name for group in groups for name in group["param_names"]} == trained
    assert all(group["weight_decay"] * group.get("decay_factor", 1) == 0.05 for group in groups)


# ---------------------------------------------------------------------------------------------------------------- models


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False), nn.Linear(32, 4)).to(dtype)


def test_tied_layers_share_their_factors():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    model["b"].weight = model["a"].weight
    lo.nn.factorize_(model, ranks={"a": 5, "c": 3})
    assert model["a"].lora_A is model["b"].lora_A
    assert model["a"].bias is not model["b"].bias
    assert (model["a"].rank, model["c"].rank) == (5, 3)
    lo.nn.merge_(model)
    assert model["a"].weight is model["b"].weight


def test_copies_and_pickles_of_the_layers():
    model = network().double()
    lo.nn.factorize_(model, ranks={"0": 4})
    model = lo.nn.compensate_(model, network().double(), rank=3, statistics={"0": moments(32), "2": moments(48)})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = draw(5, 32)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert other[0].lora_A is not model[0].lora_A
        assert [type(layer) for layer in lo.nn.merge_(other)] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
        torch.testing.assert_close(other(x), model(x))


def test_a_checkpoint_goes_into_a_model_without_numbers():
    model = network()
    x = draw(200, 32).float()
    statistics = lo.nn.collect_statistics(model, [x], include=["0", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lo.nn.factorize_(model, rank=4, method="features", statistics=statistics, include=["0", "2"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state)[:3] == ["0.lora_A", "0.lora_B", "0.bias"]
    with torch.device("meta"):
        other = network()
    ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    lo.nn.factorize_(other, ranks=ranks, method="features")
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"dense weight.*factorize_"):
        other.load_state_dict(network().state_dict())


def test_a_factorised_model_trains_with_projected_gradients_and_resumes():
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = lo.nn.factorize_(network(), rank=0.25, include=["0", "2"])
        groups = lo.param_groups(model, rank=2, include="lora_B")
        return model, lo.GaLoreAdamW(groups, lr=1e-2, update_proj_gap=2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
        for _ in range(steps):
            loss = (model(draw(20, 32).float()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    whole, optimizer = build()
    first = train(whole, optimizer, 1)
    assert train(whole, optimizer, 9) < 0.8 * first
    half, optimizer = build()
    train(half, optimizer, 5)
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, optimizer = build()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, 5)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_planner_and_describe_know_the_layers():
    model = lo.nn.factorize_(network(), rank=4, include=["0", "2"])
    numbers = (4 * 32, 48 * 4, 48, 4 * 48, 32 * 4, 4 * 32, 4)
    made = lo.plan(
        model,
        lambda model: lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-3),
        example_batch=torch.zeros(4, 32),
        loss=lambda output: output.sum(),
    )
    assert made.weights_bytes == sum(512 * math.ceil(4 * count / 512) for count in numbers)
    assert "0.lora_A" in str(lo.describe(lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-3)))


def test_layers_that_would_not_get_smaller_are_left_alone_and_listed():
    model = network()
    with pytest.warns(UserWarning, match=r"left alone.*: 2$"):
        lo.nn.factorize_(model, ranks={"0": 4, "2": 20})
    assert isinstance(model[0], LowRankLinear)
    assert type(model[2]) is nn.Linear
    with pytest.raises(ValueError, match="no layer gets smaller"):
        lo.nn.factorize_(network(), rank=30, include=["0", "2"])
    with pytest.raises(ValueError, match="no layer gets smaller"):
        lo.nn.factorize_(network(), energy=1.0, include=["0", "2"])


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, ranks and energy"),
        ({"rank": 3, "energy": 0.9}, "give one of"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": True}, "rank is True"),
        ({"rank": 40}, r"0: rank is 40; .* min\(48, 32\) = 32"),
        ({"ranks": {"0": 33}}, "0: rank is 33"),
        ({"ranks": {"zero": 3}}, "'zero' is no plain linear layer"),
        ({"ranks": {}}, "ranks is empty"),
        ({"ranks": {"0": 3}, "include": "0"}, "leave include and exclude out"),
        ({"energy": 0.0}, r"energy is 0.0; .* \(0, 1\]"),
        ({"energy": 2}, "energy is 2"),
        ({"rank": 3, "method": "qr"}, "method is 'qr'; valid"),
        ({"rank": 3, "method": "features"}, "no statistics of 0: it did not run"),
        ({"rank": 3, "statistics": {}}, "looks at the weights alone"),
        ({"rank": 3, "include": "attn"}, "matches no parameter"),
    ],
    ids=str,
)
def test_bad_input_of_factorize_changes_nothing(options, message):
    model = network()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lo.nn.factorize_(model, **options)
    assert [id(module) for module in model.modules()] == before


def moments(width: int, count: int = 100, value: float = 1.0) -> Moments:
    return Moments("input", count, torch.zeros(width, dtype=F64), value * torch.eye(width, dtype=F64))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (moments(31), "0 are of another layer: its input has 32 numbers"),
        (moments(32, value=math.nan), "0 are not finite"),
        (moments(32, count=0), "fewer than the rank|no rows"),
        (moments(32, count=2), "have 2 rows, fewer than the rank 3"),
        (TokenCounts(torch.ones(32)), "0 are TokenCounts; needed are Moments"),
    ],
    ids=["width", "nan", "empty", "few", "counts"],
)
def test_statistics_that_do_not_fit(found, message):
    with pytest.raises(ValueError, match=message):
        lo.nn.factorize_(network(), rank=3, method="features", statistics={"0": found}, include="0")
    if "rank 3" not in message:
        with pytest.raises(ValueError, match=message.split("|")[-1]):
            lo.nn.compensate_(network(), network(), rank=3, statistics={"0": found})


def test_few_rows_are_warned_of():
    with pytest.warns(UserWarning, match="few rows for 0"):
        lo.nn.factorize_(network(), rank=3, method="features", statistics={"0": moments(32)}, include="0")


def test_models_that_cannot_be_factorised():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        lo.nn.factorize_([nn.Linear(4, 4)], ranks={"0": 2})
    with pytest.raises(ValueError, match="stored in 8 bits"):
        lo.nn.factorize_(lo.nn.quantize_weights_(network()), rank=3)
    model = network()
    nn.init.constant_(model[2].weight, math.nan)
    for call in (
        lambda: lo.nn.factorize_(model, rank=3, include=["0", "2"]),
        lambda: lo.nn.select_ranks(model, reduction=0.5, include=["0", "2"]),
    ):
        with pytest.raises(ValueError, match=r"2\.weight is not finite"):
            call()
    assert type(model[0]) is nn.Linear
    tied = nn.ModuleDict({"embed": nn.Embedding(30, 16), "lm_head": nn.Linear(16, 30)})
    tied["lm_head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match=r"is tied to the weight of .* leave it out"):
        lo.nn.factorize_(tied, rank=3, include="embed")
    pair = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    pair["b"].weight = pair["a"].weight
    with pytest.raises(ValueError, match="b and a share one weight"):
        lo.nn.factorize_(pair, rank=3, method="features", statistics={"a": moments(16), "b": moments(16)})
    with pytest.raises(ValueError, match="max_norm"):
        lo.nn.factorize_(nn.ModuleDict({"embed": nn.Embedding(30, 16, max_norm=1.0)}), rank=3, include="embed")
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match=r"meta device.*give a rank"):
        lo.nn.factorize_(model, energy=0.9)


EMPTY = {
    "factorize_": {"rank": 1},
    "sltrain_": {"rank": 1, "density": 0.1, "init": "fresh"},
    "weight_normalized_": {"rank": 1},
    "ordered_": {},
    "spectral_": {"rank": 1},
    "select_ranks": {"reduction": 0.5},
}


@pytest.mark.parametrize("name", EMPTY)
def test_weights_without_elements_and_complex_ones_are_named(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = nn.Sequential(nn.Linear(0, 8))
    with pytest.raises(ValueError, match=r"0\.weight is \(8, 0\), without elements; exclude it"):
        getattr(lo.nn, name)(empty, include="0", **EMPTY[name])
    complex_one = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"0\.weight is torch\.complex64; floating-point weights are needed"):
        getattr(lo.nn, name)(complex_one, include="0", **EMPTY[name])


@pytest.mark.parametrize("kind", ["complex", "empty"])
def test_a_late_layer_that_cannot_be_coded_leaves_the_first_one_alone(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = nn.Linear(8, 0) if kind == "empty" else nn.Linear(8, 8, dtype=torch.complex64)
    model = nn.Sequential(nn.Linear(8, 8), last)
    before = model[0].weight
    with pytest.raises(ValueError, match=r"^1\.weight is (torch\.complex64; floating|\(0, 8\), without elements)"):
        lo.nn.quantize_weights_(model, include=["0", "1"])
    assert model[0].weight is before


@pytest.mark.parametrize("kind", ["complex", "empty"])
def test_compensation_names_complex_weights_and_those_without_elements(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(8, 0) if kind == "empty" else nn.Linear(8, 8, dtype=torch.complex64))
    moments = {"0": lo.nn.Moments("input", 100, torch.zeros(8), torch.eye(8))}
    with pytest.raises(ValueError, match=r"^0\.weight is (torch\.complex64; floating|\(0, 8\), without elements)"):
        lo.nn.compensate_(model, {"0": torch.ones_like(model[0].weight)}, rank=1, statistics=moments)
    assert type(model[0]) is nn.Linear


def test_tied_layers_count_once_among_singular_values():
    model, single = decaying(), decaying()
    model["twin"] = nn.Linear(40, 24, dtype=F64)
    model["twin"].weight = model["layer2"].weight
    ranks = lo.nn.select_ranks(model, reduction=0.5, min_ratio=0.0)
    expected = lo.nn.select_ranks(single, reduction=0.5, min_ratio=0.0)
    assert ranks == expected | {"twin": expected["layer2"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction is 0"),
        ({"reduction": 1.0}, "reduction is 1.0"),
        ({"reduction": 0.5, "step": 0.0}, "step is 0.0"),
        ({"reduction": 0.5, "min_ratio": 1.0}, "min_ratio is 1.0"),
        ({"reduction": 0.5, "normalize": "sum"}, "normalize is 'sum'; valid"),
        ({"reduction": 0.5, "budget": "bytes"}, "budget is 'bytes'; valid"),
        ({"reduction": 0.5, "include": "attn"}, "matches no parameter"),
    ],
    ids=str,
)
def test_bad_input_of_select_ranks(options, message):
    with pytest.raises(ValueError, match=message):
        lo.nn.select_ranks(network(), **options)


def test_bad_input_of_collect_statistics():
    model, x = network(), torch.zeros(4, 32)
    for options, message in (
        ({"side": "left"}, "side is 'left'; valid"),
        ({"rows": 0}, "rows is 0"),
        ({"include": "attn"}, "matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            lo.nn.collect_statistics(model, [x], **options)
    for batches in (x, {"x": x}, 3):
        with pytest.raises(TypeError, match="must be an iterable of batches"):
            lo.nn.collect_statistics(model, batches)
    complex_one = nn.Sequential(nn.Linear(32, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"0\.weight is torch\.complex64; floating-point weights are needed"):
        lo.nn.collect_statistics(complex_one, [x], include="0")
    with pytest.raises(ValueError, match="no batches"):
        lo.nn.collect_statistics(model, iter([]))
    with pytest.raises(ValueError, match="the input of 0 is not finite"):
        lo.nn.collect_statistics(model, [x / 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": None}, "rank is None"),
        ({"rank": 33}, "0: rank is 33"),
        ({"statistics": {}}, "no statistics of any layer"),
        ({"statistics": {"zero": moments(32)}}, "statistics of 'zero', which the model does not have"),
        ({"statistics": {"1": moments(32)}}, "1 is a GELU"),
        ({"statistics": {"0": Moments("output", 9, torch.zeros(48), torch.eye(48))}}, "needed is side='input'"),
        ({"include": "attn"}, "include pattern 'attn' matches no layer"),
        ({"exclude": "0"}, "no statistics of any layer"),
        ({"reference": {"2.weight": torch.zeros(32, 48)}}, "the reference has no '0'"),
        ({"reference": {"0": torch.zeros(32, 48)}}, r"0 is \(48, 32\), in the reference \(32, 48\)"),
        ({"reference": {"0": torch.full((48, 32), math.inf)}}, "not finite"),
        ({"reference": nn.ModuleList([nn.GELU()])}, "has no layer '0' with a weight"),
    ],
    ids=str,
)
def test_bad_input_of_compensate_changes_nothing(options, message):
    model, options = network(), {"rank": 3, "statistics": {"0": moments(32)}, "reference": network()} | options
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lo.nn.compensate_(model, options.pop("reference"), **options)
    assert [id(module) for module in model.modules()] == before


def test_pairs_beside_8_bits_train_resume_and_are_planned():
    def make() -> nn.Module:
        torch.manual_seed(0)
        reference = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96))
        coded = lo.nn.quantize_weights_(copy.deepcopy(reference), include=["0", "2"])
        statistics = {"0": moments(96), "2": moments(64)}
        return lo.nn.compensate_(coded, reference, rank=6, statistics=statistics, freeze_rest=True)

    def adam(model: nn.Module) -> lo.LowRankOptimizer:
        return lo.LowRankOptimizer(lo.param_groups(model, rank=None, weight_decay=0.1), rule="adam", lr=1e-2)

    model, optimizer = check_resume_and_in_backward(make, adam)
    numbers = 2 * 6 * (96 + 64)
    made = lo.plan(model, adam, example_batch=torch.zeros(16, 96), loss=lambda y: y.sum(), device="cpu")
    assert made.state["moments"] == 8 * numbers
    assert made.weights_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert "0.lora_A" in lo.describe(optimizer)


def test_tied_layers_get_pairs_of_their_own():
    reference = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}).double()
    reference["b"].weight = reference["a"].weight
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model["a"].weight.copy_((2 * model["a"].weight).round() / 2)
    assert model["b"].weight is model["a"].weight
    x = {"a": correlated(200, 16), "b": correlated(200, 16, seed=5)}
    statistics = {
        name: lo.nn.collect_statistics(nn.Sequential(OrderedDict({name: reference[name]})), [rows], side="input")[name]
        for name, rows in x.items()
    }
    lo.nn.compensate_(model, reference, rank=3, statistics=statistics)
    assert model["a"].base.weight is model["b"].base.weight
    lost = (reference["a"].weight - model["a"].base.weight).detach()
    for name, rows in x.items():
        pair = (model[name].lora_B @ model[name].lora_A).detach()
        torch.testing.assert_close(pair, eora_pair(lost, rows, 3), atol=1e-8, rtol=1e-8)


def test_a_layer_gets_one_pair():
    model = lo.nn.compensate_(network(), network(), rank=3, statistics={"0": moments(32)})
    with pytest.raises(ValueError, match="0 has a pair already"):
        lo.nn.compensate_(model, network(), rank=3, statistics={"0": moments(32)})
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        lo.nn.compensate_([], network(), rank=3, statistics={"0": moments(32)})
    with pytest.raises(ValueError, match="base is a GELU"):
        CompensatedLinear(nn.GELU(), rank=3)
