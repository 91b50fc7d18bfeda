"""LLaMA-Factory: the registry of optimizers in its new trainer. What its flags call is in test_compat."""

import pytest
import torch

import lowrank_optim as lo
from tests.repository.pages import Decoder

pytestmark = pytest.mark.integration
plugins = pytest.importorskip("llamafactory.v1.plugins.trainer_plugins.optimizer")


def test_a_registered_optimizer_is_found_by_its_name_and_steps():
    @plugins.OptimizerPlugin("lowrank").register()
    def lowrank(model, config, **_):
        groups = lo.param_groups(model, rank=config["rank"], weight_decay=config["weight_decay"])
        return lo.GaLoreAdamW(groups, lr=config["lr"])

    model = Decoder()
    config = {"name": "lowrank", "rank": 16, "lr": 1e-2, "weight_decay": 0.1}
    optimizer = plugins.OptimizerPlugin(config["name"])(model, config)
    assert optimizer.param_groups[0]["rank"] == 16
    before = [p.detach().clone() for p in model.parameters()]
    tokens = torch.randint(64, (4, 12))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
