"""`torch.set_default_device` says where new tensors go that name no device: the package names one for each of its own.

The default device of these tests is "meta", on which there are no numbers: anything made there by mistake raises.
"""

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

SHAPES = {"tall": (96, 40), "wide": (40, 96), "square": (48, 48), "stack": (3, 50, 40), "vector": (33,)}
FORMS = {
    **{name: {} for name in lo.METHODS},
    "galore in 8 bits": {"method": "galore", "state_bits": 8, "basis_bits": 8},
    "galore in 4 bits": {"method": "galore", "state_bits": 4, "basis_bits": 4},
    "galore in 16 bits": {"method": "galore", "state_bits": 16, "basis_bits": 16},
    "galore, full": {"method": "galore", "proj_type": "full"},
    "galore, exact": {"method": "galore", "projector": "svd"},
    "galore, power": {"method": "galore", "projector": "power_iteration"},
    "galore, rotated": {"method": "galore", "on_refresh": "rotate"},
    "galore, reset": {"method": "galore", "on_refresh": "reset", "projector": "random"},
    "galore, longer gaps": {"method": "galore", "overlap_threshold": 0.1},
    "frugal, blocks": {"method": "frugal", "projector": "blocks", "density": 0.3, "rank": None},
    "fira, gaussian": {"method": "fira", "projector": "random:gaussian"},
    "fira in 8 bits": {"method": "fira", "state_bits": 8},
}


def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        for name, shape in SHAPES.items()
    }


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)


def run(form: str, device: str | None, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights after a few steps, a checkpoint among them."""
    monkeypatch.setattr("lowrank_optim.quantization.coded_moments.MIN_CODED", 1)
    options = {"rank": 7, "update_proj_gap": 3, **FORMS[form]}
    method = lo.METHODS[options.pop("method", form)]
    params, twins = parameters(), parameters()

    def build(tensors: dict[str, nn.Parameter]) -> lo.LowRankOptimizer:
        vector = tensors["vector"]
        matrices = [tensor for tensor in tensors.values() if tensor is not vector]
        return method([{"params": matrices, **options}, {"params": [vector], "rank": None}], lr=1e-2)

    def within(function):
        try:
            torch.set_default_device(device)
            return function()
        finally:
            torch.set_default_device(None)

    optimizer, other = within(lambda: build(params)), build(twins)
    for step in range(9):
        gradients(params, step)
        if step == 2:
            params["tall"].grad[0, 0] = torch.nan
        within(optimizer.step)
        if step == 4:
            with torch.no_grad():
                for twin, param in zip(twins.values(), params.values(), strict=True):
                    twin.copy_(param)
            saved = within(optimizer.state_dict)
            within(lambda saved=saved: other.load_state_dict(saved))
            params, optimizer = twins, other
    return [param.detach() for param in params.values()]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:skipped the update", "ignore:rank 7")
@pytest.mark.parametrize("form", FORMS)
def test_a_default_device_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch):
    for there, plain in zip(run(form, "meta", monkeypatch), run(form, None, monkeypatch), strict=True):
        assert torch.equal(there, plain)


@pytest.mark.parametrize(("name", "accumulate"), [("galore", 1), ("galore", 2), ("fira", 1), ("galore_8bit", 2)])
def test_a_default_device_changes_nothing_inside_backward(name: str, accumulate: int):
    ends = []
    for device in ("meta", None):
        params = parameters()
        optimizer = lo.METHODS[name]([{"params": list(params.values())[:3], "rank": 7, "update_proj_gap": 3}], lr=1e-2)
        attached = lo.update_in_backward(optimizer, accumulate=accumulate, max_grad_norm=1.0)
        for step in range(8):
            inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
            torch.set_default_device(device)
            try:
                (
                    inputs @ params["wide"] @ params["tall"] @ params["wide"][:, :48] @ params["square"]
                ).square().mean().backward()
                if step % accumulate == accumulate - 1:
                    optimizer.step()
            finally:
                torch.set_default_device(None)
        assert attached is not None
        ends.append([param.detach().clone() for param in params.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["LISAAdamW", "BAdamW"])
def test_a_default_device_changes_nothing_for_layers_that_take_turns(name: str):
    ends = []
    for device in ("meta", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
        torch.set_default_device(device)
        try:
            optimizer = getattr(lo, name)(lo.layer_groups(model), lr=1e-2)
        finally:
            torch.set_default_device(None)
        for step in range(6):
            model(torch.randn(4, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            torch.set_default_device(device)
            try:
                optimizer.step()
            finally:
                torch.set_default_device(None)
            optimizer.zero_grad()
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
