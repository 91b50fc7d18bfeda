"""torchtitan: its container of optimizers with one of ours, steps and checkpoints; without its trainer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.repository.pages import Decoder

pytestmark = pytest.mark.integration
components = pytest.importorskip("torchtitan.components.optimizer")


class LowRankOptimizers(components.OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(components.OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        return (
            lo.METHODS[name] if name in lo.METHODS else components.OptimizersContainer._resolve_optimizer_factory(name)
        )


def built(model: nn.Module) -> components.OptimizersContainer:
    group = components.ParamGroupConfig
    config = LowRankOptimizers.Config(
        implementation="for-loop",
        param_groups=[
            group(
                pattern=r"layers\.\d+\.(qkv|out|up|down)\.weight$",
                optimizer_name="galore",
                optimizer_kwargs={"lr": 1e-2, "rank": 16, "weight_decay": 0.1, "update_proj_gap": 2},
            ),
            group(pattern=".*", optimizer_name="galore", optimizer_kwargs={"lr": 1e-3, "rank": None}),
        ],
    )
    return config.build(model_parts=[model])


def model() -> nn.Module:
    torch.manual_seed(0)
    return Decoder()


def train(model: nn.Module, optimizers, steps: int) -> list[float]:
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def test_its_container_builds_steps_and_resumes_to_the_bit():
    straight = model()
    optimizers = built(straight)
    (optimizer,) = optimizers.optimizers
    assert type(optimizer) is lo.GaLoreAdamW
    assert [group["rank"] for group in optimizer.param_groups] == [16, None]
    before = [p.detach().clone() for p in straight.parameters()]
    train(straight, optimizers, 3)
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in optimizers.state_dict().items()
    }
    losses = train(straight, optimizers, 3)
    assert all(not torch.equal(p, q) for p, q in zip(straight.parameters(), before, strict=True))
    resumed = model()
    resumed.load_state_dict(weights)
    others = built(resumed)
    others.load_state_dict(state)
    assert train(resumed, others, 3) == losses
