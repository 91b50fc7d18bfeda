"""BAdam: whose turn it is, that a visit is K steps of a new AdamW on one block, masters, and that a resume is exact."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import lowrank_optim as lo
from lowrank_optim.optimizers.layer_sampling import ORDERS, block_of_visit
from tests.optimizers.test_lisa import (
    HIDDEN,
    LAYERS,
    assert_same,
    assert_same_state,
    backward,
    build_model,
    of_layers,
    train,
)
from tests.oracles.checkpoints import resumed_runs


def build(model: nn.Module, **options) -> lo.BAdamW:
    named = {name: options.pop(name) for name in ("rank", "always_on", "as_layers") if name in options}
    groups = lo.layer_groups(model, weight_decay=options.pop("weight_decay", 0.1), **named)
    return lo.BAdamW(groups, **{"lr": 1e-2, "period": 3, "seed": 5, **options})


# Turns ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("period", [1, 3])
def test_every_block_gets_exactly_k_steps_in_each_visit_the_first_one_too(order, period):
    model = build_model()
    awake = train(model, build(model, order=order, period=period), 0, 2 * LAYERS * period)
    assert {len(layers) for layers in awake} == {1}
    visits = [awake[i : i + period] for i in range(0, len(awake), period)]
    assert all(visit == [visit[0]] * period for visit in visits)
    blocks = [visit[0][0] for visit in visits]
    if order != "fixed":  # each block once in each round
        assert sorted(blocks[:LAYERS]) == sorted(blocks[LAYERS:]) == list(range(LAYERS))


@pytest.mark.parametrize(
    ("order", "start", "expected"),
    [
        ("ascending", None, [0, 1, 2, 3, 0, 1]),
        ("ascending", 2, [2, 3, 0, 1, 2, 3]),
        ("descending", None, [3, 2, 1, 0, 3, 2]),
        ("descending", 1, [1, 0, 3, 2, 1, 0]),
        ("fixed", None, [0] * 6),
        ("fixed", 2, [2] * 6),
    ],
)
def test_orders_go_round_from_the_start_block(order, start, expected):
    model = build_model(layers=4)
    optimizer = build(model, order=order, start_block=start, period=2)
    assert [layers[0] for layers in train(model, optimizer, 0, 12)[::2]] == expected


def test_random_rounds_are_different_permutations_and_begin_at_the_start_block():
    rounds = [[block_of_visit("random", 6 * i + j, 6, None, 0) for j in range(6)] for i in range(500)]
    assert all(sorted(blocks) == list(range(6)) for blocks in rounds)
    assert len({tuple(blocks) for blocks in rounds}) > 300  # of 720
    first = [blocks[0] for blocks in rounds]
    assert all(abs(first.count(block) - 500 / 6) < 35 for block in range(6))
    started = [block_of_visit("random", j, 6, 4, 0) for j in range(12)]
    assert started[0] == 4
    assert started[1:6] == [block for block in rounds[0] if block != 4]
    assert started[6:] == rounds[1]
    assert rounds[0] != [block_of_visit("random", j, 6, None, 1) for j in range(6)]


def test_categories_can_be_blocks():
    model = build_model(layers=2)
    optimizer = build(model, always_on=(), as_layers=("embeddings", "head"), order="ascending", period=1)
    assert optimizer.layers == [0, 1, 2, 3]
    assert of_layers(optimizer, [0]) == [model.embed.weight]
    assert of_layers(optimizer, [3]) == [model.lm_head.weight]
    before = model.norm.weight.detach().clone()
    assert train(model, optimizer, 0, 5) == [[0], [1], [2], [3], [0]]
    assert torch.equal(model.norm.weight, before)


# One visit ------------------------------------------------------------------------------------------------------------------------


def transcription(
    model: nn.Module, blocks: list[list[nn.Parameter]], order: list[int], period: int, steps: int
) -> None:
    """Algorithm 1 of the paper with AdamW, written down once more: float64, one parameter after the other."""
    lr, (beta1, beta2), eps, decay = 1e-2, (0.9, 0.999), 1e-8, 0.1
    for visit in range(steps // period):
        params = blocks[order[visit]]
        m, v = ([torch.zeros_like(p, dtype=torch.float64) for p in params] for _ in range(2))
        for k in range(1, period + 1):
            model.zero_grad()
            backward(model, visit * period + k - 1)
            with torch.no_grad():
                for i, param in enumerate(params):
                    gradient = param.grad.double()
                    m[i] = beta1 * m[i] + (1 - beta1) * gradient
                    v[i] = beta2 * v[i] + (1 - beta2) * gradient**2
                    step = (m[i] / (1 - beta1**k)) / ((v[i] / (1 - beta2**k)).sqrt() + eps)
                    shrink = 1 - lr * decay if param.ndim > 1 else 1.0  # biases and norms do not decay
                    param.copy_(shrink * param - lr * step)


def test_training_equals_the_algorithm_of_the_paper():
    model, other = build_model(torch.float64, layers=4), build_model(torch.float64, layers=4)
    optimizer = build(model, always_on=(), order="random", period=3)
    order = [layers[0] for layers in train(model, optimizer, 0, 27)[::3]]
    blocks = [list(layer.parameters()) for layer in other.layers]
    transcription(other, blocks, order, 3, 27)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=name)
    assert torch.equal(model.embed.weight, build_model(torch.float64, layers=4).embed.weight)
    assert not torch.equal(model.layers[0].up.weight, build_model(torch.float64, layers=4).layers[0].up.weight)


def test_only_the_block_changes_and_the_state_is_the_block_s_to_the_byte():
    model = build_model()
    optimizer = build(model, always_on=("head",), period=2, weight_decay=0.5)
    for step in range(9):
        before = [p.detach().clone() for p in model.parameters()]
        trained = set(of_layers(optimizer, [None, *optimizer.awake]))
        assert model.lm_head.weight in trained
        assert sum(lo.state_bytes(optimizer).values()) == sum(8 * p.numel() + 4 for p in trained)
        backward(model, step)
        assert {p for p in model.parameters() if p.grad is not None} == trained
        optimizer.step()
        optimizer.zero_grad()
        changed = {p for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
        assert changed == trained


def test_moments_start_anew_on_each_visit_also_of_the_same_block():
    model = build_model(layers=1)
    blocks = lo.layer_groups(model, layers=["layers.0"])
    optimizer = lo.BAdamW(blocks, lr=1e-2, period=2)
    weight = model.layers[0].up.weight
    steps = []
    for step in range(6):
        steps.append(int(optimizer.state[weight]["step"]))
        assert bool(optimizer.state[weight]["exp_avg"].any()) == (step % 2 == 1)
        train(model, optimizer, step, step + 1)
    assert steps == [0, 1, 0, 1, 0, 1]
    # What is always on goes on, and so does a fixed block.
    assert optimizer.state[model.lm_head.weight]["step"] == 6
    model = build_model()
    optimizer = build(model, order="fixed", period=2)
    train(model, optimizer, 0, 5)
    assert optimizer.state[model.layers[0].up.weight]["step"] == 5


def test_low_rank_blocks_have_low_rank_state_and_learn():
    model = build_model()
    optimizer = build(model, rank=4, residual="sgd", period=2)
    losses = []
    for step in range(60):
        (layer,) = optimizer.awake
        assert optimizer.state[model.layers[layer].up.weight]["exp_avg"].shape == (HIDDEN, 4)
        losses.append(float(backward(model, step % 4)))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


# Masters --------------------------------------------------------------------------------------------------------------------------


def test_masters_are_the_float32_run_rounded():
    """Gradients that do not depend on the weights: the bfloat16 model follows the float32 one for a whole visit."""
    model = build_model(torch.bfloat16)
    optimizer = build(model, master_weights=True, period=8, lr=1e-4, order="ascending")
    block = model.layers[0]
    copies = [nn.Parameter(p.detach().float()) for p in block.parameters()]
    decayed = [p for p in copies if p.ndim > 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in copies if p.ndim < 2], "weight_decay": 0.0}],
        lr=1e-4,
    )
    plain = [p.detach().clone() for p in block.parameters()]
    for step in range(7):
        generator = torch.Generator().manual_seed(step)
        for param, copy in zip(block.parameters(), copies, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            copy.grad = param.grad.float()
        optimizer.step()
        reference.step()
    for param, copy, old in zip(block.parameters(), copies, plain, strict=True):
        master = optimizer.state[param]["master"]
        torch.testing.assert_close(master, copy.detach(), rtol=1e-6, atol=1e-8)
        assert torch.equal(param, master.bfloat16())
        assert not torch.equal(master, old.float())


def test_small_steps_are_lost_without_masters_and_kept_with_them():
    moved = {}
    for masters in (False, True):
        model = build_model(torch.bfloat16)
        before = model.layers[0].up.weight.detach().clone()
        optimizer = build(model, master_weights=masters, period=50, lr=2e-5, order="ascending", weight_decay=0.0)
        for _ in range(49):
            for param in model.layers[0].parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        large = before.abs() > 0.05  # where 2e-5 is far below half a unit in the last place
        moved[masters] = (model.layers[0].up.weight - before)[large].float()
    assert not moved[False].any()
    torch.testing.assert_close(moved[True].mean(), torch.tensor(-49 * 2e-5), rtol=0.1, atol=0)


@pytest.mark.parametrize("rank", [None, 4])
def test_masters_are_state_of_the_block_and_go_with_it(rank):
    model = build_model(torch.bfloat16)
    optimizer = build(model, rank=rank, master_weights=True, period=2, always_on="final_norm")
    for step in range(6):
        trained = of_layers(optimizer, [None, *optimizer.awake])
        assert set(optimizer.state) == set(trained)
        assert all(optimizer.state[p]["master"].dtype == torch.float32 for p in trained)
        assert lo.state_bytes(optimizer)["master"] == sum(4 * p.numel() for p in trained)
        before = [p.detach().clone() for p in trained]
        backward(model, step)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True) if a.ndim > 1)


def test_masters_do_not_undo_weights_that_were_changed_from_outside():
    model = build_model(torch.bfloat16)
    optimizer = build(model, master_weights=True, period=9, order="ascending", weight_decay=0.0)
    weight = model.layers[0].up.weight
    train(model, optimizer, 0, 2)
    kept = optimizer.state[weight]["master"].clone()
    with torch.no_grad():
        weight[0].fill_(3.0)
    backward(model, 2)
    for param in model.parameters():
        param.grad = None if param.grad is None else torch.zeros_like(param)
    optimizer.step()
    master = optimizer.state[weight]["master"]
    assert (weight[0] - 3.0).abs().max() < 0.1
    assert (master[1:] - kept[1:]).abs().max() < 0.02  # unrounded, moved by momentum only
    assert not torch.equal(master[1:], master[1:].bfloat16().float())


def test_float32_models_need_no_masters():
    optimizer = build(build_model(), master_weights=True)
    assert "master" not in lo.state_bytes(optimizer)


@pytest.mark.parametrize("rank", [None, 4])
def test_updates_in_backward_give_the_same_weights_to_the_bit_with_masters(rank):
    model, other = build_model(torch.bfloat16), build_model(torch.bfloat16)
    options = {"rank": rank, "master_weights": True, "update_proj_gap": 2}
    usual, optimizer = build(model, **options), build(other, **options)
    with lo.update_in_backward(optimizer):
        for step in range(10):
            backward(other, step)
            assert all(param.grad is None for param in other.parameters())
            optimizer.step()
            train(model, usual, step, step + 1)
            assert_same(model, other)


def test_masters_are_used_by_updates_from_accumulated_projections():
    """Matrices that keep only R between micro-batches are updated through their masters too."""
    model = build_model(torch.bfloat16)
    optimizer = build(model, rank=4, master_weights=True, period=4, order="fixed", scale=0.01, lr=1e-3)
    weight = model.layers[0].up.weight
    with lo.update_in_backward(optimizer, accumulate=2):
        for micro_batch in range(6):
            backward(model, micro_batch)
            if micro_batch % 2:
                optimizer.step()
    master = optimizer.state[weight]["master"]
    assert torch.equal(weight, master.bfloat16())
    assert not torch.equal(master, master.bfloat16().float())


# Checkpoints ----------------------------------------------------------------------------------------------------------------------

RESUMES = [
    {"order": order, "start_block": start, **extra}
    for order, start in (*((order, None) for order in ORDERS), ("random", 2), ("fixed", 3))
    for extra in ({}, {"rank": 4, "update_proj_gap": 2}, {"master_weights": True, "dtype": torch.bfloat16})
]


def start(options: dict) -> tuple[nn.Module, lo.BAdamW, LambdaLR]:
    options = dict(options)
    model = build_model(options.pop("dtype", torch.float32), layers=4)
    optimizer = build(model, period=3, **options)
    return model, optimizer, LambdaLR(optimizer, lambda step: 0.95**step)


def run_resumes(mode: str, folder: Path) -> None:
    """One run of the test below: the first 10 steps, the rest from a checkpoint, or all 26."""
    for number, options in enumerate(RESUMES):
        model, optimizer, scheduler = start(options)
        done = 0
        if mode == "second":
            saved = torch.load(folder / f"first-{number}", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            done = 10
        awake = train(model, optimizer, done, 10 if mode == "first" else 26, scheduler)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        content = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**content, "awake": awake}, folder / f"{mode}-{number}")


@pytest.mark.long
def test_resume_in_the_middle_of_a_visit_is_exact_in_a_fresh_process(tmp_path):
    assert len(list(resumed_runs(__name__, tmp_path, RESUMES))) == len(RESUMES)


def test_loading_a_checkpoint_of_another_block_switches_to_it():
    model, other = build_model(torch.bfloat16), build_model(torch.bfloat16)
    optimizer = build(model, order="ascending", master_weights=True)
    train(model, optimizer, 0, 7)
    fresh = build(other, order="descending", master_weights=True)
    assert (optimizer.awake, fresh.awake) == ([2], [LAYERS - 1])
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.awake == [2]
    assert {p for p in other.parameters() if p.requires_grad} == set(fresh.state)
    assert_same_state(optimizer, fresh)
    assert train(model, optimizer, 7, 20) == train(other, fresh, 7, 20)
    assert_same(model, other)


def test_a_checkpoint_without_masters_does_not_fit_and_changes_nothing():
    model = build_model(torch.bfloat16)
    optimizer = build(model, master_weights=True)
    flags, awake = [p.requires_grad for p in model.parameters()], optimizer.awake
    saved = build(build_model(torch.bfloat16), seed=9).state_dict()
    with pytest.raises(ValueError, match=r"master_weights is False in the checkpoint, True here"):
        optimizer.load_state_dict(saved)
    assert (flags, awake) == ([p.requires_grad for p in model.parameters()], optimizer.awake)


# Bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "up"}, r"order is 'up'; valid values are 'random', 'ascending', 'descending', 'fixed'"),
        ({"period": 0}, r"period is 0; it must be an int of at least 1"),
        ({"start_block": 8}, r"start_block is 8; the layers are 0, 1, 2, 3, 4, 5, 6, 7"),
        ({"master_weights": 1}, r"master_weights is 1; it must be True or False"),
        (
            {"master_weights": True, "stochastic_rounding": True},
            r"master_weights and stochastic_rounding are both True",
        ),
    ],
)
def test_values_out_of_range_raise_and_leave_the_model_as_it_was(options, message):
    model = build_model()
    with pytest.raises(ValueError, match=message):
        build(model, **options)
    assert all(param.requires_grad for param in model.parameters())


def test_groups_without_layers_raise():
    with pytest.raises(ValueError, match=r"BAdamW trains some layers at a time, but no group has a layer"):
        lo.BAdamW(lo.param_groups(build_model(), rank=None))


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(importlib.import_module("lowrank_optim.optimizers.badam")).failed == 0
