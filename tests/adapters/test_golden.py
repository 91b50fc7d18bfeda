"""Pair methods on a small problem whose numbers were computed elsewhere, and beside transcriptions of the papers on larger ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles import pairs as oracle

S = 2.0
FREE = {"weight_decay": 0.0}


def run(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], steps: int, freeze: str | None = None, **options: Any
) -> tuple[list[float], Tensor]:
    """The losses before the first step and after each, and sBA after the last."""
    a, b = map(nn.Parameter, oracle.golden_pair())
    optimizer = make(lo.lora_pairs([(a, b, S)], freeze=freeze, **options))
    losses = []
    for _ in range(steps):
        loss = oracle.golden_loss(a, b)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a, b = a.detach(), b.detach()
    return [*losses, float(oracle.golden_loss(a, b))], S * b @ a


GOLDEN: dict[str, tuple[Callable[..., Any], dict[str, Any], list[float], tuple[float, float]]] = {
    "adamw": (
        lambda groups: lo.GaLoreAdamW(groups, lr=0.05, **FREE),
        {},
        [0.1999129838, 0.1878894299, 0.1686868360],
        (0.0318937700, -0.0185336402),
    ),
    "adamw, stepped as a pair": (
        lambda groups: lo.LoRAOptimizer(groups, lr=0.05, **FREE),
        {},
        [0.1999129838, 0.1878894299, 0.1686868360],
        (0.0318937700, -0.0185336402),
    ),
    "lora+": (
        lambda groups: lo.GaLoreAdamW(groups, lr=0.05, **FREE),
        {"lr_ratio": 4.0},
        [0.1699036868, 0.0983558986, 0.0283730241],
        (0.2404745389, -0.0359591123),
    ),
    "lora-pro, descent": (
        lambda groups: lo.LoRAProAdamW(groups, lr=0.5, moments="none"),
        {},
        [0.1992994472, 0.1513322203, 0.1037689520],
        (0.0810160390, -0.0163040462),
    ),
    "lora-pro, full": (
        lambda groups: lo.LoRAProAdamW(groups, lr=0.05, moments="full"),
        {},
        [0.1940799229, 0.1352308833, 0.0814624136],
        (0.1562964449, -0.0414401385),
    ),
    "lora-pro, factors": (
        lambda groups: lo.LoRAProAdamW(groups, lr=0.05, moments="factors"),
        {},
        [0.2190402334, 0.1873686852, 0.1605572680],
        (0.0525086083, -0.0030228055),
    ),
    "riemannian": (
        lambda groups: lo.RiemannianAdamW(groups, lr=0.05, damping=1e-2, absolute_damping=True, **FREE),
        {},
        [0.2041720079, 0.1785030555, 0.1491248194],
        (0.0067751564, -0.0042431568),
    ),
    "lora-fa": (
        lambda groups: lo.LoRAProAdamW(groups, lr=0.05, moments="factors"),
        {"freeze": "A"},
        [0.2108278351, 0.1897105487, 0.1717054580],
        (0.0793282043, 0.0655342392),
    ),
    "rite": (
        lambda groups: lo.LoRARiteAdamW(groups, lr=0.005, **FREE),
        {},
        [0.2254266297, 0.2158199127, 0.2081335275],
        (0.0090761981, 0.0261900432),
    ),
    "rite, far too fast": (
        lambda groups: lo.LoRARiteAdamW(groups, lr=0.05, **FREE),
        {},
        [0.8280761719, 0.6709110349, 0.3807761469],
        (-0.0146476724, -0.1109843967),
    ),
    "rite, escape": (
        lambda groups: lo.LoRARiteAdamW(groups, lr=0.05, escape=True, **FREE),
        {},
        [0.8280761719, 0.6123963293, 0.3911743421],
        (-0.0384893366, -0.1319134513),
    ),
    "altlora": (
        lambda groups: lo.AltLoRA(groups, lr=0.5),
        {},
        [0.1846884981, 0.1415576725, 0.1013195921, 0.0732136205],
        (0.1191361242, -0.0421467866),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_and_the_product_are_those_of_the_method(name: str):
    make, options, losses, (first, last) = GOLDEN[name]
    found, product = run(make, len(losses), **options)
    assert found == pytest.approx([0.2382052423, *losses], rel=1e-9, abs=1e-10)
    assert float(product[0, 0]) == pytest.approx(first, rel=1e-9, abs=1e-10)
    assert float(product[5, 3]) == pytest.approx(last, rel=1e-9, abs=1e-10)
