"""Weights pushed along the momentum: beside a transcription, exact in both directions, and refused where there is no momentum."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles import pairs as oracle

KINDS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "pairs": lambda p: lo.LoRAOptimizer(lo.lora_pairs([(*p, 2.0)]), lr=0.05, weight_decay=0.0),
    "dense": lambda p: lo.GaLoreAdamW(p, lr=0.05, weight_decay=0.0),
    "torch's AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "torch's SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
}


def pair(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(each.to(dtype)) for each in oracle.golden_pair()]


def gradient(a: Tensor, b: Tensor) -> list[Tensor]:
    a, b = (each.detach().double().requires_grad_(True) for each in (a, b))
    return list(torch.autograd.grad(oracle.golden_loss(a, b), (a, b)))


def transcribed(adam: bool, rho: float, steps: int) -> list[Tensor]:
    """θ after some steps with gradients at θ + ρ m/‖m‖."""
    theta = list(oracle.golden_pair())
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    for t in range(1, steps + 1):
        size = torch.cat([each.flatten() for each in m]).norm()
        there = [p + (rho * each / size if size > 0 else 0.0) for p, each in zip(theta, m, strict=True)]
        for i, g in enumerate(gradient(*there)):
            m[i] = 0.9 * m[i] + (0.1 * g if adam else g)
            v[i] = 0.999 * v[i] + 0.001 * g.square()
            step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8) if adam else m[i]
            theta[i] = theta[i] - (0.05 if adam else 0.5) * step
    return theta


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for p, g in zip(params, gradient(*params), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_is_that_of_gradients_at_perturbed_weights(kind: str):
    params = pair()
    optimizer = KINDS[kind](params)
    handle = lo.perturb_by_momentum(optimizer, 0.05)
    train(params, optimizer, 4)
    expected = transcribed("SGD" not in kind, 0.05, 4)
    with handle.off():
        assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-11) for p, q in zip(params, expected, strict=True))
        kept = [p.detach().clone() for p in params]
    moved = torch.cat([(p - q).flatten() for p, q in zip(params, kept, strict=True)])
    assert float(moved.norm().detach()) == pytest.approx(0.05, rel=1e-9)
    plain = transcribed("SGD" not in kind, 0.0, 4)
    assert not torch.allclose(expected[1], plain[1], rtol=1e-2)
    handle.remove()
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    with handle.off():
        pass
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_bit(dtype: torch.dtype):
    """With the rate 0, hundreds of perturbations leave the weights as they are."""
    params = pair(dtype)
    before = copy.deepcopy(params)
    optimizer = lo.GaLoreAdamW(params, lr=0.0, weight_decay=0.0)
    handle = lo.perturb_by_momentum(optimizer, 0.3)
    train(params, optimizer, 50)
    assert not torch.equal(params[0], before[0])
    handle.remove()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_resumed_run_is_exact():
    params = pair(torch.float32)
    optimizer = KINDS["pairs"](params)
    handle = lo.perturb_by_momentum(optimizer, 0.05)
    train(params, optimizer, 3)
    file = io.BytesIO()
    with handle.off():
        torch.save([list(params), optimizer.state_dict()], file)
    train(params, optimizer, 3)
    resumed = pair(torch.float32)
    again = KINDS["pairs"](resumed)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, w in zip(resumed, weights, strict=True):
            p.copy_(w)
    again.load_state_dict(state)
    lo.perturb_by_momentum(again, 0.05)
    train(resumed, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def test_only_some_parameters_are_perturbed():
    params = pair()
    optimizer = KINDS["dense"](params)
    handle = lo.perturb_by_momentum(optimizer, 0.05, params=params[:1])
    train(params, optimizer, 1)
    held = [p.detach().clone() for p in params]
    handle.remove()
    assert not torch.equal(params[0], held[0])
    assert torch.equal(params[1], held[1])


def test_weights_that_were_written_meanwhile_and_closures_are_refused():
    params = pair()
    optimizer = KINDS["pairs"](params)
    handle = lo.perturb_by_momentum(optimizer, 0.05)
    with pytest.raises(RuntimeError, match=r"step\(closure\) would compute gradients at the weights themselves"):
        optimizer.step(lambda: 0.0)
    train(params, optimizer, 1)
    with handle.off(), torch.no_grad():
        params[0].mul_(2.0)
        doubled = params[0].clone()
    with handle.off(), handle.off():
        assert torch.equal(params[0], doubled)
    with torch.no_grad():
        params[0].zero_()
    with pytest.raises(RuntimeError, match=r"0\.0 was written while it was perturbed"):
        train(params, optimizer, 1)
    assert not params[0].any()


def test_what_has_no_momentum_of_gradients_is_refused_by_name():
    params = pair(torch.float32)
    pairs = lo.lora_pairs([(*params, 2.0)])
    for optimizer, why in (
        (lo.AltLoRA(pairs), "the momentum of AlternatingLoRA is not one of gradients"),
        (lo.LoRARiteAdamW(pairs), "the momentum of Rite is not one of gradients"),
        (lo.GaLoreAdamW(params, rank=1), "its moments lie in a subspace"),
        (lo.LoRAProAdamW(pairs, moments="none"), "LoRAProAdamW keeps no running mean of its gradients"),
    ):
        with pytest.raises(ValueError, match=why):
            lo.perturb_by_momentum(optimizer)
    with pytest.raises(ValueError, match="perturb is 0; it must be a positive number"):
        lo.perturb_by_momentum(lo.GaLoreAdamW(params), 0)
    with pytest.raises(ValueError, match=r"a parameter \(3,\) of params is not trained by this optimizer"):
        lo.perturb_by_momentum(lo.GaLoreAdamW(params), params=[nn.Parameter(torch.zeros(3))])
    optimizer = lo.GaLoreAdamW(params)
    hooks = lo.update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="is updated in backward"):
        lo.perturb_by_momentum(optimizer)
    hooks.remove()
    assert torch.equal(params[0], pair(torch.float32)[0])


def test_removing_takes_the_hooks_away_and_leaves_what_was_written():
    params = pair()
    optimizer = KINDS["dense"](params)
    handle = lo.perturb_by_momentum(optimizer, 0.05)
    train(params, optimizer, 1)
    with handle.off():
        kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        params[0].fill_(7.0)
    with pytest.raises(RuntimeError, match=r"or call remove\(\), which leaves it as it was written"):
        optimizer.step()
    handle.remove()
    assert torch.equal(params[0], torch.full_like(params[0], 7.0))
    assert torch.equal(params[1], kept[1])
    train(params, optimizer, 1)  # nothing is pushed any more
    before = [p.detach().clone() for p in params]
    handle.remove()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_without_its_momentum_is_refused(kind):
    params = pair()
    with pytest.raises(ValueError, match=rf"{kind.__name__} has momentum=0"):
        lo.perturb_by_momentum(kind(params, lr=0.1), 0.05)
