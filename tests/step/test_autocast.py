"""A step, or a backward pass with updates in it, may stand inside of autocast, and inside of other default types: nothing changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

FORMS = {
    **{name: {} for name in lo.METHODS},
    "galore, rotated": {"method": "galore", "on_refresh": "rotate"},
    "galore, full": {"method": "galore", "proj_type": "full"},
    "galore, power": {"method": "galore", "projector": "power_iteration"},
    "galore in 4 bits": {"method": "galore", "state_bits": 4, "basis_bits": 4},
    "fira in 8 bits": {"method": "fira", "state_bits": 8},
}


def run(form: str, context: Callable[[], object]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Weights and state after a few steps that are taken, as the optimizer is built, in a context."""
    options = {"rank": 24, "update_proj_gap": 3, **FORMS[form]}
    method = lo.METHODS[options.pop("method", form)]
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 200), (200, 96), (64, 80), (33,))
    ]
    with context():
        optimizer = method([{"params": params[:2], **options}, {"params": params[2:], "rank": None}], lr=1e-2)
    for _ in range(7):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        with context():
            optimizer.step()
    state = {f"{i}.{name}": t for i, p in enumerate(params) for name, t in optimizer.state[p].items()}
    return [param.detach() for param in params], state


class DefaultType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], object]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default type float16": lambda: DefaultType(torch.float16),
    "default type float64": lambda: DefaultType(torch.float64),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_in_a_context_is_the_step_outside(form: str, context: str):
    weights, state = run(form, CONTEXTS[context])
    plain_weights, plain_state = run(form, lambda: torch.enable_grad())
    assert state.keys() == plain_state.keys()
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in plain_state.items()}
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert all(torch.equal(tensor, plain_state[name]) for name, tensor in state.items())


@pytest.mark.parametrize(("name", "accumulate"), [("galore", 1), ("galore_8bit", 2), ("fira", 1), ("apollo", 1)])
def test_updates_inside_backward_may_stand_in_autocast(name: str, accumulate: int):
    ends = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = lo.METHODS[name](lo.param_groups(model, rank=16), lr=1e-2)
        lo.update_in_backward(optimizer, accumulate=accumulate, max_grad_norm=1.0)
        for step in range(6):
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(inputs).float().square().mean()
                if inside:
                    loss.backward()
                    if step % accumulate == accumulate - 1:
                        optimizer.step()
            if not inside:
                loss.backward()
                if step % accumulate == accumulate - 1:
                    optimizer.step()
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_closure_keeps_autocast_and_gradients():
    seen = []
    weight = nn.Parameter(torch.randn(64, 48))
    optimizer = lo.GaLoreAdamW([weight], rank=8, lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        product = weight.mT @ weight
        seen.append(product.dtype)
        loss = product.float().square().mean()
        loss.backward()
        return loss

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = float(optimizer.step(closure))
        after = float(optimizer.step(closure))
    assert seen == [torch.bfloat16] * 2
    assert after < before


def test_a_sparse_gradient_is_refused_before_any_parameter_changes():
    first, second = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    for rank in (None, 8):
        optimizer = lo.GaLoreAdamW([first, second], rank=rank)
        first.grad, second.grad = torch.ones(64, 64), torch.eye(64).to_sparse()
        with pytest.raises(ValueError, match="is sparse; make it dense"):
            optimizer.step()
        assert not first.any()
        assert all(float(optimizer.state[param]["step"]) == 0.0 for param in (first, second))
        second.grad = None
