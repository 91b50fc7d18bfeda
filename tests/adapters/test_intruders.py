"""Intruder dimensions: the golden number, a dense definition, and what must not make intruders."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.adapters.intruders import compare
from tests.oracles import pairs as oracle
from tests.oracles.adapted import Adapted, two_layers

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def of_values(m: int, n: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with these singular values, and its vectors."""
    left, right = (torch.linalg.qr(drawn(size, len(values), seed=size))[0] for size in (m, n))
    return (left * values) @ right.mT, left, right


def by_definition(before: Tensor, after: Tensor, top_k: int, width: float = 1e-3) -> list[float]:
    """c_j by complete singular value decompositions and loops."""
    v, sigma, _ = torch.linalg.svd(before, full_matrices=True)
    sigma = torch.cat([sigma, sigma.new_zeros(before.shape[0] - len(sigma))])
    u = torch.linalg.svd(after)[0]
    found = []
    for j in range(top_k):
        shares = (v.mT @ u[:, j]).square()
        clusters = [(sigma <= s) & (sigma >= s - width * sigma[0]) for s in sigma]
        found.append(max(float(shares[each].sum()) for each in clusters) ** 0.5)
    return found


@pytest.mark.parametrize(("m", "n"), [(9, 30), (30, 9), (16, 16)])
def test_similarities_are_those_of_complete_decompositions(m: int, n: int):
    before = drawn(m, n)
    after = before + 3.0 * drawn(m, 2, seed=1) @ drawn(2, n, seed=2)
    found = compare(before, after, 6, 0.5)
    expected = by_definition(before, after, 6)
    assert found.similarities == pytest.approx(expected, abs=1e-9)
    assert found.values == pytest.approx(torch.linalg.svdvals(after)[:6].tolist(), rel=1e-9)
    assert found.count == sum(c < 0.5 for c in expected)
    u, v = torch.linalg.svd(after)[0][:, :6], torch.linalg.svd(before, full_matrices=False)[0]
    assert found.outside == pytest.approx((1.0 - (v.mT @ u).square().sum(0)).clamp_min(0.0).tolist(), abs=1e-9)
    if m > n:
        nearest = [size for size, where in zip(found.clusters, found.matched, strict=True) if where == 0.0]
        assert set(nearest) <= {m - n}


def test_the_golden_problem_has_one_intruder_below_six_tenths_and_none_below_a_half():
    w = oracle.golden_weight()
    vectors = torch.linalg.svd(w)[0]
    change = 10.0 * (vectors[:, :4].sum(1) / 2.0)[:, None] * torch.ones(1, 8, dtype=F64) / 8**0.5
    found = compare(w, w + change, 10, 0.6)
    assert found.similarities[0] == pytest.approx(0.5283110684, abs=1e-10)
    assert (found.count, compare(w, w + change, 10, 0.5).count) == (1, 0)
    assert len(found.values) == 6  # k above the shorter side


def test_directions_of_equal_singular_values_are_one_cluster():
    """An orthogonal matrix and noise of 1e-5: single vectors have nothing in common, and nothing has changed."""
    before = torch.linalg.qr(drawn(24, 24))[0] + 1e-6 * drawn(24, 24, seed=2)
    after = before + 1e-5 * drawn(24, 24, seed=1)
    assert max(by_definition(before, after, 5, width=1e-9)) < 0.9
    found = compare(before, after, 5, 0.5)
    assert found.similarities == pytest.approx([1.0] * 5, abs=1e-6)
    assert found.clusters == (24,) * 5


def test_many_near_values_are_no_single_cluster():
    """Chains of small gaps would join the bulk of a large matrix, in which every new direction would be at home."""
    before, left, right = of_values(200, 300, torch.linspace(1.0, 0.9, 200, dtype=F64))
    new = left.sum(1) / 200**0.5
    found = compare(before, before + 5.0 * new[:, None] * right[:, 0], 1, 0.5)
    assert found.count == 1
    assert found.clusters[0] <= 3


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30)])
def test_what_must_not_matter_does_not_matter(m: int, n: int):
    before, left, right = of_values(m, n, torch.linspace(3.0, 0.5, 12, dtype=F64))
    change = drawn(m, 2, seed=4) @ drawn(2, n, seed=5)
    plain = compare(before, before + change, 5, 0.5).similarities
    assert min(plain) < 0.95
    turn = torch.linalg.qr(drawn(n, n, seed=6))[0]
    for first, second in ((7.0 * before, 7.0 * change), (before @ turn, change @ turn)):
        assert compare(first, first + second, 5, 0.5).similarities == pytest.approx(plain, abs=1e-8)
    for second in (torch.zeros_like(before), 2.5 * left[:, 3:4] @ right[:, 3:4].mT):
        assert compare(before, before + second, 5, 0.5).similarities == pytest.approx([1.0] * 5, abs=1e-8)


def test_a_model_with_adapters_and_its_merged_copy_have_the_same_intruders():
    model = two_layers()
    base, merged = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for layer, other in zip(model[::2], merged[::2], strict=True):
            a, b = layer.factors
            b.mul_(9.0)
            other.base_layer.weight += layer.scaling["default"] * b @ a
    before = copy.deepcopy(model.state_dict())
    found = lo.diagnostics.intruder_dimensions(model, 4, 0.6)
    assert list(found.layers) == ["0.default", "2.default"]
    whole = lo.diagnostics.intruder_dimensions(merged, 4, 0.6, base=base)
    for name, each in found.layers.items():
        other = whole.layers[name.replace("default", "base_layer.weight")]
        assert each.similarities == pytest.approx(other.similarities, abs=1e-9)
        assert each.clusters == other.clusters
    assert found.total == sum(found.counts.values()) > 0
    assert all(torch.equal(model.state_dict()[name], kept) for name, kept in before.items())
    table = str(found).splitlines()
    assert table[0].split()[:2] == ["layer", "intruders"]
    assert table[1].split()[:4] == ["0.default", str(found.counts["0.default"]), "of", "4"]
    assert table[-1].split()[:4] == ["all", str(found.total), "of", "8"]
    assert str(found).isascii()
    with torch.no_grad():
        for layer in model[::2]:
            layer.factors[1].zero_()
    none = lo.diagnostics.intruder_dimensions(model)
    assert none.total == 0
    assert all(c == pytest.approx(1.0, abs=1e-7) for each in none.layers.values() for c in each.similarities)


def test_quantised_bases_are_seen_through_their_layer():
    model = two_layers(torch.float32)
    expected = lo.diagnostics.intruder_dimensions(model, 4)
    lo.nn.quantize_weights_(model, include="base_layer")
    found = lo.diagnostics.intruder_dimensions(model, 4)
    for name, each in found.layers.items():
        assert each.similarities == pytest.approx(expected.layers[name].similarities, abs=0.05)


def test_stacks_of_models_are_compared_one_by_one_and_the_picture_is_drawn(tmp_path: Path):
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.stack([torch.eye(5), torch.eye(5)]))

    before, after = Stack(), Stack()
    with torch.no_grad():
        after.experts[1] += 4.0 * torch.ones(5, 5)
    found = lo.diagnostics.intruder_dimensions(after, 2, base=before)
    assert list(found.layers) == ["experts[0]", "experts[1]"]
    lo.diagnostics.intruder_dimensions(two_layers(), 40, 0.9).plot(tmp_path / "intruders.svg")
    assert "<svg" in (tmp_path / "intruders.svg").read_text(encoding="utf-8")
    source = Path(lo.adapters.intruders.__file__).read_text(encoding="utf-8")
    assert "\nfrom matplotlib" not in source  # only where it is drawn
    assert "\nimport matplotlib" not in source


def test_what_cannot_be_compared_is_refused_or_left_out_by_name(caplog: pytest.LogCaptureFixture):
    intruders, model = lo.diagnostics.intruder_dimensions, two_layers()
    with pytest.raises(ValueError, match="top_k is 0; it must be a whole number of at least 1"):
        intruders(model, 0)
    with pytest.raises(ValueError, match=r"threshold is 1\.5; it must be in \(0, 1\]"):
        intruders(model, threshold=1.5)
    with pytest.raises(ValueError, match="the model has no adapters"):
        intruders(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="the model has no adapter 'other'"):
        intruders(model, adapter="other")
    with pytest.raises(ValueError, match="the models have no matrix in common"):
        intruders(nn.Linear(3, 3), base=model)
    with pytest.raises(ValueError, match=r"weight is \(3, 3\), and \(3, 4\) in the base"):
        intruders(nn.Linear(3, 3), base=nn.Linear(4, 3))
    model[2].merged = True
    with pytest.raises(ValueError, match="the adapter of 2 is merged into its weights"):
        intruders(model)
    model[2].merged, model[2].num_experts = False, 1
    model[2].lora_diag = {"default": torch.ones(3)}
    with caplog.at_level(logging.WARNING, "lowrank_optim"):
        assert list(intruders(model).layers) == ["0.default"]
    assert "intruder dimensions leave 2 out: a gate (lora_diag) stands between them" in caplog.text
    with torch.no_grad():
        model[0].factors[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weights of 0\.default hold NaN or infinity"):
        intruders(model)


def test_the_layer_of_the_oracle_is_what_it_says():
    layer = Adapted(12, 40, 3).double()
    a, b = layer.factors
    x = drawn(5, 12)
    weight = layer.base_layer.weight + 2.0 * b @ a
    assert torch.allclose(layer(x), x @ weight.mT + layer.base_layer.bias)
