"""Diagnostics: effective ranks, energy within subspaces and their overlap, against their definitions in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

F64 = torch.float64
M, N, RANK = 24, 40, 5


def matrix_of(values: list[float]) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=F64))[0] for n in (M, N))
    return (left * torch.tensor(values, dtype=F64)) @ right.mT


def model_of(*weights: Tensor) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype) for w in weights))
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(weight)
    return model


def test_effective_ranks_of_weights_and_gradients():
    values = [4.0, 2.0, 1.0, 1.0]
    model = model_of(matrix_of(values))
    p = [value / 8 for value in values]
    found = lo.diagnostics.effective_ranks(model, share=0.8)
    assert list(found) == ["0.weight"]
    assert found["0.weight"].entropy == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-8)
    assert found["0.weight"].stable == pytest.approx(22 / 16, rel=1e-12)
    assert (found["0.weight"].energy, found["0.weight"].full) == (2.0, M)  # 20 of 22
    with pytest.raises(ValueError, match="after backward"):
        lo.diagnostics.effective_ranks(model, "gradients")
    model[0].weight.grad = matrix_of([3.0] * 7)
    found = lo.diagnostics.effective_ranks(model, "gradients")
    assert found["0.weight"].entropy == pytest.approx(7)
    assert found["0.weight"].stable == pytest.approx(7)


def test_convolutions_and_stacks_are_seen_as_matrices():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "embed": nn.Embedding(30, 8), "norm": nn.LayerNorm(8)})
    model.register_parameter("experts", nn.Parameter(torch.stack([torch.eye(6), torch.zeros(6, 6).fill_diagonal_(0)])))
    with torch.no_grad():
        model.experts[1, 0, 0] = 2
    found = lo.diagnostics.effective_ranks(model)
    assert set(found) == {"conv.weight", "embed.weight", "experts"}
    assert found["conv.weight"].full == 8
    assert found["experts"].stable == pytest.approx((6 + 1) / 2)


OPTIMIZERS = {
    "svd": (lo.GaLoreAdamW, {"projector": "svd"}),
    "left": (lo.GaLoreAdamW, {"proj_type": "left", "projector": "svd"}),
    "full": (lo.GaLoreAdamW, {"proj_type": "full", "projector": "svd"}),
    "8bit": (lo.GaLoreAdamW8bit, {"projector": "svd"}),
    "random": (lo.APOLLOAdamW, {}),
    "columns": (lo.FrugalAdamW, {"projector": "coordinate"}),
    "dct": (lo.GaLoreAdamW, {"projector": "dct"}),
}


def run(name: str, steps: int, watch: bool = True) -> tuple[nn.Module, lo.LowRankOptimizer, object]:
    torch.manual_seed(0)
    model = model_of(torch.randn(M, N), torch.randn(N, M))
    kind, options = OPTIMIZERS[name]
    groups = lo.param_groups(model, rank=RANK, include=["0", "1"], update_proj_gap=2, stagger=False, **options)
    optimizer = kind(groups, lr=1e-2)
    overlap = lo.diagnostics.subspace_overlap(optimizer) if watch else None
    for step in range(steps):
        x = torch.randn(16, N, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        if step < steps - 1:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, overlap


def basis_matrix(optimizer: lo.LowRankOptimizer, param: Tensor) -> Tensor:
    """An orthonormal basis of the subspace within all matrices, out of its projection of every unit matrix: (m·n, dimension)."""
    basis, m, n = optimizer.trained(param).basis(), *param.shape
    rows = []
    for unit in torch.eye(m * n).view(-1, m, n):
        inside = torch.zeros(m, n)
        basis.lift_(inside, basis.project(unit))
        rows.append(inside.flatten().to(F64))
    values, vectors = torch.linalg.eigh(torch.stack(rows))
    return vectors[:, values > 0.5]


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_energy_and_overlap_of_every_kind_of_subspace(name):
    model, optimizer, overlap = run(name, 4)
    param = model[0].weight
    old, grad = basis_matrix(optimizer, param), param.grad.flatten().to(F64)
    energy = lo.diagnostics.subspace_energy(optimizer)
    expected = ((old.mT @ grad).square().sum() / grad.square().sum()).item()
    assert energy["0.weight"] == pytest.approx(expected, abs=0.01 if name == "8bit" else 1e-4)
    assert set(energy) == {"0.weight", "1.weight"}
    seen = len(overlap.rows)
    optimizer.step()
    later = [row for row in overlap.rows[seen:] if row.name == "0.weight"]
    if not later:  # its refresh comes with the next step
        model(torch.ones(3, N)).square().mean().backward()
        optimizer.step()
        later = [row for row in overlap.rows[seen:] if row.name == "0.weight"]
    new = basis_matrix(optimizer, param)
    # As one subspace of all matrices; projecting one side only, it is the overlap of that side.
    whole = ((old.mT @ new).square().sum() / new.shape[1]).item()
    if name == "full":  # there, the mean of both sides stands in place of the product
        assert whole <= later[0].overlap ** 2 + 1e-6
    else:
        assert later[0].overlap == pytest.approx(whole, abs=0.01 if name == "8bit" else 1e-4)
    assert overlap.latest["0.weight"] == later[0].overlap


def test_looking_changes_nothing():
    models = [run("svd", 6, watch)[0] for watch in (True, False)]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_the_record_goes_on_with_updates_in_backward_and_ends():
    torch.manual_seed(0)
    model = model_of(torch.randn(M, N))
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=RANK, include="0", update_proj_gap=1), lr=1e-2)
    overlap, handle = lo.diagnostics.subspace_overlap(optimizer), lo.update_in_backward(optimizer)
    for step in range(4):
        if step == 3:
            overlap.remove()
        model(torch.randn(16, N)).square().mean().backward()
        optimizer.step()
    handle.remove()
    assert [row.step for row in overlap.rows] == [2, 3]
    assert overlap.mean == {"0.weight": pytest.approx(sum(row.overlap for row in overlap.rows) / 2)}


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _, optimizer, overlap = run("svd", 4)
    lo.diagnostics.plot(
        {"overlap": overlap.mean, "energy": lo.diagnostics.subspace_energy(optimizer)}, tmp_path / "subspaces.svg"
    )
    drawn = (tmp_path / "subspaces.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {word} -->" in drawn for word in ("overlap", "energy", "0.weight", "1.weight"))
    with pytest.raises(ValueError, match="no numbers"):
        lo.diagnostics.plot({"overlap": {}}, tmp_path / "none.png")


def test_bad_input():
    model = model_of(torch.randn(M, N))
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        lo.diagnostics.effective_ranks([])
    for options, message in (({"of": "moments"}, "of is 'moments'"), ({"share": 0}, "share is 0")):
        with pytest.raises(ValueError, match=message):
            lo.diagnostics.effective_ranks(model, **options)
    with pytest.raises(ValueError, match="no matrix"):
        lo.diagnostics.effective_ranks(nn.LayerNorm(4))
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"0\.weight: the weight is not finite"):
        lo.diagnostics.effective_ranks(model)
    for look in (lo.diagnostics.subspace_energy, lo.diagnostics.subspace_overlap):
        with pytest.raises(TypeError, match="of this package, got SGD"):
            look(torch.optim.SGD(model.parameters(), lr=1))
        with pytest.raises(ValueError, match="no matrix in a subspace"):
            look(lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-3))
    fresh = lo.GaLoreAdamW(lo.param_groups(model, rank=2, include="0"), lr=1e-3)
    with pytest.raises(ValueError, match="both a gradient and a subspace"):
        lo.diagnostics.subspace_energy(fresh)
