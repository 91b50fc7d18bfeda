"""Training of sparse plus low-rank layers: state in few bits, updates in backward, compiled models, transformers and back."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

SIZES = (96, 256, 160)
"""Wide enough that factors and values have 4,096 elements, from which moments are stored in few bits."""
RANK, DENSITY = 48, 0.2


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.GELU(), nn.Linear(SIZES[1], SIZES[2], bias=False))
    return lo.nn.sltrain_(model.to(dtype), rank=RANK, density=DENSITY, alpha=24, init="fresh", include=["0", "2"])


def loss_of(model: nn.Module, part: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, SIZES[0], generator=generator), torch.randn(64, SIZES[2], generator=generator)
    dtype = next(model.parameters()).dtype
    return (model(x[part].to(dtype)) - y[part].to(dtype)).float().square().mean()


def adam(model: nn.Module, **options: object) -> lo.LowRankOptimizer:
    groups = lo.param_groups(model, rank=None, weight_decay=0.1)
    return lo.LowRankOptimizer(groups, rule="adam", lr=3e-3, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_and_values_have_moments_in_few_bits(bits):
    exact, model = build(), build()
    expected = train(exact, adam(exact), 30)
    optimizer = adam(model, state_bits=bits)
    found = train(model, optimizer, 30)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        if name.endswith("bias"):
            assert state["exp_avg"].dtype == torch.float32
            continue
        assert param.numel() >= 4096
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].dtype in (torch.int8, torch.uint8)
            assert state[moment].numel() == math.ceil(param.numel() * bits / 8)
            scales = 1 if param.dim() == 1 else param.shape[0]
            blocks = scales * math.ceil(param.numel() / scales / 256)
            assert state[f"{moment}_scale"].numel() == blocks
    assert expected[-1] < 0.6 * expected[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.02 if bits == 8 else 0.1)
    assert found != expected


@pytest.mark.parametrize("bits", [32, 8])
def test_updates_in_backward_with_accumulation_are_those_of_ordinary_steps(bits):
    models = [build(), build()]
    for model, in_backward in zip(models, (False, True), strict=True):
        optimizer = adam(model, state_bits=bits)
        handle = lo.update_in_backward(optimizer, accumulate=2) if in_backward else None
        for _ in range(3):
            for part in (slice(0, 24), slice(24, 64)):
                (loss_of(model, part) / 2).backward()
            if handle is not None:
                assert all(param.grad is None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    start = build()
    for name, param in models[0].named_parameters():
        ours = models[1].get_parameter(name)
        torch.testing.assert_close(ours, param, atol=1e-6, rtol=1e-5, msg=name)
        assert not torch.equal(param, start.get_parameter(name)), name


@pytest.mark.parametrize("state_bits", [4, 8])
def test_training_in_bfloat16_with_few_bits_resumes_to_the_bit(state_bits):
    options = {"state_bits": state_bits, "stochastic_rounding": True}
    whole, half = build(torch.bfloat16), build(torch.bfloat16)
    train(whole, adam(whole, **options), 6)
    optimizer = adam(half, **options)
    train(half, optimizer, 3)
    model, state = copy.deepcopy(half.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = build(torch.bfloat16)
    resumed.load_state_dict(model, strict=True)
    optimizer = adam(resumed, **options)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, 3)
    for name, param in whole.named_parameters():
        assert torch.equal(param, resumed.get_parameter(name)), name


def test_a_compiled_model_trains_as_the_model_itself():
    plain, compiled = build(), build()
    expected = train(plain, adam(plain), 4)
    found = train(torch.compile(compiled, backend="aot_eager"), adam(compiled), 4)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), param, atol=1e-5, rtol=1e-4, msg=name)


def test_columns_with_a_trained_scale_learn_and_keep_their_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.GELU(), nn.Linear(SIZES[1], SIZES[2]))
    options = {"rank": 16, "density": 0.1, "support": "columns", "trainable_scaling": True, "init": "fresh"}
    lo.nn.sltrain_(model, include=["0", "2"], **options)
    columns = [model[i].sparse_columns.clone() for i in (0, 2)]
    assert [len(each) for each in columns] == [max(1, round(0.1 * n)) for n in (96, 256)]
    assert [model[i].sparse_value.numel() for i in (0, 2)] == [10 * 256, 26 * 160]
    losses = train(model, adam(model), 20)
    assert losses[-1] < 0.93 * losses[0], losses
    assert all(torch.equal(model[i].sparse_columns, old) for i, old in zip((0, 2), columns, strict=True))
    other = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.GELU(), nn.Linear(SIZES[1], SIZES[2]))
    lo.nn.sltrain_(other, include=["0", "2"], seed=5, **options)
    assert not torch.equal(other[0].sparse_columns, columns[0])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other[0].sparse_columns, columns[0])
    assert loss_of(other).item() == loss_of(model).item()


def test_one_column_is_the_least_of_lost():
    model = nn.Sequential(nn.Linear(40, 24))
    lo.nn.sltrain_(model, rank=4, density=1e-4, support="columns", init="fresh", include="0")
    assert model[0].sparse_columns.numel() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_model_of_transformers_is_saved_and_read_as_any_other(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    lo.nn.sltrain_(model, rank=8, density=0.05, alpha=8, init="fresh")
    tokens = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None), rule="adam", lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=tokens).logits
        lo.nn.merge_(model)
        merged = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path)
        read = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        logits = read(input_ids=tokens).logits
    assert [type(module).__name__ for module in read.model.layers[0].mlp.children()][:3] == 3 * ["Linear"]
    assert torch.equal(logits, merged)
    assert trained.float().std() > 0.05
    if dtype == torch.float32:
        torch.testing.assert_close(merged, trained, atol=1e-5, rtol=1e-4)
    else:
        assert (merged - trained).float().norm() < 0.02 * trained.float().norm()
