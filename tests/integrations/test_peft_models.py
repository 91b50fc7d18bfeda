"""peft: any optimizer on the parameters of LoRA and DoRA, and of whole modules trained beside them (`modules_to_save`)."""

import pytest
import torch

import lowrank_optim as lo
from tests.oracles import chat

pytestmark = pytest.mark.integration
peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**changes) -> torch.nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, **changes)
    return peft.get_peft_model(chat.model(), config)


def train(model, optimizer, steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, chat.WORDS, (2, 16), generator=generator)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_names(model) -> list[str]:
    return [name for name, value in model.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_every_trainable_weight_moves_and_no_other(changes, in_backward):
    model = lora(**changes)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups = lo.param_groups(model, rank=4, weight_decay=0.1)
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(trained_names(model))
    optimizer = lo.GaLoreAdamW(groups, lr=1e-2)
    if in_backward:
        lo.update_in_backward(optimizer)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert moved == trained_names(model)


def test_the_magnitude_of_dora_is_a_vector_without_decay_and_a_saved_head_is_dense():
    groups = lo.param_groups(lora(use_dora=True, modules_to_save=["lm_head"]), rank=4, weight_decay=0.1)
    low, dense, no_decay = groups
    assert all(".lora_A." in name or ".lora_B." in name for name in low["param_names"])
    assert [name.split(".")[-4:] for name in dense["param_names"]] == [
        ["lm_head", "modules_to_save", "default", "weight"]
    ]
    assert all("lora_magnitude_vector" in name for name in no_decay["param_names"])
    assert no_decay["weight_decay"] == 0.0


def test_adapters_and_optimizer_resume_to_the_bit(tmp_path):
    def built():
        model = lora(use_dora=True)
        return model, lo.GaLoreAdamW(lo.param_groups(model, rank=4), lr=1e-2)

    straight, optimizer = built()
    train(straight, optimizer, 2)
    torch.save([peft.get_peft_model_state_dict(straight), optimizer.state_dict()], tmp_path / "saved.pt")
    losses = train(straight, optimizer, 2)
    resumed, other = built()
    adapter, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    peft.set_peft_model_state_dict(resumed, adapter)
    other.load_state_dict(state)
    assert train(resumed, other, 2) == losses
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_pefts_lora_plus_takes_our_class():
    from peft.optimizers import create_loraplus_optimizer

    model = lora()
    optimizer = create_loraplus_optimizer(
        model=model, optimizer_cls=lo.GaLoreAdamW, lr=1e-2, loraplus_lr_ratio=4.0, betas=(0.9, 0.99)
    )
    assert isinstance(optimizer, lo.GaLoreAdamW)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-2, 4e-2}
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
