"""Muon, NorMuon and SUMO: the numbers of torch.optim.Muon and of the equations, matrices of every kind, bad input, presets."""

import math

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.planner import PlanError
from lowrank_optim.rules.orthogonal import COEFFICIENTS, gram_newton_schulz, inverse_root, newton_schulz
from lowrank_optim.sharding.tensor_sharding import UNSHARDED
from tests.oracles.runs import check_resume_and_in_backward

SHAPES = ((40, 24), (24, 40), (32, 32))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(shapes=SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(0.1 * numbers(*shape, seed=n, dtype=dtype)) for n, shape in enumerate(shapes)]


def train(optimizer: torch.optim.Optimizer, params, steps: range) -> None:
    for step in steps:
        for n, p in enumerate(params):
            p.grad = numbers(*p.shape, seed=100 + 10 * step + n, dtype=p.dtype)
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------- torch's numbers

ADJUSTMENTS = [(None, True), ("original", False), ("match_rms_adamw", True)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("inner", ["float32", "bfloat16"])
@pytest.mark.parametrize(("adjust", "nesterov"), ADJUSTMENTS)
def test_muon_has_the_numbers_of_torch(monkeypatch, inner, adjust, nesterov):
    if inner == "float32":  # torch has no option for it
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    rule = lo.Muon(nesterov=nesterov, adjust_lr_fn=adjust, inner_dtype=inner)
    optimizer = lo.LowRankOptimizer(ours, rule=rule, **settings)
    reference = torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn=adjust, **settings)
    train(optimizer, ours, range(20))
    train(reference, theirs, range(20))
    for n, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert not torch.equal(got, 0.1 * numbers(*got.shape, seed=n))
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the equations


def polynomial(matrix: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """U f(S) Vᵀ by the singular values, one at a time."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / max(float(values.square().sum().sqrt()), eps)
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_has_the_numbers_of_its_equations(shape):
    weight = nn.Parameter(numbers(*shape, dtype=torch.float64))
    expected, m, v = weight.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape[0]).double()
    rule = lo.NorMuon(momentum=0.9, beta2=0.8)
    optimizer = lo.LowRankOptimizer([weight], rule=rule, lr=0.01, weight_decay=0.1)
    train(optimizer, [weight], range(6))
    for step in range(6):
        grad = numbers(*shape, seed=100 + 10 * step, dtype=torch.float64)
        m = 0.9 * m + 0.1 * grad
        o = polynomial(0.1 * grad + 0.9 * m)
        v = 0.8 * v + 0.2 * o.square().mean(1)
        scaled = o / (v.sqrt() + 1e-8)[:, None]
        update = scaled * o.norm() / scaled.norm() * math.sqrt(max(1.0, shape[0] / shape[1]))
        expected = (1.0 - 0.01 * 0.1) * expected - 0.01 * update
    torch.testing.assert_close(weight.detach(), expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 24), (3, 20, 12)])
def test_the_polynomial_on_a_gram_matrix_is_that_on_the_matrix(shape):
    """With singular values over four decades."""
    left, _, right = torch.linalg.svd(numbers(*shape, dtype=torch.float64), full_matrices=False)
    matrix = (left * torch.logspace(0, -4, shape[-1], dtype=torch.float64)) @ right
    direct = newton_schulz(matrix, COEFFICIENTS, 5, 1e-7, torch.float64)
    by_gram = matrix @ gram_newton_schulz(matrix.mT @ matrix, COEFFICIENTS, 5, 1e-7)
    torch.testing.assert_close(by_gram, direct, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(direct.view(-1, *shape[-2:])[0], polynomial(matrix.view(-1, *shape[-2:])[0]))


LIMITS = {"bfloat16 Gram": 3e-3, "float32": 3e-5, "float32 Gram": 2e-7}


@pytest.mark.parametrize("spectrum", ["even", "six decades", "one large", "of low rank"])
def test_the_error_of_newton_schulz_is_what_the_docstring_says(spectrum):
    """The largest singular value of the error."""
    m, n = 96, 64
    values = {
        "even": torch.ones(n),
        "six decades": torch.logspace(0, -6, n),
        "one large": torch.full((n,), 2e-3).index_fill(0, torch.tensor([0]), 1.0),
        "of low rank": (torch.arange(n) < 5).float(),
    }
    left, _, right = torch.linalg.svd(numbers(m, n), full_matrices=False)
    matrix = (left * values[spectrum]) @ right
    exact = newton_schulz(matrix.double(), COEFFICIENTS, 5, 1e-7, torch.float64)
    wide = matrix.double()
    found = {
        "bfloat16 Gram": matrix @ gram_newton_schulz(matrix.mT @ matrix, COEFFICIENTS, 5, 1e-7),
        "float32": newton_schulz(matrix, COEFFICIENTS, 5, 1e-7, torch.float32),
        "float32 Gram": (wide @ gram_newton_schulz(wide.mT @ wide, COEFFICIENTS, 5, 1e-7)).float(),
    }
    errors = {name: float(torch.linalg.matrix_norm(each.double() - exact, 2)) for name, each in found.items()}
    assert all(errors[name] < LIMITS[name] for name in LIMITS), errors


def test_the_inverse_root_leaves_out_what_is_noise_and_what_is_not_finite():
    matrix = torch.cat([numbers(20, 3, dtype=torch.float64), torch.zeros(20, 2).double()], 1)
    left, _, right = torch.linalg.svd(matrix[:, :3], full_matrices=False)
    found = matrix @ inverse_root(matrix.T @ matrix, 1e-12)
    torch.testing.assert_close(found[:, :3], left @ right)
    assert torch.equal(found[:, 3:], torch.zeros(20, 2).double())
    assert torch.equal(inverse_root(torch.full((4, 4), torch.nan), 1e-12), torch.zeros(4, 4))


# ------------------------------------------------------------------------------------------------------- in a subspace (SUMO)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (3, 30, 18)])
def test_the_direction_in_a_subspace_is_orthonormal_and_of_adams_size(shape):
    weight = nn.Parameter(numbers(*shape))
    before = weight.detach().clone()
    optimizer = lo.SUMOAdamW([{"params": [weight], "rank": 6}], lr=1.0, weight_decay=0.0, projector="svd")
    train(optimizer, [weight], range(1))
    moved = (before - weight.detach()).double()
    values = torch.linalg.svdvals(moved)[..., :7]
    size = 0.2 * math.sqrt(max(shape[-2:]))
    torch.testing.assert_close(values[..., :6], torch.full_like(values[..., :6], size), rtol=1e-5, atol=0.0)
    assert float(values[..., 6].max()) < 1e-5
    left, _, right = torch.linalg.svd(numbers(*shape, seed=100).double(), full_matrices=False)
    torch.testing.assert_close(moved, size * left[..., :6] @ right[..., :6, :], rtol=0.0, atol=1e-5)


def test_momentum_goes_along_into_a_new_subspace():
    weight = nn.Parameter(numbers(48, 20))
    optimizer = lo.SUMOAdamW([{"params": [weight], "rank": 20}], update_proj_gap=2, momentum=0.9)
    train(optimizer, [weight], range(3))  # the third gradient gives the second basis
    expected = torch.zeros(48, 20)
    for step in range(3):
        expected = 0.9 * expected + 0.1 * numbers(48, 20, seed=100 + 10 * step)
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"] @ state["basis"].T, expected, rtol=0.0, atol=1e-6)


def test_a_direction_in_a_subspace_is_exact_where_newton_schulz_is_not():
    left, _, right = torch.linalg.svd(numbers(40, 4), full_matrices=False)
    reduced = (left * torch.tensor([1.0, 1e-1, 1e-3, 1e-5])) @ right
    context = lo.Context(1.0, 1.0, torch.zeros(40, 30), None)
    rule = lo.Muon(momentum=0.0, adjust_lr_fn="original")
    options, state = rule.options(), {"exp_avg": torch.zeros(40, 4)}
    found = rule.direction(reduced, state, options, context).matrix / math.sqrt(40 / 30)
    torch.testing.assert_close(torch.linalg.svdvals(found), torch.ones(4), rtol=0.0, atol=1e-3)
    usual = torch.linalg.svdvals(newton_schulz(reduced, COEFFICIENTS, 5, 1e-7, torch.float32))
    assert float(usual.min()) < 0.02


# ---------------------------------------------------------------------------------------------- stacks, convolutions, split


def step_of(shape, grad, seed=0, **group) -> torch.Tensor:
    """What one step takes from the weights."""
    weight = nn.Parameter(numbers(*shape, seed=seed))
    before = weight.detach().clone()
    optimizer = lo.LowRankOptimizer(
        [{"params": [weight], **group}], rule=lo.Muon(adjust_lr_fn="match_rms_adamw"), lr=1.0
    )
    weight.grad = grad
    optimizer.step()
    return before - weight.detach()


def test_a_stack_is_trained_matrix_by_matrix():
    grad = numbers(3, 20, 12)
    found = step_of((3, 20, 12), grad)
    for n in range(3):
        torch.testing.assert_close(found[n], step_of((20, 12), grad[n]), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_trained_by_its_matrix_view(channels_last):
    order = torch.channels_last if channels_last else torch.contiguous_format
    weight = nn.Parameter(numbers(8, 6, 3, 3).contiguous(memory_format=order))
    before, grad = weight.detach().clone(), numbers(8, 6, 3, 3, seed=1)
    optimizer = lo.LowRankOptimizer([weight], rule=lo.Muon(adjust_lr_fn="match_rms_adamw"), lr=1.0)
    weight.grad = grad.contiguous(memory_format=order)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].shape == (8, 54)
    expected = step_of((8, 54), grad.reshape(8, 54))
    torch.testing.assert_close((before - weight.detach()).reshape(8, 54), expected, rtol=0.0, atol=1e-5)


def test_a_transposed_matrix_and_a_convolution_of_three_dimensions_follow_their_layout():
    grad = numbers(20, 12, seed=1)
    found = step_of((20, 12), grad, layout="transposed", split=3)
    torch.testing.assert_close(found.T, step_of((12, 20), grad.T.contiguous(), split=3), rtol=0.0, atol=1e-5)
    grad = numbers(8, 6, 3, seed=1)
    found = step_of((8, 6, 3), grad, layout="conv")
    torch.testing.assert_close(found.reshape(8, 18), step_of((8, 18), grad.reshape(8, 18)), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("split", [3, (24, 6, 6)])
@pytest.mark.parametrize("shape", [(36, 20), (2, 36, 20)])
def test_blocks_of_rows_are_orthogonalised_each_for_itself(shape, split):
    grad = numbers(*shape)
    found = step_of(shape, grad, split=split)
    sizes = [12] * 3 if split == 3 else split
    parts = [step_of(tuple(part.shape), part.contiguous()) for part in grad.split(sizes, -2)]
    torch.testing.assert_close(found, torch.cat(parts, -2), rtol=0.0, atol=1e-5)
    assert not torch.allclose(found, step_of(shape, grad), atol=1e-2)


def test_blocks_of_rows_in_a_subspace():
    weight = nn.Parameter(numbers(36, 20))
    before = weight.detach().clone()
    group = {"params": [weight], "rank": 5, "split": (24, 12), "proj_type": "right"}
    optimizer = lo.LowRankOptimizer([group], rule=lo.Muon(), lr=1.0)
    weight.grad = numbers(36, 20, seed=1)
    optimizer.step()
    for rows, part in zip((24, 12), (before - weight.detach()).split((24, 12)), strict=True):
        values = torch.linalg.svdvals(part)[:5]
        torch.testing.assert_close(values, torch.full((5,), max(1.0, rows / 20) ** 0.5), rtol=1e-4, atol=0.0)


# ------------------------------------------------------------------------------------------------------------ the package


def llama_like() -> nn.Module:
    block = nn.ModuleDict({"qkv": nn.Linear(64, 192, bias=False), "down": nn.Linear(192, 64), "norm": nn.LayerNorm(64)})
    return nn.ModuleDict(
        {"embed": nn.Embedding(100, 64), "layers": nn.ModuleList([block]), "lm_head": nn.Linear(64, 100)}
    )


def grads(model: nn.Module, step: int) -> None:
    for n, p in enumerate(model.parameters()):
        p.grad = numbers(*p.shape, seed=50 * step + n)


def test_matrices_of_a_model_get_muon_and_all_else_adamw():
    model = llama_like()
    groups = lo.param_groups(model, rule="muon", weight_decay=0.1, overrides={"qkv": {"split": 3}})
    optimizer = lo.MuonAdamW(groups, lr=1e-3, adamw_lr=3e-4)
    by_muon = {n for g in optimizer.param_groups if g["rule"] == "muon" for n in g["param_names"]}
    assert by_muon == {"layers.0.qkv.weight", "layers.0.down.weight"}
    assert {(g["rule"], g["lr"]) for g in optimizer.param_groups} == {("muon", 1e-3), ("adam", 3e-4)}
    assert [g["split"] for g in optimizer.param_groups if g["param_names"] == ["layers.0.qkv.weight"]] == [3]
    assert all("exp_avg_sq" in optimizer.state[p] for n, p in model.named_parameters() if n not in by_muon)
    adamw = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters() if n not in by_muon}
    vectors = [p for n, p in adamw.items() if p.ndim == 1]
    others = [p for n, p in adamw.items() if p.ndim > 1]
    reference = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=3e-4
    )
    for step in range(3):
        grads(model, step)
        for n, p in model.named_parameters():
            if n in adamw:
                adamw[n].grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for n, p in model.named_parameters():
        if n in adamw:
            torch.testing.assert_close(p.detach(), adamw[n].detach(), rtol=0.0, atol=1e-6)


def test_the_groups_of_a_muon_model_are_described():
    lines = lo.describe(lo.MuonAdamW(lo.param_groups(llama_like(), rule="muon"), lr=1e-3)).splitlines()
    assert lines[0].startswith("group 0: dense, rule muon, lr 0.001")
    assert any(line.startswith("group 1: dense, rule adam") for line in lines)


def test_the_factory_for_the_trainer_needs_no_rank():
    optimizer = lo.integrations.transformers.LowRank()(
        llama_like(), method="muon_adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    assert [group["rule"] for group in optimizer.param_groups] == ["muon", "adam", "adam"]
    with pytest.raises(ValueError, match="LowRank needs rank"):
        lo.integrations.transformers.LowRank()(
            llama_like(), method="sumo", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )


def test_the_planner_knows_the_state_of_muon():
    model, batch = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.zeros(4, 64)
    memory = lo.plan(model, "muon_adamw", example_batch=batch, device="cpu")
    optimizer = lo.MuonAdamW(lo.param_groups(model, rule="muon"))
    assert memory.optimizer_state_bytes == sum(lo.state_bytes(optimizer).values())
    assert memory.optimizer_state_bytes == 2 * 64 * 256 * 4 + (256 + 64) * 8 + 4 * 4
    low_rank = lo.plan(model, ("sumo", {"rank": 8}), example_batch=batch, device="cpu")
    assert low_rank.optimizer_state_bytes == 2 * (256 + 64) * 8 * 4 + (256 + 64) * 8 + 4 * 4 + 2 * 8
    with pytest.raises(PlanError, match="momentum is 2"):
        lo.plan(model, ("muon_adamw", {"momentum": 2}), example_batch=batch, device="cpu")


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}, {"rank": 32}, {"rank": 32, "state_bits": 8}], ids=str)
@pytest.mark.parametrize("rule", [lo.Muon(), lo.NorMuon()], ids=["muon", "normuon"])
def test_a_run_resumes_to_the_bit_with_updates_in_backward_and_few_bits(rule, options):
    def build(model):
        rank = {"rank": options["rank"]} if "rank" in options else {}
        groups = lo.param_groups(model, rule=rule, **rank)
        bits = {"state_bits": options.get("state_bits", 32)}
        return lo.LowRankOptimizer(groups, rule="adam", lr=1e-2, update_proj_gap=2, on_refresh="rotate", **bits)

    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96))

    model, optimizer = check_resume_and_in_backward(make, build)
    assert optimizer.state[model[0].weight]["exp_avg"].element_size() == (1 if "state_bits" in options else 4)


def test_moments_in_eight_bits_keep_the_direction():
    ours, exact = parameters([(96, 64)]), parameters([(96, 64)])
    few = lo.LowRankOptimizer(ours, rule=lo.Muon(), lr=1e-2, state_bits=8)
    train(few, ours, range(10))
    train(lo.LowRankOptimizer(exact, rule=lo.Muon(), lr=1e-2), exact, range(10))
    start = parameters([(96, 64)])[0]
    moved, right = (ours[0] - start).detach(), (exact[0] - start).detach()
    assert 1e-4 < float((moved - right).norm() / right.norm()) < 0.05
    assert few.state[ours[0]]["exp_avg"].element_size() == 1


def test_blocks_in_turn_are_orthogonalised_whole_by_newton_schulz():
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False))
    group = {"params": list(model.parameters()), "density": 0.5}
    optimizer = lo.LowRankOptimizer([group], rule=lo.Muon(), blocks="ascending", on_refresh="reset", lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    grads(model, 0)
    optimizer.step()
    changed = [n for n, p in enumerate(model.parameters()) if not torch.equal(p, before[n])]
    assert len(changed) == 1
    (n,) = changed
    grad = numbers(*before[n].shape, seed=n)
    expected = (
        newton_schulz(grad, COEFFICIENTS, 5, 1e-7, torch.float32) * max(1.0, grad.shape[0] / grad.shape[1]) ** 0.5
    )
    torch.testing.assert_close(before[n] - list(model.parameters())[n].detach(), expected, rtol=0.0, atol=1e-5)


def test_a_gradient_that_is_not_finite_goes_through_where_that_is_asked_for():
    for rank in (None, 4):
        weight = nn.Parameter(numbers(24, 16))
        optimizer = lo.LowRankOptimizer([{"params": [weight], "rank": rank}], rule=lo.Muon(), on_nonfinite="propagate")
        train(optimizer, [weight], range(1))
        weight.grad = torch.full((24, 16), torch.inf)
        optimizer.step()
        assert not bool(torch.isfinite(weight).all())


# -------------------------------------------------------------------------------------------------------------- bad input


def refused(match: str, *shape: int, **group) -> None:
    weight = nn.Parameter(numbers(*shape))
    with pytest.raises(ValueError, match=match):
        lo.LowRankOptimizer([{"params": [("w", weight)], **group}], rule=lo.Muon())


def test_bad_input_is_refused_with_the_way_out():
    refused(r"parameter w \(7,\) is no matrix, and the rule \'muon\' .* another rule .*lo\.Adam\(\).*rule=\'muon\'", 7)
    refused(r"parameter w \(7,\) is no matrix", 7, rank=4)
    refused(
        r"parameter w \(20, 8\) has 20 rows, which split=3 does not divide; give the sizes .* split=\(14, 6\)",
        20,
        8,
        split=3,
    )
    refused(r"has 20 rows, and the blocks of split=\(12, 4\) have 16; give sizes that add up", 20, 8, split=(12, 4))
    refused(r"is projected on its left side.*split=2.*proj_type=\"right\"", 8, 20, rank=4, split=2)
    refused("split is 0; it must be None, a number of equal blocks", 8, 20, split=0)
    refused(r"split is \(\)", 8, 20, split=())
    refused("momentum is 1.0", 8, 20, momentum=1.0)
    refused("ns_steps is 0", 8, 20, ns_steps=0)
    refused("ns_coefficients is", 8, 20, ns_coefficients=(1.0, 2.0))
    refused("ns_eps is 0.0; it must be above 0", 8, 20, ns_eps=0.0)
    refused("adjust_lr_fn is 'rms'; valid values are 'original', 'match_rms_adamw' and None", 8, 20, adjust_lr_fn="rms")
    refused("inner_dtype is 'half'; valid values are 'float32', 'bfloat16', 'float64'", 8, 20, inner_dtype="half")
    refused("beta2 is 1.0", 8, 20, rule=lo.NorMuon(beta2=1.0))


def test_muon_without_matrices_is_refused_with_the_call_that_gives_them():
    model = llama_like()
    with pytest.raises(
        ValueError,
        match=r"no group says which parameters are trained by Muon: MuonAdamW\(lo.param_groups\(model, rule='muon'\)\)",
    ):
        lo.MuonAdamW(model.parameters())
    assert UNSHARDED.offset(-2) == 0


def test_vectors_among_matrices_are_trained_by_the_dense_rule_if_there_is_one():
    matrix, vector = nn.Parameter(numbers(24, 16)), nn.Parameter(numbers(7))
    twin = nn.Parameter(vector.detach().clone())
    optimizer = lo.SUMOAdamW([{"params": [matrix, vector], "rank": 4}], lr=1e-2, eps=1e-3, betas=(0.8, 0.9))
    reference = torch.optim.AdamW([twin], lr=1e-2, eps=1e-3, betas=(0.8, 0.9))
    for step in range(3):
        matrix.grad, vector.grad = numbers(24, 16, seed=step), numbers(7, seed=step)
        twin.grad = vector.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(vector.detach(), twin.detach(), rtol=0.0, atol=1e-7)
    assert optimizer.plan_of(vector).rule.name == "adam"
    with pytest.raises(ValueError, match="is no matrix"):  # its momentum is an option of both
        lo.LowRankOptimizer([{"params": [matrix, vector], "rank": 4}], rule=lo.Muon(), dense_rule=lo.SGD(0.9))
