"""SaRA: the entries with the smallest weights are trained, all others stay; against a transcription of the masked variant."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.optimizers.sara import low_rank_pull
from tests.oracles.checkpoints import assert_same_run, resume
from tests.oracles.sara import masked_adamw

F64, BF16 = torch.float64, torch.bfloat16
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32), "conv": (8, 4, 3, 3), "stack": (3, 20, 16)}

# Entries of W after four steps on the closed-form example, by the released masked variant; the mask has 14 entries, then 12.
GOLDEN_LOSSES = [8.717902, 8.244396, 8.001467, 7.961395]
GOLDEN = [
    [1.0, -0.416147, -0.653644, 0.96017, 0.227597, -0.839072, 0.843854, 0.532803],
    [0.540302, -0.98748, 0.775566, -0.158436, -0.714266, 0.997798, -0.615352, -0.569574],
    [-0.416147, 0.287759, 0.608351, -0.930426, 0.986192, -0.759688, 0.355479, 0.189101],
    [-0.989992, 0.927478, -0.811093, 0.647596, -0.446485, -0.298764, -0.151983, -0.090481],
    [-0.653644, 0.608351, -0.560984, 0.511704, -0.460679, 0.408082, 0.196221, -0.252736],
    [-0.131211, -0.602012, 0.843854, -0.978453, 0.988705, -0.873305, 0.646919, 0.441974],
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, param in enumerate(params):
            param.grad = draw(100 * step + number, *param.shape).to(param.dtype)
        optimizer.step()


def chosen(optimizer: lo.LowRankOptimizer, param: Tensor) -> Tensor:
    """The mask of the chosen entries."""
    mask = torch.zeros(param.numel(), dtype=torch.bool)
    mask[optimizer.state[param]["indices"].long()] = True
    return mask.view(param.shape)


def test_the_numbers_are_those_of_the_released_masked_variant():
    i, j, t = (torch.arange(n, dtype=F64) for n in (6, 8, 12))
    x, y = torch.sin(0.37 * torch.outer(t + 1, j + 2)), torch.cos(0.3 * t[:, None] + 0.5 * i)
    model = nn.Linear(8, 6, bias=False, dtype=F64)
    model.weight.data = torch.cos(i[:, None] + 2 * j + 0.3 * torch.outer(i, j))
    optimizer = lo.SaRAAdamW(lo.param_groups(model, density=1.0), lr=0.2, threshold=0.4, shrink_at=2)
    losses, counts = [], []
    for _ in range(4):
        loss = 0.5 * (model(x) - y).square().sum() / 12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        counts.append(optimizer.state[model.weight]["indices"].numel())
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=2e-6)
    assert counts == [14, 14, 12, 12]
    torch.testing.assert_close(model.weight.detach(), torch.tensor(GOLDEN, dtype=F64), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_moments_and_masks_are_those_of_the_equations(shape):
    start = draw(1, *shape)
    grads = [draw(100 * step, *shape).numpy() for step in range(9)]
    weight, masks, m, v = masked_adamw(
        start.numpy(), lambda step, _: grads[step], 9, threshold=0.5, shrink_at=4, lr=0.1, weight_decay=0.2
    )
    param = nn.Parameter(start.clone())
    optimizer = lo.SaRAAdamW([param], lr=0.1, weight_decay=0.2, threshold=0.5, shrink_at=4)
    assert np.array_equal(chosen(optimizer, param).numpy(), masks[0])
    run(optimizer, [param], range(9))
    assert masks[0].sum() > masks[-1].sum() > 0
    assert np.array_equal(chosen(optimizer, param).numpy(), masks[-1])
    np.testing.assert_allclose(param.detach().numpy(), weight, rtol=0, atol=1e-13)
    assert np.array_equal(param.detach().numpy()[~masks[0]], start.numpy()[~masks[0]])
    state = optimizer.state[param]
    np.testing.assert_allclose(state["exp_avg"].numpy()[:, 0], m[masks[-1]], rtol=0, atol=1e-14)
    np.testing.assert_allclose(state["exp_avg_sq"].numpy()[:, 0], v[masks[-1]], rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}, {"weight_error_bits": 8}], ids=str)
def test_entries_that_are_not_chosen_stay_to_the_bit(options):
    """In bfloat16, with decay, in a matrix, its transpose (Conv1D), and a convolution that lies channels last."""
    params = [nn.Parameter(draw(i, *shape).to(BF16)) for i, shape in enumerate([(40, 24), (24, 40), (8, 4, 3, 3)])]
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
    before = [param.detach().clone() for param in params]
    groups = [{"params": params[:1], "density": 0.2}, {"params": params[1:2], "density": 0.2, "layout": "transposed"}]
    optimizer = lo.SaRAAdamW([*groups, {"params": params[2:], "density": 0.2}], lr=0.1, weight_decay=0.5, **options)
    masks = [chosen(optimizer, params[0]), chosen(optimizer, params[1]).view(40, 24).mT, chosen(optimizer, params[2])]
    run(optimizer, params, range(5))
    for param, old, mask in zip(params, before, masks, strict=True):
        assert int(mask.sum()) == int(0.2 * param.numel())
        assert torch.equal(param[~mask], old[~mask])
        assert (param[mask] != old[mask]).float().mean() > 0.9
        assert old[mask].abs().max() <= old[~mask].abs().min()


def test_of_equal_magnitudes_the_first_are_chosen():
    param = nn.Parameter(torch.tensor([[3.0, -1.0, 2.0, 1.0], [1.0, -2.0, -1.0, 0.5]]))
    for density, places in ((0.25, [1, 7]), (0.5, [1, 3, 4, 7]), (0.75, [1, 2, 3, 4, 6, 7])):
        optimizer = lo.SaRAAdamW([param], density=density)
        assert optimizer.state[param]["indices"].tolist() == places


def test_all_entries_are_adamw():
    ours, theirs = nn.Parameter(draw(0, 40, 24)), nn.Parameter(draw(0, 40, 24))
    run(lo.SaRAAdamW([ours], lr=0.1, weight_decay=0.1, density=1.0), [ours], range(6))
    run(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1), [theirs], range(6))
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_a_shrink_by_density_leaves_what_has_grown_above_the_largest_that_was_chosen():
    params = [nn.Parameter(draw(i, *shape)) for i, shape in enumerate([(40, 24), (3, 20, 16)])]
    optimizer = lo.SaRAAdamW(params, lr=0.5, density=0.3, shrink_at=3)
    first = [chosen(optimizer, param) for param in params]
    limits = [
        param.detach().where(mask, 0.0).abs().flatten(-2).amax(-1) for param, mask in zip(params, first, strict=True)
    ]
    run(optimizer, params, range(3))
    moments = [optimizer.state[param]["exp_avg"].clone() for param in params]
    middle = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, mask, limit, old, moment in zip(params, first, limits, middle, moments, strict=True):
        stays = mask & (old.abs() <= limit[..., None, None])
        assert torch.equal(chosen(optimizer, param), stays)
        assert 0 < stays.sum() < mask.sum()
        # The step after it has decayed them by β₁, and nothing else: they are those of the same entries.
        expected = moment[stays[mask]] * 0.9
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-14, atol=0)
    run(optimizer, params, range(4, 14))
    assert torch.equal(chosen(optimizer, params[0]), first[0] & (middle[0].abs() <= limits[0]))


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 0.01), (8, 0.02)])
def test_training_follows_float32_moments(bits, tolerance):
    """Of entries whose gradients have a mean: they share scales with entries of any row and column."""
    exact, coded = (nn.Parameter(draw(0, 120, 100).float()) for _ in range(2))
    optimizers = [lo.SaRAAdamW([p], lr=1e-3, density=0.4, state_bits=b) for p, b in ((exact, 32), (coded, bits))]
    for step in range(30):
        exact.grad = (draw(1, 120, 100) + draw(100 + step, 120, 100)).float()
        coded.grad = exact.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    distance = (exact - coded).norm() / (exact - draw(0, 120, 100)).norm()
    assert 0 < distance < tolerance


def test_a_matrix_without_small_entries_is_frozen():
    large, mixed = nn.Parameter(2.0 + draw(0, 80, 60).abs()), nn.Parameter(draw(1, 80, 60))
    before = large.detach().clone()
    optimizer = lo.SaRAAdamW([large, mixed], threshold=1.0, weight_decay=1.0, lr=0.1, state_bits=8, shrink_at=2)
    run(optimizer, [large, mixed], range(4))
    assert torch.equal(large, before)
    assert optimizer.state[large]["exp_avg"].numel() == 0
    assert optimizer.state[mixed]["exp_avg"].numel() > 0


def test_weights_that_are_loaded_before_the_first_step_count_and_later_ones_do_not():
    param = nn.Parameter(draw(0, 40, 24))
    optimizer = lo.SaRAAdamW([param], threshold=0.5, lr=1e-3)
    before = chosen(optimizer, param)
    with torch.no_grad():
        param.copy_(draw(1, 40, 24))
    run(optimizer, [param], range(1))
    expected = draw(1, 40, 24).abs() < 0.5
    assert torch.equal(chosen(optimizer, param), expected)
    assert not torch.equal(before, expected)
    with torch.no_grad():
        param.copy_(draw(2, 40, 24))
    run(optimizer, [param], range(1, 3))
    assert torch.equal(chosen(optimizer, param), expected)


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}, {"on_refresh": "reset"}], ids=str)
@pytest.mark.parametrize("stop", [3, 7], ids=["before the shrink", "after it"])
def test_resume_is_exact(stop, options):
    """Over weights of other values, which would choose other entries; the low-rank term is on."""

    def build() -> tuple[list[nn.Parameter], lo.SaRAAdamW]:
        params = [nn.Parameter(draw(i, *shape).float()) for i, shape in enumerate([(70, 90), (90, 70), (24,)])]
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        settings = {"threshold": 0.7, "shrink_at": 5, "low_rank_weight": 0.1, "lr": 0.05, **options}
        return params, lo.SaRAAdamW([{"params": named, "density": 1.0}], **settings)

    params, optimizer = build()
    run(optimizer, params, range(stop))
    others, resumed = build()
    with torch.no_grad():
        for param in others:
            param.mul_(0.5)
    resume(optimizer, params, resumed, others)
    run(optimizer, params, range(stop, 10))
    run(resumed, others, range(stop, 10))
    assert_same_run(optimizer, params, resumed, others)


def test_updates_in_backward_with_accumulation_have_the_bits_of_ordinary_steps():
    """Across the shrink; between micro-batches only the chosen entries are kept."""
    ends = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 70))
        groups = lo.param_groups(model, density=1.0)
        optimizer = lo.SaRAAdamW(groups, lr=1e-2, threshold=0.05, shrink_at=3, low_rank_weight=0.1)
        if in_backward:
            lo.update_in_backward(optimizer, accumulate=2)
        for number in range(12):
            model(draw(number, 16, 70).float()).square().mean().backward()
            if in_backward and number == 8:
                state = optimizer.state[model[0].weight]
                assert state["projected_sum"].shape == state["exp_avg"].shape
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert optimizer.state[model[0].weight]["indices"].numel() < 6300
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_low_rank_term_is_the_gradient_of_the_nuclear_norm():
    weight = draw(0, 70, 66).requires_grad_()
    param = nn.Parameter(weight.detach().clone())
    optimizer = lo.SaRAAdamW([param], density=0.3)
    mask = chosen(optimizer, param)
    torch.linalg.matrix_norm(weight * mask, "nuc").mul(0.25).backward()
    pull = low_rank_pull(0.25, optimizer.trained(param).basis(), param.detach())
    torch.testing.assert_close(pull[:, 0], weight.grad[mask], atol=1e-12, rtol=0)
    with torch.no_grad():
        param.zero_()
    assert not low_rank_pull(0.25, optimizer.trained(param).basis(), param).any()


def test_one_matrix_in_a_step_has_the_low_rank_term():
    """As if its subgradient had been added to the gradient of that matrix; small ones, and those with few entries, are left out."""
    shapes = {"a": (70, 90), "b": (90, 70), "small": (64, 90), "few": (80, 80), "c": (66, 66)}
    params = {name: nn.Parameter(draw(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    few, rest = ("few", params["few"]), [(n, p) for n, p in params.items() if n != "few"]
    groups = [{"params": rest, "density": 0.3}, {"params": [few], "density": 0.01}]
    optimizer = lo.SaRAAdamW(groups, lr=1e-2, low_rank_weight=0.5)
    drawn = set()
    for step in range(12):
        twins = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
        plain = lo.SaRAAdamW(
            [{"params": [(n, p)], "density": 0.01 if n == "few" else 0.3} for n, p in twins.items()], lr=1e-2
        )
        masks = {name: chosen(optimizer, param) for name, param in params.items()}
        for name, twin in twins.items():
            twin.grad = draw(50 * step + len(name), *twin.shape)
            params[name].grad = twin.grad.clone()
            plain.state[twin] = {n: t.clone() for n, t in optimizer.state[params[name]].items()}
        optimizer.step()
        plain.step()
        moved = [name for name in params if not torch.equal(params[name], twins[name])]
        assert len(moved) <= 1
        drawn |= set(moved)
        if moved and step == 0:
            (name,) = moved
            start = draw(list(shapes).index(name), *shapes[name])
            u, _, vt = torch.linalg.svd(start * masks[name], full_matrices=False)
            grad = (draw(len(name), *shapes[name]) + 0.5 * (u @ vt))[masks[name]]
            torch.testing.assert_close(optimizer.state[params[name]]["exp_avg"][:, 0], 0.1 * grad, atol=1e-12, rtol=0)
    assert drawn == {"a", "b", "c"}


def test_tied_layers_are_one_matrix_with_the_sum_of_their_gradients():
    """Which comes once among those that are drawn for the low-rank term."""
    model = nn.ModuleDict({"a": nn.Linear(70, 70, bias=False), "b": nn.Linear(70, 70, bias=False)}).double()
    model["b"].weight = model["a"].weight
    alone = nn.Parameter(model["a"].weight.detach().clone())
    options = {"lr": 1e-2, "low_rank_weight": 0.5, "shrink_at": 2}
    optimizer = lo.SaRAAdamW(lo.param_groups(model, density=0.3, include=["a", "b"]), **options)
    plain = lo.SaRAAdamW([{"params": [("a.weight", alone)], "density": 0.3}], **options)
    for step in range(4):
        x = draw(step, 9, 70)
        model["b"](model["a"](x).tanh()).square().sum().backward()
        nn.functional.linear(nn.functional.linear(x, alone).tanh(), alone).square().sum().backward()
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    assert len(optimizer.state) == 1
    assert torch.equal(model["a"].weight, alone)
    assert model["b"].weight is model["a"].weight


def test_the_seed_decides_which_matrix_is_drawn():
    def moved(seed: int) -> list[bool]:
        params = [nn.Parameter(draw(i, 70, 70)) for i in range(4)]
        run(lo.SaRAAdamW(params, density=0.3, low_rank_weight=0.5, seed=seed, lr=1e-2), params, range(1))
        plain = [nn.Parameter(draw(i, 70, 70)) for i in range(4)]
        run(lo.SaRAAdamW(plain, density=0.3, seed=seed, lr=1e-2), plain, range(1))
        return [not torch.equal(a, b) for a, b in zip(params, plain, strict=True)]

    found = [moved(seed) for seed in range(6)]
    assert all(sum(each) == 1 for each in found)
    assert len({each.index(True) for each in found}) > 1
    assert moved(3) == found[3]


BAD = [
    ({"threshold": 0.1, "density": 0.5}, "threshold is 0.1 and density 0.5, which both"),
    ({"threshold": 0.1, "rank": 4}, "threshold is 0.1 and rank 4, which both"),
    ({"threshold": 0.0}, "threshold is 0.0; it must be None, or a number above 0"),
    ({"threshold": -1.0}, "threshold is -1.0"),
    ({"threshold": float("nan")}, "threshold is nan"),
    ({"threshold": True}, "threshold is True"),
    ({"shrink_at": 0}, "shrink_at is 0; it must be None, or an int of at least 1"),
    ({"shrink_at": 2.5}, "shrink_at is 2.5"),
    ({"shrink_at": 3, "update_proj_gap": 4}, "shrink_at is 3 and update_proj_gap 4"),
    ({"low_rank_weight": -1e-3}, "low_rank_weight is -0.001; it must be a finite number of at least 0"),
    ({"low_rank_weight": float("inf")}, "low_rank_weight is inf"),
    ({"projector": "svd"}, "projector is 'svd', but SaRAAdamW"),
    ({"coordinates": "rows"}, "coordinates is 'rows', but SaRAAdamW"),
    ({"cautious": True}, "cautious or cautious_decay is True; they are for whole matrices"),
    ({"on_refresh": "keep"}, "on_refresh is 'keep', but projector='smallest_weights' drops entries"),
    ({"basis_bits": 8}, "basis_bits is 8, but projector='smallest_weights' stores no basis"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        lo.SaRAAdamW([nn.Parameter(draw(0, 24, 16))], **options)


def test_bad_groups_and_edits_are_refused():
    param = nn.Parameter(draw(0, 24, 16))
    with pytest.raises(ValueError, match="projector is 'svd' in a group, but SaRAAdamW"):
        lo.SaRAAdamW([{"params": [param], "rank": 4, "projector": "svd"}])
    with pytest.raises(ValueError, match="which both say how many"):
        lo.SaRAAdamW([{"params": [param], "density": 0.1}], threshold=0.1)
    model = lo.nn.quantize_weights_(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="is stored in 8 bits"):
        lo.SaRAAdamW(lo.param_groups(model, density=0.1))
    for name in ("smallest_weights:-1", "smallest_weights:0.1,0.2", "smallest_weights:shrink"):
        with pytest.raises(ValueError, match="is no variant of smallest_weights"):
            lo.LowRankOptimizer([param], rule="adam", density=0.1, projector=name, on_refresh="rotate")
    optimizer = lo.SaRAAdamW([param], density=0.1)
    run(optimizer, [param], range(1))
    optimizer.param_groups[0]["density"] = 0.2
    with pytest.raises(ValueError, match=r"optimizer.change_group\(0, density=0.2\)"):
        run(optimizer, [param], range(1))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "a", None], ids=str)
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_an_edited_low_rank_weight_is_checked_before_anything_changes(value, in_backward):
    params = [nn.Parameter(draw(i, 70, 80)) for i in range(2)]
    optimizer = lo.SaRAAdamW([{"params": [p]} for p in params], density=0.1, low_rank_weight=0.1)
    if in_backward:
        lo.update_in_backward(optimizer)
    before = [p.detach().clone() for p in params]

    def step() -> None:
        sum((p * (i + 1)).sum() for i, p in enumerate(params)).backward()
        optimizer.step()

    optimizer.param_groups[1]["low_rank_weight"] = value
    with pytest.raises(
        ValueError, match=r"low_rank_weight is .* in param group 1, which was edited; it must be a finite"
    ):
        step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 0
    optimizer.param_groups[1]["low_rank_weight"] = torch.tensor(0.2)
    step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_checkpoint_of_another_threshold_is_refused_and_changes_nothing():
    saved, own = (lo.SaRAAdamW([nn.Parameter(draw(0, 24, 16))], threshold=tau) for tau in (0.4, 0.5))
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=r"projector is 'smallest_weights:0.4' in the checkpoint"):
        own.load_state_dict(saved.state_dict())
    assert torch.equal(own.state_dict()["state"][0]["indices"], before["state"][0]["indices"])


def test_a_density_may_change_in_mid_training():
    param = nn.Parameter(draw(0, 24, 16))
    optimizer = lo.SaRAAdamW([param], density=0.1)
    run(optimizer, [param], range(3))
    optimizer.change_group(0, density=0.5)
    run(optimizer, [param], range(3, 5))
    assert optimizer.state[param]["exp_avg"].shape == (192, 1)


def test_state_bytes_are_those_of_the_formula_and_of_the_plan():
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64))
    optimizer = lo.SaRAAdamW(lo.param_groups(model, density=0.1), shrink_at=5)
    entries, vectors = sum(int(0.1 * model[i].weight.numel()) for i in (0, 1)), 128 + 64
    expected = {
        "exp_avg": 4 * (entries + vectors),
        "exp_avg_sq": 4 * (entries + vectors),
        "indices": 4 * entries,
        "limit": 2 * 4,
        "last_refresh": 2 * 8,
        "step": 4 * 4,
    }
    assert lo.state_bytes(optimizer) == dict(sorted(expected.items()))
    choice = ("sara", {"density": 0.1, "shrink_at": 5})
    memory = lo.plan(model, choice, example_batch=torch.zeros(4, 96), device="cpu")
    assert memory.optimizer_state_bytes == sum(expected.values())
    assert (memory.state["moments"], memory.state["basis"]) == (8 * (entries + vectors), 4 * entries)


def test_a_plan_with_a_threshold_counts_all_entries():
    model = nn.Sequential(nn.Linear(96, 128, bias=False))
    choice = ("SaRAAdamW", {"density": 1.0, "threshold": 1e-3})
    memory = lo.plan(model, choice, example_batch=torch.zeros(4, 96), device="cpu")
    assert (memory.state["moments"], memory.state["basis"]) == (8 * 96 * 128, 4 * 96 * 128)
    param = nn.Parameter(torch.empty(96, 128, device="meta"))
    assert lo.SaRAAdamW([param], threshold=1e-3).state[param]["indices"].numel() == 96 * 128


def test_describe_shows_chosen_entries():
    model = nn.Sequential(nn.Linear(24, 16))
    shown = lo.describe(lo.SaRAAdamW(lo.param_groups(model, density=1.0), threshold=2e-3))
    assert "entries (|w| < 0.002)" in shown
    assert "in turn" not in shown
