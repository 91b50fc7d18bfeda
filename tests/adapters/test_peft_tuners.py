"""Every tuner of peft that trains parameters of its own: trained, resumed to the bit, and merged, on a model of two layers.

Tuners whose factors are pairs are trained by a rule for pairs, too. What the installed peft does not have is skipped by name.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
TARGETS = {"target_modules": ["first", "second"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def lora(**changes: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **TARGETS, **changes})


TUNERS: dict[str, Callable[[], Any]] = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "modules_to_save": lora(modules_to_save=["head"]),
    "quantised base": lora(),
    "KaSA": lambda: lora(kasa_config=peft.KasaConfig())(),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=9, tfinal=5, **TARGETS),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=4, **TARGETS),
    "Uni-LoRA": lambda: peft.UniLoraConfig(r=4, theta_d_length=40, **TARGETS),
}
OF_PAIRS = ("LoRA", "DoRA", "rsLoRA", "PiSSA", "OLoRA", "modules_to_save", "quantised base")
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "dense": lambda model: lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-2),
    "rite": lambda model: lo.LoRARiteAdamW(lo.lora_pairs(model), lr=1e-3, adamw_lr=1e-2),
    "altlora": lambda model: lo.AltLoRA(lo.lora_pairs(model), lr=1e-2, adamw_lr=1e-2),
    "lora-pro": lambda model: lo.LoRAProAdamW(lo.lora_pairs(model), lr=1e-3, moments="factors"),
}


def adapted(tuner: str) -> "peft.PeftModel":
    """The model with a tuner, always the same."""
    try:
        config = TUNERS[tuner]()
    except (AttributeError, TypeError) as error:
        pytest.skip(f"peft {peft.__version__} has no {tuner}: {error}")
    model = peft.get_peft_model(Net(), config)
    if tuner == "quantised base":
        lo.nn.quantize_weights_(model, include="base_layer")
    return model


def train(model: "peft.PeftModel", optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(X) - 1.0).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
    return losses


CASES = [("dense", tuner) for tuner in TUNERS]
CASES += [(kind, tuner) for kind in OPTIMIZERS if kind != "dense" for tuner in OF_PAIRS]


@pytest.mark.parametrize(("kind", "tuner"), CASES)
def test_a_tuner_trains_resumes_to_the_bit_and_merges(kind: str, tuner: str):
    model = adapted(tuner)
    optimizer = OPTIMIZERS[kind](model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model, optimizer, range(3))
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)
    file = io.BytesIO()
    torch.save([peft.get_peft_model_state_dict(model), optimizer.state_dict()], file)
    straight = copy.deepcopy(train(model, optimizer, range(3, 5)))
    resumed = adapted(tuner)
    again = OPTIMIZERS[kind](resumed)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    peft.set_peft_model_state_dict(resumed, weights)
    again.load_state_dict(state)
    assert train(resumed, again, range(3, 5)) == straight
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    model.eval()
    before = model(X).detach()
    merged = model.merge_and_unload()
    assert torch.allclose(merged(X), before, atol=0.05 if tuner == "quantised base" else 1e-5)


def test_groups_of_peft_for_lora_plus_are_taken_by_every_class_that_needs_no_groups_of_its_own():
    """peft gives groups without ranks, in which B's have another rate."""
    refused = {}
    for name, kind in lo.METHODS.items():
        model = peft.get_peft_model(Net(), lora()())
        try:
            optimizer = create_loraplus_optimizer(model=model, optimizer_cls=kind, lr=1e-3, loraplus_lr_ratio=4.0)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 4e-3}, name
        losses = train(model, optimizer, range(3))
        assert losses[-1] < losses[0], name
    assert set(refused) <= {"muon_adamw", "sumo", "scale", "sinkgd"}
    assert all("no group says which parameters" in message for message in refused.values()), refused
