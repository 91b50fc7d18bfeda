"""8-bit weights: what they are as tensors, in a model, under every optimizer, and in checkpoints."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import make_key
from lowrank_optim.nn import QuantizedWeight
from lowrank_optim.quantization import quantize_rows

RANK = 16


def make_model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 300), nn.GELU(), nn.LayerNorm(300), nn.Linear(300, 64, bias=False)).to(dtype)


def quantized_model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    model = make_model(dtype)
    lo.nn.quantize_weights_(model, include=["0", "3"])
    return model


def batch(dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(64, size, generator=generator).to(dtype) for size in (96, 64))  # type: ignore[return-value]


def loss_of(model: nn.Module, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x, y = batch(dtype, seed)
    return (model(x) - y).float().square().mean()


def groups_of(model: nn.Module, **options: object) -> list[dict]:
    return lo.param_groups(model, rank=RANK, include=["0.weight", "3.weight"], **options)


# -------------------------------------------------------------------------------------------------------------- the tensor


def test_decodes_within_half_a_level() -> None:
    weight = make_model()[0].weight.detach()
    coded = QuantizedWeight.from_float(weight)
    assert coded.codes.dtype == torch.int8
    assert coded.codes.nbytes + coded.scale.nbytes == 300 * (96 + 4)
    error = (coded.decoded(torch.float32) - weight.float()).abs()
    assert torch.all(error <= coded.scale / 254 * 1.0001)
    assert error.max() > 0


def test_clone_move_and_copy_keep_the_codes() -> None:
    weight = nn.Parameter(QuantizedWeight.from_float(make_model()[0].weight))
    for same in (weight.clone(), weight.detach(), copy.deepcopy(weight), weight.to("cpu"), weight.float().bfloat16()):
        assert isinstance(same, QuantizedWeight)
        assert torch.equal(same.codes, weight.codes)
        assert torch.equal(same.scale, weight.scale)
    assert weight.float().dtype == torch.float32
    other = copy.deepcopy(weight)
    assert isinstance(other, nn.Parameter)
    with torch.no_grad():
        other.copy_(make_model(seed=5)[0].weight)
    assert torch.equal(other.codes, quantize_rows(make_model(seed=5)[0].weight.detach(), 8, True)[0])
    assert not torch.equal(other.codes, weight.codes)


def test_reads_are_decoded() -> None:
    weight = QuantizedWeight.from_float(make_model()[0].weight)
    assert torch.equal(weight + 0, weight.decoded())
    assert torch.equal(weight[3], weight.decoded()[3])


# --------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_decoded_model(dtype: torch.dtype) -> None:
    model, plain = quantized_model(dtype), make_model(dtype)
    with torch.no_grad():
        for index in (0, 3):
            plain[index].weight.copy_(model[index].weight.decoded())
    x, _ = batch(dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for net, data in zip((model, plain), inputs, strict=True):
        net(data).float().square().mean().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert type(mine.grad) is Tensor, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_autocast_computes_in_its_type() -> None:
    model = quantized_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model[0](torch.randn(4, 96))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    model, x = quantized_model(torch.float64), torch.randn(4, 96, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        expected = nn.functional.linear(x, model[0].weight.decoded(), model[0].bias)
        torch.testing.assert_close(model[0](x), expected)


def test_gradients_accumulate() -> None:
    once, twice = quantized_model(torch.float32), quantized_model(torch.float32)
    x, y = batch(torch.float32)
    (once(x) - y).square().sum().backward()
    for part in (slice(0, 32), slice(32, 64)):
        (twice(x[part]) - y[part]).square().sum().backward()
    torch.testing.assert_close(once[0].weight.grad, twice[0].weight.grad, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- optimizers


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, seed=1 + step % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(lo.METHODS.keys() - {"sara"}))  # single entries of codes cannot be written
def test_every_method_trains_as_with_float_weights(name: str) -> None:
    method = lo.METHODS[name]
    options = {"projector": "randomized_svd"} if "frugal" in name else {}
    lr = 2e-3 if "adafactor" not in name else None
    results = []
    for model in (quantized_model(), make_model()):
        rate = {} if lr is None else {"lr": lr}
        optimizer = method(groups_of(model, update_proj_gap=5, **options), **rate)
        codes = model[0].weight.codes.clone() if isinstance(model[0].weight, QuantizedWeight) else None
        results.append(trained(model, optimizer, 24))
        if codes is not None:
            assert not torch.equal(codes, model[0].weight.codes)
    mine, theirs = (sum(result[-4:]) / 4 for result in results)
    assert mine < sum(results[0][:4]) / 4
    assert mine == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("rule", [lo.Adam(), lo.Lion(), lo.SGD(), lo.RMSprop(), lo.Adafactor()], ids=lambda r: r.name)
@pytest.mark.parametrize("bits", [32, 8])
def test_dense_training_follows_float_weights(rule: lo.Rule, bits: int) -> None:
    """Whole matrices, without a subspace: one step is that of float32 weights, up to the coding of the result."""
    coded, plain = quantized_model(torch.float32), make_model(torch.float32)
    with torch.no_grad():
        for index in (0, 3):
            plain[index].weight.copy_(coded[index].weight.decoded())
    for model in (coded, plain):
        optimizer = lo.LowRankOptimizer(model.parameters(), rule=rule, lr=1e-2, weight_decay=0.1, state_bits=bits)
        loss_of(model, dtype=torch.float32).backward()
        optimizer.step()
    for index in (0, 3):
        weight = coded[index].weight
        level = weight.scale.repeat_interleave(256, -1)[:, : weight.shape[1]] / 127
        error = (weight.decoded() - plain[index].weight).abs()
        assert torch.all(error <= level * 1.01 + 1e-5)


def test_updates_far_below_a_level_count_on_average() -> None:
    weight = torch.full((64, 256), 0.5)
    weight[:, 0] = 127.0  # a level is 1
    coded = QuantizedWeight.from_float(weight)
    assert coded.scale.unique().tolist() == [127.0]
    for step in range(200):
        change = torch.full((64, 256), 0.01)
        change[:, 0] = 0.0
        kernels.apply_dense_(coded, change, alpha=-1.0, keep=1.0, rounding_key=make_key(0, 0, step, 2))
    moved = (coded.decoded(torch.float32) - torch.round(weight))[:, 1:].double()
    # 200 steps of 0.01; a Bernoulli sum of variance ≤ 2 for each of 64·255 elements
    assert float(moved.mean()) == pytest.approx(2.0, abs=5 * (2.0 / moved.numel()) ** 0.5)


def test_zero_update_leaves_the_codes() -> None:
    coded = QuantizedWeight.from_float(torch.randn(700, 3000, generator=torch.Generator().manual_seed(0)))
    before = coded.codes.clone(), coded.scale.clone()
    kernels.apply_dense_(coded, torch.zeros(700, 3000), alpha=1.0, keep=1.0, rounding_key=3)
    assert torch.equal(before[0], coded.codes)
    assert torch.equal(before[1], coded.scale)


def test_in_parts_of_the_rows_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1 << 20, 1000):
        monkeypatch.setattr(kernels.compute, "CHUNK_ELEMENTS", elements)
        model = quantized_model(torch.float32)
        optimizer = lo.FiraAdamW(groups_of(model), lr=1e-2, weight_decay=0.1)
        loss_of(model, dtype=torch.float32).backward()
        optimizer.step()
        results.append((model[0].weight.codes, model[3].weight.codes))
    for whole, parts in zip(*results, strict=True):
        assert float((whole.int() - parts.int()).abs().float().mean()) < 1e-3


def test_in_backward_with_accumulation_trains_everything() -> None:
    whole, parts = quantized_model(), quantized_model()
    optimizers = [lo.QGaLoreAdamW8bit(groups_of(model), lr=1e-2) for model in (whole, parts)]
    for seed in (1, 2):
        (loss_of(whole, seed) / 2).backward()
    optimizers[0].step()
    with lo.update_in_backward(optimizers[1], accumulate=2):
        for seed in (1, 2):
            (loss_of(parts, seed) / 2).backward()
        assert all(param.grad is None for param in parts.parameters())
        optimizers[1].step()
    fresh = dict(quantized_model().named_parameters())
    for (name, mine), (_, theirs) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert not torch.equal(theirs.detach() + 0, fresh[name].detach() + 0), name  # norms and biases, too
        # The first basis of the second comes from its first micro-batch, so that only dense parameters agree.
        if mine.dim() == 1:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("coordinates", ["columns", "rows", "entries"])
def test_coordinates_are_refused_at_construction(coordinates: str) -> None:
    with pytest.raises(ValueError, match="stored in 8 bits"):
        lo.FrugalAdamW(groups_of(quantized_model()), lr=1e-3, coordinates=coordinates)


# -------------------------------------------------------------------------------------------------------------- checkpoints


def test_resume_is_exact_through_plain_tensors() -> None:
    def build() -> tuple[nn.Module, lo.LowRankOptimizer]:
        model = quantized_model()
        return model, lo.QGaLoreAdamW8bit(groups_of(model, update_proj_gap=3), lr=1e-3)

    straight, optimizer = build()
    trained(straight, optimizer, 10)
    model, optimizer = build()
    trained(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert {type(value) for value in saved["model"].values()} == {Tensor}
    model, optimizer = build()
    assert not torch.equal(model[0].weight.codes, saved["model"]["0.weight"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    trained(model, optimizer, 6, first=4)
    for (name, mine), (_, theirs) in zip(model.state_dict().items(), straight.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_float_checkpoint_loads_and_codes_load_into_a_float_model() -> None:
    model, other = quantized_model(), make_model(seed=7)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight.codes, quantize_rows(other[0].weight.detach(), 8, True)[0])
    saved = model.state_dict()
    lo.nn.dequantize_weights_(model)
    assert type(model[0].weight) is nn.Parameter
    model.load_state_dict(saved)
    assert torch.equal(
        model[0].weight, QuantizedWeight(saved["0.weight"], saved["0.weight_scale"], torch.bfloat16).decoded()
    )


def test_checkpoint_of_another_shape_is_refused_untouched() -> None:
    model = quantized_model()
    saved = model.state_dict()
    codes = model[0].weight.codes.clone()
    saved["0.weight"] = saved["0.weight"][:, :50]
    with pytest.raises(ValueError, match=r"0\.weight.*\(300, 50\).*\(300, 96\)"):
        model.load_state_dict(saved)
    assert torch.equal(model[0].weight.codes, codes)


# ---------------------------------------------------------------------------------------------------------------- selection


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 32, bias=False)
        self.second.weight = self.first.weight
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed.weight


def test_ties_are_kept_and_heads_and_embeddings_left() -> None:
    model = lo.nn.quantize_weights_(Tied())
    assert isinstance(model.first.weight, QuantizedWeight)
    assert model.first.weight is model.second.weight
    assert model.lm_head.weight is model.embed.weight
    assert not isinstance(model.lm_head.weight, QuantizedWeight)
    with pytest.raises(ValueError, match=r"embed\.weight of Embedding is tied"):
        lo.nn.quantize_weights_(Tied(), include="lm_head")


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lo.nn.quantize_weights_([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        lo.nn.quantize_weights_(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="'atn' matches no parameter"):
        lo.nn.quantize_weights_(make_model(), include="atn")


def test_a_dense_weight_of_many_chunks_trains_with_coded_moments():
    """Its column scales are the same for all chunks of rows."""
    torch.manual_seed(0)
    start = torch.randn(2100, 512).bfloat16()
    weight = nn.Parameter(lo.nn.QuantizedWeight.from_float(start))
    optimizer = lo.GaLoreAdamW([weight], lr=1e-2, state_bits=8, rank=None)
    grad = torch.randn(2100, 512).bfloat16()
    for _ in range(3):
        weight.grad = grad.clone()
        optimizer.step()
    right = (weight.dequantize() - start.float()).sign() == -grad.float().sign()
    assert right[:2048].float().mean() > 0.9
    assert right[2048:].float().mean() > 0.9
