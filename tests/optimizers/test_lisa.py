"""LISA: which layers are drawn, what state there is, that sleeping layers stand still, and that a resume is exact."""

import copy
import doctest
import importlib
import io
import itertools
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lowrank_optim as lo
from lowrank_optim.optimizers.layer_sampling import draw_layers
from tests.oracles.checkpoints import one_thread, resumed_runs
from tests.oracles.processes import Child

WIDTH, HIDDEN, VOCABULARY, LAYERS = 32, 48, 40, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """A residual network with the parts of a language model."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def build_model(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Model:
    torch.manual_seed(0)
    return Model(layers).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    """The gradients of a batch that is a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    logits = model(tokens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, tokens.roll(1, 1).flatten())
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int, scheduler=None) -> list[list[int]]:
    """Train; returns the layers that were awake in each step."""
    awake = []
    for step in range(start, stop):
        awake.append(getattr(optimizer, "awake", []))
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return awake


def build(model: nn.Module, **options) -> lo.LISAAdamW:
    size = {"rank": options.pop("rank", None)}
    groups = lo.layer_groups(model, **size, weight_decay=options.pop("weight_decay", 0.1))
    return lo.LISAAdamW(groups, **{"lr": 1e-2, "period": 3, "seed": 5, **options})


def of_layers(optimizer: torch.optim.Optimizer, layers: list[int | None]) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups if group["layer"] in layers for p in group["params"]]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def assert_same_state(a: lo.LowRankOptimizer, b: lo.LowRankOptimizer) -> None:
    saved, other = a.state_dict(), b.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    assert saved["state"].keys() == other["state"].keys()
    for key, state in saved["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other["state"][key][name]), (key, name)
            assert tensor.dtype == other["state"][key][name].dtype


# The draw -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_uniform_draws_are_distinct_and_every_set_is_as_probable():
    counts = Counter(tuple(draw_layers(3, period, 5, 2)) for period in range(4_000))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    # χ² with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 27.9


@pytest.mark.long
def test_weighted_draws_have_the_probabilities_of_drawing_one_after_another():
    weights = [1.0, 2.0, 0.0, 5.0]
    counts = Counter(tuple(draw_layers(3, period, 4, 2, weights)) for period in range(4_000))
    total = sum(weights)
    expected = {
        (i, j): 4_000 * weights[i] * weights[j] / total * (1 / (total - weights[i]) + 1 / (total - weights[j]))
        for i, j in itertools.combinations((0, 1, 3), 2)
    }
    assert set(counts) == set(expected)  # weight 0 is never drawn
    # Two degrees of freedom: 13.8 once in a thousand.
    assert sum((counts[pair] - mean) ** 2 / mean for pair, mean in expected.items()) < 13.8


@pytest.mark.long
def test_draws_of_successive_periods_are_independent():
    draws = [draw_layers(0, period, 4, 1)[0] for period in range(3_201)]
    pairs = Counter(itertools.pairwise(draws))
    assert sum((pairs[i, j] - 200) ** 2 / 200 for i in range(4) for j in range(4)) < 37.7  # 15 degrees of freedom
    others = [draw_layers(1, period, 4, 1)[0] for period in range(3_201)]
    assert abs(sum(a == b for a, b in zip(draws, others, strict=True)) - 800) < 100


def test_the_draw_does_not_touch_or_depend_on_torch_generators():
    sequences = []
    for seed in (1, 2):
        model = build_model()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer = build(model)
        for step in range(9):
            sequences.append((seed, optimizer.awake))
            for param in model.parameters():
                param.grad = torch.ones_like(param) if param.requires_grad else None
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), before), step
    one, two = ([awake for seed, awake in sequences if seed == which] for which in (1, 2))
    assert one == two
    assert len({tuple(awake) for awake in one}) > 1


def draws(seed: int) -> list[list[list[int]]]:
    """The layers of 13 steps, whatever torch's own generator is set to."""
    models = [build_model() for _ in range(2)]
    torch.manual_seed(seed)
    return [
        train(model, build(model, sampling=sampling), 0, 13)
        for model, sampling in zip(models, ("uniform", "weight_norm"), strict=True)
    ]


def print_draws(seed: int) -> None:
    print(draws(seed))  # noqa: T201


@pytest.mark.long
def test_two_processes_draw_the_same_layers(tmp_path):
    """With other hashes, too: in the resumed runs below."""
    with torch.random.fork_rng(), one_thread():
        drawn = draws(seed=1)
    assert Child(tmp_path / "drawn", print_draws, 2).finish() == f"{drawn}\n"
    assert [len(awake) for awake in drawn] == [13, 13]


def test_a_draw_lasts_exactly_one_period_and_has_active_layers_layers():
    model = build_model()
    awake = train(model, build(model, active_layers=3, period=4), 0, 24)
    periods = [awake[i : i + 4] for i in range(0, 24, 4)]
    assert all(period == [period[0]] * 4 for period in periods)
    assert {len(layers) for layers in awake} == {3}
    expected = [draw_layers(5, period, LAYERS, 3) for period in range(6)]
    assert [period[0] for period in periods] == expected
    assert len({tuple(layers) for layers in expected}) > 3


def test_weight_norm_prefers_layers_with_large_weights():
    model = build_model()
    with torch.no_grad():
        for param in model.layers[6].parameters():
            param.mul_(1e6)
    optimizer = build(model, sampling="weight_norm", active_layers=1, period=1, lr=0.0)
    drawn = [layers[0] for layers in train(model, optimizer, 0, 20)]
    assert drawn == [6] * 20


def test_a_function_gives_the_weights_of_the_draw():
    seen = []

    def importance(layer: int, params: list[Tensor]) -> float:
        seen.append((layer, len(params)))
        return float(layer in (2, 5))

    model = build_model()
    optimizer = build(model, sampling=importance, active_layers=2)
    assert optimizer.awake == [2, 5]
    assert seen == [(layer, 6) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda layer, params: -1.0, r"\[-1\.0.*must be 8 finite numbers of at least 0"),
        (lambda layer, params: float("nan"), r"must be 8 finite numbers"),
        (lambda layer, params: float(layer == 0), r"only 1 layers have a positive weight, 2 are drawn"),
    ],
)
def test_weights_that_cannot_be_drawn_by_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        build(build_model(), sampling=weights)


# Memory ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_and_gradients_are_those_of_the_active_and_always_on_layers_to_the_byte(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM  # not at the top: the subprocesses here need none

    config = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=8, num_key_value_heads=4)).to(dtype)
    optimizer = lo.LISAAdamW(lo.layer_groups(model), lr=1e-3, active_layers=2, period=2, seed=1)
    always = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    seen = set()
    for step in range(7):
        awake = optimizer.awake
        seen |= set(awake)
        trained = always + [p for layer in awake for p in model.model.layers[layer].parameters()]
        elements = sum(p.numel() for p in trained)
        # Two fp32 moments and a 4-byte step.
        assert sum(lo.state_bytes(optimizer).values()) == 8 * elements + 4 * len(trained)
        assert set(optimizer.state) == set(trained)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        size = 2 if dtype == torch.bfloat16 else 4
        assert sum(g.numel() * g.element_size() for g in gradients) == size * elements
        optimizer.step()
        # After a switch only what is still trained may hold a gradient.
        assert {p for p in model.parameters() if p.grad is not None} <= set(optimizer.state)
        if step % 2 == 0:
            optimizer.zero_grad()
    assert len(seen) > 4


def test_low_rank_layers_have_low_rank_state_while_they_are_awake():
    model = build_model()
    optimizer = build(model, rank=4, active_layers=1, period=2, seed=2)
    for step in range(5):
        (layer,) = optimizer.awake
        block = model.layers[layer]
        assert optimizer.state[block.up.weight]["exp_avg"].shape == (HIDDEN, 4)
        assert optimizer.state[block.up.weight]["basis"].shape == (WIDTH, 4)
        matrix = 8 * HIDDEN * 4 + 4 * WIDTH * 4 + 12
        vectors = sum(8 * p.numel() + 4 for p in block.parameters() if p.ndim == 1)
        outside = sum(8 * p.numel() + 4 for p in of_layers(optimizer, [None]))
        assert sum(lo.state_bytes(optimizer).values()) == 2 * matrix + vectors + outside
        train(model, optimizer, step, step + 1)


def test_parked_state_is_kept_and_continues():
    model = build_model()
    optimizer = build(model, active_layers=1, period=2, sleeping_state="cpu", seed=3)
    steps = dict.fromkeys(range(LAYERS), 0)
    for step in range(24):
        (layer,) = optimizer.awake
        train(model, optimizer, step, step + 1)
        steps[layer] += 1
        for number, count in steps.items():
            weight = model.layers[number].up.weight
            if count:
                assert optimizer.state[weight]["step"] == count
            else:
                assert (weight in optimizer.state) == (number in optimizer.awake)
    assert max(steps.values()) > 2


def test_freed_state_starts_anew():
    model = build_model()
    optimizer = build(model, active_layers=1, period=2, seed=3)
    before = []
    for step in range(24):
        (layer,) = optimizer.awake
        if before[-2:] != [layer] * 2 and step % 2 == 0:
            state = optimizer.state[model.layers[layer].up.weight]
            assert state["step"] == 0
            assert not state["exp_avg"].any()
        before.append(layer)
        train(model, optimizer, step, step + 1)
    assert len(set(before)) < 12  # some layer came twice


# Training -------------------------------------------------------------------------------------------------------------------------


def test_sleeping_layers_neither_change_nor_decay():
    model = build_model()
    optimizer = build(model, weight_decay=0.5)
    for step in range(12):
        before = {layer: [p.detach().clone() for p in of_layers(optimizer, [layer])] for layer in range(LAYERS)}
        awake = optimizer.awake
        train(model, optimizer, step, step + 1)
        for layer, params in before.items():
            same = [torch.equal(a, b) for a, b in zip(params, of_layers(optimizer, [layer]), strict=True)]
            assert same == [layer not in awake] * len(same)


def test_requires_grad_is_that_of_the_awake_layers_before_every_backward():
    model = build_model()
    optimizer = build(model)
    for step in range(8):
        trained = set(of_layers(optimizer, [None, *optimizer.awake]))
        assert {p for p in model.parameters() if p.requires_grad} == trained
        backward(model, step)
        assert {p for p in model.parameters() if p.grad is not None} == trained
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def test_all_layers_awake_is_adamw():
    model, other = build_model(torch.float64), build_model(torch.float64)
    optimizer = build(model, active_layers=LAYERS, betas=(0.9, 0.95))
    groups = lo.param_groups(other, rank=None, weight_decay=0.1)
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    train(model, optimizer, 0, 12)
    train(other, reference, 0, 12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_it_equals_adamw_that_is_rebuilt_for_the_drawn_layers_in_each_period():
    """The method in ten lines of torch: an AdamW for what is always on, a new one for layers that wake."""
    model, other = build_model(torch.float64), build_model(torch.float64)
    train(model, build(model, period=4, active_layers=2, weight_decay=0.0), 0, 16)
    inside = {p for layer in other.layers for p in layer.parameters()}
    always = torch.optim.AdamW([p for p in other.parameters() if p not in inside], lr=1e-2, weight_decay=0.0)
    running: dict[int, torch.optim.Optimizer] = {}
    for step in range(16):
        if step % 4 == 0:
            drawn = draw_layers(5, step // 4, LAYERS, 2)
            running = {
                layer: running.get(layer)
                or torch.optim.AdamW(other.layers[layer].parameters(), lr=1e-2, weight_decay=0.0)
                for layer in drawn
            }
        other.zero_grad()
        backward(other, step)
        for optimizer in (always, *running.values()):
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_random_subspaces_differ_between_visits():
    model = build_model(layers=2)
    optimizer = build(model, rank=4, active_layers=1, period=1, projector="coordinate", scale=1.0)
    chosen, awake = [], []
    for step in range(16):
        (layer,) = optimizer.awake
        weight = model.layers[layer].up.weight
        backward(model, step)
        optimizer.step_param(weight)
        chosen.append(tuple(optimizer.state[weight]["indices"].tolist()))
        awake.append(layer)
        optimizer.zero_grad()
        optimizer.step()
    visits = [len(list(run)) for _, run in itertools.groupby(awake)]
    assert len(visits) > 5
    assert [len(list(run)) for _, run in itertools.groupby(chosen)] == visits  # one subspace for each visit
    assert len(set(chosen)) == len(visits)


def test_a_gradient_of_a_sleeping_layer_is_dropped_with_one_warning():
    model = build_model()
    optimizer = build(model)
    model.requires_grad_(True)
    asleep = next(layer for layer in range(LAYERS) if layer not in optimizer.awake)
    before = model.layers[asleep].up.weight.detach().clone()
    backward(model, 0)
    with pytest.warns(RuntimeWarning, match=r"layers\.\d\.\S+ has a gradient, but its layer sleeps") as caught:
        optimizer.step()
    assert len(caught) == 1
    weight = model.layers[asleep].up.weight
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert not weight.requires_grad
    assert weight not in optimizer.state


def test_release_gives_the_model_back():
    model = build_model()
    build(model).release()
    assert all(param.requires_grad for param in model.parameters())
    assert len(build(model).layers) == LAYERS


@pytest.mark.parametrize(
    "combination",
    [
        {"rank": 4, "residual": "norm_scaled"},
        {"rank": 4, "residual": "sgd"},
        {"rank": 4, "on_refresh": "rotate", "update_proj_gap": 2},
        {"rank": 4, "state_bits": 8},
        {"rank": 4, "projector": "random"},
    ],
    ids=str,
)
def test_low_rank_layers_learn_with_every_part(combination):
    model = build_model()
    optimizer = build(model, **combination)
    losses = []
    for step in range(40):
        losses.append(float(backward(model, step % 4)))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


# Updates in backward --------------------------------------------------------------------------------------------------------------

IN_BACKWARD = [
    {},
    {"sleeping_state": "cpu", "sampling": "weight_norm"},
    {"rank": 4, "update_proj_gap": 2},
    {"rank": 4, "residual": "norm_scaled", "state_bits": 8},
]


@pytest.mark.parametrize("options", IN_BACKWARD, ids=str)
def test_updates_in_backward_give_the_same_weights_to_the_bit(options):
    model, other = build_model(), build_model()
    usual, optimizer = build(model, **options), build(other, **options)
    with lo.update_in_backward(optimizer):
        for step in range(14):
            assert optimizer.awake == usual.awake
            backward(other, step)
            assert all(param.grad is None for param in other.parameters())
            optimizer.step()
            optimizer.zero_grad()
            train(model, usual, step, step + 1)
    assert_same(model, other)
    assert len({tuple(optimizer.awake), *map(tuple, [draw_layers(5, k, LAYERS, 2) for k in range(5)])}) > 3


def accumulated(options: dict, stop: int, resume: dict | None = None) -> tuple[Model, lo.LISAAdamW, list[list[int]]]:
    """`stop` micro-batches, two in a step, updated in backward; from the state in `resume` if there is one."""
    model = build_model()
    optimizer = build(model, **options)
    lo.update_in_backward(optimizer, accumulate=2, max_grad_norm=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 0.95**step)
    start, awake = 0, []
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        start = resume["micro_batches"]
    for micro_batch in range(start, stop):
        awake.append(optimizer.awake)
        backward(model, micro_batch)
        if micro_batch % 2:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if resume is None and stop % 2:
        model.saved = {
            "model": copy.deepcopy(model.state_dict()),
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "scheduler": scheduler.state_dict(),
            "micro_batches": stop,
        }
    return model, optimizer, awake


@pytest.mark.parametrize("options", IN_BACKWARD[:3], ids=str)
def test_resume_within_an_accumulation_window_and_a_period_is_exact(options, tmp_path):
    whole, uninterrupted, awake = accumulated(options, 30)
    first, _, _ = accumulated(options, 9)  # one micro-batch into step 5 of 15, which is the second of its period
    torch.save(first.saved, tmp_path / "c.pt")
    resumed, optimizer, rest = accumulated(options, 30, torch.load(tmp_path / "c.pt", weights_only=True))
    assert rest == awake[9:]
    assert len({tuple(layers) for layers in rest}) > 2
    assert_same(whole, resumed)
    for one, two in zip(uninterrupted.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


# Checkpoints ----------------------------------------------------------------------------------------------------------------------

RESUMES = [
    {"sleeping_state": sleeping, "sampling": sampling, **extra}
    for sleeping in ("free", "cpu")
    for sampling in ("uniform", "weight_norm")
    for extra in ({}, {"rank": 4, "update_proj_gap": 2}, {"rank": 4, "projector": "random", "update_proj_gap": 2})
] + [{"stochastic_rounding": True, "dtype": torch.bfloat16}, {"rank": 4, "state_bits": 8, "sleeping_state": "cpu"}]


def start(options: dict, folder: Path | None, number: int) -> tuple[Model, lo.LISAAdamW, LambdaLR, int]:
    """Model, optimizer and scheduler, fresh or from the checkpoint."""
    options = dict(options)
    model = build_model(options.pop("dtype", torch.float32))
    optimizer = build(model, period=4, **options)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    done = 0
    if folder is not None:
        saved = torch.load(folder / f"first-{number}", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        done = saved["step"]
    return model, optimizer, scheduler, done


def run_resumes(mode: str, folder: Path) -> None:
    """One run of the test below: the first 10 steps, the rest from a checkpoint, or all 25."""
    for number, options in enumerate(RESUMES):
        model, optimizer, scheduler, done = start(options, folder if mode == "second" else None, number)
        stop = 10 if mode == "first" else 25
        awake = train(model, optimizer, done, stop, scheduler)
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": stop,
            "awake": awake,
        }
        torch.save(content, folder / f"{mode}-{number}")


@pytest.mark.long
def test_resume_in_the_middle_of_a_period_is_exact_in_a_fresh_process(tmp_path):
    runs = list(resumed_runs(__name__, tmp_path, RESUMES))
    assert len(runs) == len(RESUMES)
    for _, _, resumed in runs:
        assert len({tuple(awake) for awake in resumed["awake"]}) > 2, "the run after the resume must switch"


def test_loading_switches_requires_grad_and_state_to_those_of_the_checkpoint():
    model = build_model()
    optimizer = build(model, seed=5)
    train(model, optimizer, 0, 7)
    other = build_model()
    fresh = build(other, seed=6)
    assert fresh.awake != optimizer.awake
    backward(other, 0)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.awake == optimizer.awake
    trained = set(of_layers(fresh, [None, *fresh.awake]))
    assert {p for p in other.parameters() if p.requires_grad} == set(fresh.state) == trained
    assert {p for p in other.parameters() if p.grad is not None} <= trained
    assert_same_state(optimizer, fresh)
    # The seed is the checkpoint's, as every hyperparameter.
    other.zero_grad()
    assert train(model, optimizer, 7, 20) == train(other, fresh, 7, 20)
    assert_same(model, other)


def fingerprint(model: nn.Module, optimizer: lo.LowRankOptimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.requires_grad for p in model.parameters()], optimizer.awake], buffer)
    return buffer.getvalue()


def damaged(kind: str) -> dict:
    model = build_model()
    optimizer = build(model, seed=6, **({"sleeping_state": "cpu"} if kind == "sleeping_state" else {}))
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    awake = next(g for g in saved["param_groups"] if g["awake"] and g["layer"] is not None)
    asleep = next(g for g in saved["param_groups"] if not g["awake"] and g["layer"] is not None)
    if kind == "state missing":
        del saved["state"][awake["params"][0]]
    elif kind == "state besides":
        saved["state"][asleep["params"][0]] = {"step": torch.zeros(())}
    elif kind == "other layers":
        awake["layer"], asleep["layer"] = asleep["layer"], awake["layer"]
    elif kind == "badam":
        saved = lo.BAdamW(lo.layer_groups(build_model())).state_dict()
    elif kind == "adamw":
        other = build_model()
        reference = torch.optim.AdamW(lo.layer_groups(other))
        train(other, reference, 0, 1)
        saved = reference.state_dict()
    return saved


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("state missing", r"layers\.\d\.\S+ .* the checkpoint lacks exp_avg, exp_avg_sq, step"),
        ("state besides", r"layers\.\d\.\S+ .* the checkpoint has step besides"),
        ("other layers", r"group \d+: layer is \d in the checkpoint, \d here"),
        ("badam", r"layerwise is 'badam' in the checkpoint, 'lisa' here"),
        ("adamw", r"the checkpoint has exp_avg, exp_avg_sq, step besides"),
        ("sleeping_state", r"sleeping_state is 'cpu' in the checkpoint, 'free' here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(kind, message):
    model = build_model()
    optimizer = build(model, seed=5)
    train(model, optimizer, 0, 2)
    before = fingerprint(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged(kind))
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_continues_like_the_original(clone):
    model = build_model()
    optimizer = build(model, sampling="weight_norm")
    train(model, optimizer, 0, 4)
    twin_model, twin = clone((model, optimizer))
    train(model, optimizer, 4, 12)
    train(twin_model, twin, 4, 12)
    assert_same(model, twin_model)


# Bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active_layers": 9}, r"active_layers is 9, but the groups have 8 layers: 0, 1, 2, 3, 4, 5, 6, 7"),
        ({"active_layers": 0}, r"active_layers is 0; it must be an int of at least 1"),
        ({"active_layers": 1.5}, r"active_layers is 1\.5"),
        ({"period": 0}, r"period is 0; it must be an int of at least 1"),
        ({"period": True}, r"period is True"),
        ({"sampling": "norm"}, r"sampling is 'norm'; it must be 'uniform', 'weight_norm' or a function"),
        ({"sleeping_state": "disk"}, r"sleeping_state is 'disk'; valid values are 'free', 'cpu'"),
    ],
)
def test_values_out_of_range_raise_and_leave_the_model_as_it_was(options, message):
    model = build_model()
    with pytest.raises(ValueError, match=message):
        build(model, **options)
    assert all(param.requires_grad for param in model.parameters())


def test_groups_without_layers_raise_and_are_listed():
    model = build_model()
    with pytest.raises(
        ValueError, match=r"no group has a layer; .*layer_groups\(model\).*group 0: 18 parameters \(embed"
    ):
        lo.LISAAdamW(lo.param_groups(model, rank=None))
    with pytest.raises(ValueError, match=r"group 0: 52 parameters"):
        lo.LISAAdamW(model.parameters())
    assert all(param.requires_grad for param in model.parameters())


def test_settings_of_the_whole_optimizer_cannot_stand_in_a_group():
    groups = lo.layer_groups(build_model())
    groups[3]["period"] = 7
    with pytest.raises(ValueError, match=r"period is 7 in a param group, 20 in the optimizer; it cannot differ"):
        lo.LISAAdamW(groups)
    groups[3].pop("period")
    groups[3]["layer"] = "3"
    with pytest.raises(ValueError, match=r"layer is '3' in a param group; it must be an int of at least 0"):
        lo.LISAAdamW(groups)


def test_unknown_options_name_the_nearest():
    with pytest.raises(TypeError, match=r"unknown option 'active_layer'.*did you mean 'active_layers'"):
        build(build_model(), active_layer=2)


def test_groups_added_later():
    model = build_model()
    optimizer = build(model)
    train(model, optimizer, 0, 4)
    asleep = next(layer for layer in range(LAYERS) if layer not in optimizer.awake)
    new = {layer: nn.Parameter(torch.ones(3, 3)) for layer in (None, optimizer.awake[0], asleep)}
    for layer, param in new.items():
        optimizer.add_param_group({"params": [(f"new.{layer}", param)], "layer": layer})
    assert [param.requires_grad for param in new.values()] == [True, True, False]
    assert [param in optimizer.state for param in new.values()] == [True, True, False]
    assert {group["steps"] for group in optimizer.param_groups} == {4}
    before = fingerprint(model, optimizer)
    with pytest.raises(ValueError, match=r"layer is 8 in a param group .* 0, 1, 2, 3, 4, 5, 6, 7\. Build a new"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], "layer": 8})
    assert fingerprint(model, optimizer) == before
    train(model, optimizer, 4, 9)
    assert new[asleep].requires_grad == (asleep in optimizer.awake)


def test_lisa_has_a_short_name_and_is_no_plain_method():
    assert lo.by_name("lisa") is lo.LISAAdamW
    assert "lisa" not in lo.METHODS
    assert {"lisa": lo.LISAAdamW, "badam": lo.BAdamW} == lo.LAYERWISE_METHODS
    with pytest.raises(ValueError, match=r"did you mean 'lisa'"):
        lo.by_name("lisaa")


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(importlib.import_module("lowrank_optim.optimizers.lisa")).failed == 0
