"""SCALEOptimizer and SinkGDAdamW: which parameter is trained by what, the numbers of the papers' steps, the planner, bad input."""

import pytest
import torch
from torch import nn

import lowrank_optim as lo


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight


def language_model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"up": nn.Linear(8, 24, bias=False), "down": nn.Linear(24, 8, bias=False), "norm": nn.LayerNorm(8)}
    )
    return nn.ModuleDict(
        {"embed_tokens": nn.Embedding(20, 8), "layers": nn.ModuleList([block]), "lm_head": nn.Linear(8, 20, bias=False)}
    )


def grads(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    for n, p in enumerate(model.parameters()):
        p.grad = numbers(*p.shape, seed=50 * step + n)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_scale_has_the_numbers_of_the_papers_step():
    model = language_model()
    groups = lo.param_groups(model, weight_decay=0.1, **lo.SCALEOptimizer.matrix_options)
    optimizer = lo.SCALEOptimizer(groups, lr=1e-2, adamw_lr=3e-3)
    assert {name for name, p in model.named_parameters() if "exp_avg" in optimizer.state[p]} == {
        "lm_head.weight",
        "layers.0.norm.weight",
        "layers.0.norm.bias",
    }
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    vectors = {name: nn.Parameter(w.clone()) for name, w in expected.items() if w.dim() == 1}
    adamw = torch.optim.AdamW(vectors.values(), lr=3e-3, weight_decay=0.0)
    momentum = torch.zeros(20, 8)
    for step in range(4):
        given = grads(model, step)
        optimizer.step()
        for name, vector in vectors.items():
            vector.grad = given[name]
        adamw.step()
        momentum = 0.9 * momentum + 0.1 * given["lm_head.weight"]
        for name in expected.keys() - vectors.keys():
            grad = momentum if name == "lm_head.weight" else given[name]
            size = grad.square().mean(0 if "embed" in name else 1, keepdim=True).sqrt()
            expected[name] = (1.0 - 1e-2 * 0.1) * expected[name] - 1e-2 * grad / size
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), vectors[name].detach() if name in vectors else expected[name], rtol=0.0, atol=1e-6
        )


def test_sinkgd_trains_matrices_without_state_and_all_else_by_adamw():
    model = language_model()
    optimizer = lo.SinkGDAdamW(lo.param_groups(model, **lo.SinkGDAdamW.matrix_options))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    others = {name: nn.Parameter(p.clone()) for name, p in before.items() if "up" not in name and "down" not in name}
    reference = torch.optim.AdamW(others.values(), lr=2e-2, weight_decay=0.0)
    given = grads(model, 0)
    for name, p in others.items():
        p.grad = given[name]
    optimizer.step()
    reference.step()
    for name, p in model.named_parameters():
        if name in others:
            torch.testing.assert_close(p.detach(), others[name].detach(), rtol=0.0, atol=1e-6)
            assert "exp_avg_sq" in optimizer.state[p]
            continue
        x, (rows, cols) = given[name].double(), p.shape
        for _ in range(5):
            x = cols**0.5 * x / x.norm(dim=1, keepdim=True)
            x = rows**0.5 * x / x.norm(dim=0, keepdim=True)
        torch.testing.assert_close(p.detach(), before[name] - 0.001 * x.float(), rtol=0.0, atol=1e-6)
        assert list(optimizer.state[p]) == ["step"]


# ------------------------------------------------------------------------------------------------------------------ groups


def test_head_and_embeddings_have_the_options_that_are_given_to_them():
    groups = lo.param_groups(
        language_model(),
        rule="sinkhorn",
        head={"lr": 0.5},
        embeddings={"rule": lo.SAGE()},
        overrides={"lm_head": {"lr": 0.25}},
    )
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name["embed_tokens.weight"]["rule"] == lo.SAGE()
    assert by_name["lm_head.weight"]["lr"] == 0.25
    assert "lr" not in by_name["embed_tokens.weight"]
    assert by_name["layers.0.up.weight"]["rule"] == "sinkhorn"
    optimizer = lo.SinkGDAdamW(groups)
    assert sorted(optimizer.state[by_name["embed_tokens.weight"]["params"][0]]) == ["exp_avg", "exp_avg_abs", "step"]


def test_a_tied_weight_is_a_head():
    groups = lo.param_groups(Tied(), **lo.SCALEOptimizer.matrix_options)
    (tied,) = [group for group in groups if "embed.weight" in group["param_names"]]
    assert tied["momentum"] == 0.9
    assert "axis" not in tied


def test_a_head_that_is_low_rank_has_the_options_of_matrices():
    groups = lo.param_groups(language_model(), rank=4, include=["lm_head"], head={"lr": 0.5})
    (low,) = [group for group in groups if group["rank"] == 4]
    assert low["param_names"] == ["lm_head.weight"]
    assert "lr" not in low


def test_bad_options_of_head_and_embeddings_are_named():
    with pytest.raises(ValueError, match="rank"):
        lo.param_groups(language_model(), rule="row_norm", head={"rank": -1})
    with pytest.raises(TypeError, match="did you mean 'embeddings'"):
        lo.param_groups(language_model(), rule="row_norm", embedding={"rule": "sage"})


@pytest.mark.parametrize("kind", [lo.SCALEOptimizer, lo.SinkGDAdamW])
def test_groups_without_a_rule_are_refused_with_the_call_that_gives_them(kind):
    call = "rule='sinkhorn'" if kind is lo.SinkGDAdamW else r"\*\*lo.SCALEOptimizer.matrix_options"
    with pytest.raises(
        ValueError, match=rf"no group says which .*: {kind.__name__}\(lo.param_groups\(model, {call}\)\)"
    ):
        kind(language_model().parameters())


def test_the_groups_are_described():
    optimizer = lo.SCALEOptimizer(lo.param_groups(language_model(), **lo.SCALEOptimizer.matrix_options), lr=1e-3)
    text = lo.describe(optimizer)
    assert text.count("rule row_norm") == 3
    assert text.count("rule adam") == 1


# ------------------------------------------------------------------------------------------------------ planner and hooks


def test_the_planner_knows_that_there_is_no_state():
    model, batch = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.zeros(4, 64)
    for name in ("scale", "sinkgd"):
        memory = lo.plan(model, name, example_batch=batch, device="cpu", in_backward=True)
        assert memory.optimizer_state_bytes == (256 + 64) * 8 + 4 * 4
    eight = lo.plan(model, ("scale", {"state_bits": 8}), example_batch=batch, device="cpu")
    assert eight.optimizer_state_bytes == (256 + 64) * 8 + 4 * 4


def test_a_dense_step_by_rows_takes_no_memory_of_the_matrix():
    """In backward: weights, one gradient, and the temporaries of one step."""
    model, batch = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)]), torch.zeros(4, 512)
    size = 512 * 512 * 4
    rows = lo.plan(model, "scale", example_batch=batch, device="cuda", in_backward=True, dtype=torch.float32)
    both = lo.plan(model, "sinkgd", example_batch=batch, device="cuda", in_backward=True, dtype=torch.float32)
    workspace = 32 * 2**20  # cuBLAS
    assert 5 * size <= rows.peak_bytes - workspace < 5.3 * size
    assert 7 * size <= both.peak_bytes - workspace < 7.3 * size  # a masked gradient, and X


def test_updates_in_backward_with_accumulation_are_the_steps_of_the_sum():
    def run(in_backward: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.Sequential())
        model.add_module("lm_head", nn.Linear(16, 30, bias=False))
        optimizer = lo.SCALEOptimizer(lo.param_groups(model, **lo.SCALEOptimizer.matrix_options), lr=1e-2)
        handle = lo.update_in_backward(optimizer, accumulate=2) if in_backward else None
        for step in range(6):
            tokens = torch.randint(30, (8,), generator=torch.Generator().manual_seed(step))
            (nn.functional.cross_entropy(model(tokens), tokens.flip(0)) / 2).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        return [p.detach().clone() for p in model.parameters()]

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-6)
