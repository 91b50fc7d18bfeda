"""LoRA-GGPO: noise of forward beside a dense one, its size, the same wherever a step looks at it, never as large as a matrix."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim.adapters import forward_noise
from tests.oracles import pairs as oracle
from tests.oracles.adapted import Adapted, two_layers

X = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def dense_noise(layer: Adapted) -> Tensor:
    """N (m×n) of a layer that has noise: what it adds to unit vectors."""
    unit = torch.eye(layer.base_layer.in_features, dtype=torch.float64)
    with_noise = layer(unit)
    layer.eval()
    without = layer(unit)
    layer.train()
    return (with_noise - without).detach().mT


def noisy(model: nn.Module, **options: float) -> tuple[torch.optim.Optimizer, forward_noise.ForwardNoise]:
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(model), lr=1e-2)
    return optimizer, lo.noise_in_forward(model, optimizer, **options)


def backward(model: nn.Module, x: Tensor, redo: bool | None = None) -> list[Tensor]:
    """Gradients of the factors and of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    y = model(x) if redo is None else checkpoint(model, x, use_reentrant=redo)
    y.square().mean(-1).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [x.grad]


def test_the_size_of_rows_is_the_one_that_was_computed_elsewhere():
    a, b = map(torch.Tensor.requires_grad_, oracle.golden_pair())
    w = oracle.golden_weight() + 2.0 * (b @ a).detach()
    x, y = oracle.golden_data()
    grad = (x @ w.mT - y).mT @ x / 12.0
    found = forward_noise.row_noise(w.norm(dim=1), grad.norm(dim=1).square(), 0.03, 0.01, 8)
    golden = [0.0212513141, 0.0207420851, 0.0190047948, 0.0191072614, 0.0148517428, 0.0224305163]
    assert found.tolist() == pytest.approx(golden, abs=1e-10)


@pytest.mark.parametrize(("m", "n", "r"), [(40, 12, 3), (7, 40, 3), (5, 5, 5), (9, 8, 1)])
@pytest.mark.parametrize("zero", [False, True])
def test_norms_of_the_gradient_that_the_factors_tell_are_those_of_the_dense_projection(
    m: int, n: int, r: int, zero: bool
):
    generator = torch.Generator().manual_seed(m)
    a, b, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, n), (m, r), (m, n)))
    b = 0.0 * b if zero else b
    onto_b, onto_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    both = onto_b @ g + (g - onto_b @ g) @ onto_a
    grads = 1.7 * b.mT @ g, 1.7 * g @ a.mT
    for given, dense in ((grads, both), ((None, grads[1]), g @ onto_a), ((grads[0], None), onto_b @ g)):
        found = forward_noise.projected_row_norms(a, b, *given, 1.7)
        assert torch.allclose(found, dense.norm(dim=1), rtol=1e-8, atol=1e-9)


def test_outputs_and_gradients_are_those_of_a_dense_perturbation_of_the_weights():
    model = two_layers()
    dense = copy.deepcopy(model)
    noisy(model)
    with torch.no_grad():
        for one, other in zip(model[::2], dense[::2], strict=True):
            other.base_layer.weight += dense_noise(one)
    assert torch.allclose(model(X), dense(X), rtol=1e-10)
    for one, other in zip(backward(model, X), backward(dense, X), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_rows_have_the_size_of_weights_and_of_the_gradient_of_the_last_step():
    layer = Adapted(900, 6, 3).double()
    x = torch.randn(5, 900, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    optimizer, handle = noisy(layer, sigma=0.5, beta=0.2)
    (a, b), seen = layer.factors, []
    gradient = torch.zeros(6, dtype=torch.float64)
    for step in range(2):
        weight = layer.base_layer.weight + 2.0 * b @ a
        expected = 0.5 * weight.norm(dim=1) + 0.2 * gradient.square()
        seen.append(dense_noise(layer))
        sizes = seen[-1].norm(dim=1)
        assert torch.allclose(sizes, expected.detach(), rtol=0.1), step  # √n numbers N(0, 1/n): 1 ± 0.024
        if step == 0:
            layer.zero_grad()
            layer(x).sum().backward()
            gradient = forward_noise.projected_row_norms(a, b, a.grad, b.grad, 2.0)
            assert bool((0.2 * gradient.square() > 0.5 * sizes).all())  # so that the next step says something
            optimizer.step()
    assert handle.step == 1
    both = torch.corrcoef(torch.stack([seen[0].flatten(), seen[1].flatten()]))
    assert abs(float(both[0, 1])) < 0.06


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_again_see_the_same_noise(reentrant: bool):
    model = two_layers()
    optimizer, _ = noisy(model)
    for _ in range(2):
        expected = backward(model, X)
        got = backward(model, X, reentrant)
        assert len(got) == 5
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        optimizer.step()


def test_micro_batches_add_up_to_one_batch_and_evaluation_has_no_noise():
    model, plain = two_layers(), two_layers()
    _, handle = noisy(model)
    whole = backward(model, X)[:-1]
    parts = [backward(model, x)[:-1] for x in X.split(2)]
    assert all(torch.allclose(one, sum(others), rtol=1e-10) for one, *others in zip(whole, *parts, strict=True))
    assert not torch.allclose(model(X), plain(X), rtol=1e-3)
    model.eval()
    assert torch.equal(model(X), plain(X))
    model.train()
    handle.remove()
    assert torch.equal(model(X), plain(X))
    assert not model[0]._forward_hooks


def test_a_resumed_run_sees_the_same_noise():
    model = two_layers(torch.float32)
    optimizer, handle = noisy(model, beta=0.5)
    x = X.float()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            backward(model, x)
            optimizer.step()

    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    train(model, optimizer, 2)
    resumed = two_layers(torch.float32)
    again, other = noisy(resumed, beta=0.5)
    resumed.load_state_dict(saved[0]), again.load_state_dict(saved[1]), other.load_state_dict(saved[2])
    train(resumed, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    third = two_layers(torch.float32)
    different, _ = noisy(third, beta=0.5)
    third.load_state_dict(saved[0]), different.load_state_dict(saved[1])
    train(third, different, 2)  # without the handle's state, the noise is that of the first steps
    assert not torch.equal(model[0].factors[0], third[0].factors[0])
    with pytest.raises(ValueError, match="7: no layer of this name and of 3 outputs has noise here"):
        other.load_state_dict({"step": 1, "norms": {"7": torch.zeros(3)}})


def test_no_tensor_is_as_large_as_the_weights(monkeypatch: pytest.MonkeyPatch):
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if hasattr(t, "numel"))
            return result

    layer = Adapted(300, 200, 2, bias=False)
    noisy(layer)
    monkeypatch.setattr(forward_noise, "CHUNK_ELEMENTS", 6000)
    monkeypatch.setattr("lowrank_optim.adapters.layers.COLUMNS", 6000)
    x = torch.randn(3, 300, requires_grad=True)
    layer(x)  # the weights are looked at once
    with Sizes():
        layer(x).sum().backward()
    # The weights themselves are there as a transposed view.
    assert max(size for size in made if size != 300 * 200) == 6000
    assert math.prod(x.grad.shape) == 900


def test_blocks_are_independent_and_their_numbers_standard_normal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forward_noise, "CHUNK_ELEMENTS", 6000)
    parts, blocks = zip(*forward_noise.noise_blocks(5, torch.ones(200), 300, torch.float32), strict=True)
    assert [part.stop - part.start for part in parts] == [20] * 10
    numbers = torch.stack([block.flatten() for block in blocks])
    assert torch.allclose(numbers.mean(1), torch.zeros(10), atol=0.05)
    assert torch.allclose(torch.corrcoef(numbers), torch.eye(10), atol=0.06)
    assert torch.allclose(numbers.var(1), torch.ones(10), atol=0.08)


def test_quantised_and_low_precision_bases_have_noise_too():
    model = two_layers(torch.float32)
    lo.nn.quantize_weights_(model, include="0.base_layer")
    noisy(model)
    plain = model[0].base_layer(torch.eye(12)) - model[0].base_layer(torch.zeros(1, 12))
    model(X.float())
    a, b = model[0].factors
    expected = 0.03 * (plain.mT + 2.0 * b @ a).norm(dim=1) / math.sqrt(12)
    (hook,) = model[0]._forward_hooks.values()
    assert torch.allclose(hook.scales, expected.detach(), rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.float()).dtype == torch.bfloat16
        grads = backward(model, X.float())
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads)


def test_what_can_have_no_noise_is_refused_by_name():
    model = two_layers()
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(model), lr=1e-2)
    for name in ("sigma", "beta"):
        with pytest.raises(ValueError, match=f"{name} is -1; it must be a finite number of at least 0"):
            lo.noise_in_forward(model, optimizer, **{name: -1})
    handle = lo.noise_in_forward(model, optimizer)
    with pytest.raises(RuntimeError, match="0 has noise already"):
        lo.noise_in_forward(model, optimizer)
    before = model[0].factors[0].detach().clone()
    with pytest.raises(RuntimeError, match="no adapter with noise has a gradient"):
        optimizer.step()
    assert torch.equal(model[0].factors[0], before)
    handle.remove()
    hooks = lo.update_in_backward(optimizer)
    with pytest.raises(
        RuntimeError, match="updates in backward, which frees the gradients that the noise is to follow"
    ):
        lo.noise_in_forward(model, optimizer)
    handle = lo.noise_in_forward(model, optimizer, beta=0.0)
    backward(model, X)
    optimizer.step()
    assert handle.step == 1
    hooks.remove(), handle.remove()
    model[2].lora_variant = {"default": type("DoraLinear", (), {})()}
    with pytest.raises(ValueError, match="2 can have no noise in forward: DoraLinear computes in another way"):
        lo.noise_in_forward(model, optimizer)
    assert not model[0]._forward_hooks
