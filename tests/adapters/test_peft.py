"""Adapters of peft itself: every layout is found, trained, resumed, merged, pruned and saved as peft's own."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.adapters.layers import find_factors
from lowrank_optim.rules.pairs import matrix_of, tall
from tests.oracles import pairs as oracle

peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Experts(nn.Module):
    """Three matrices in one parameter, as mixture-of-experts layers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(0.2 * torch.randn(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ matrix.mT for matrix in self.stack), torch.zeros(()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 16), nn.Conv2d(1, 6, 3, padding=1)
        self.fc, self.gpt, self.experts, self.out = nn.Linear(16, 12), Conv1D(12, 12), Experts(), nn.Linear(10, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x[:, None]).mean(1)
        return self.out(torch.tanh(self.experts(self.gpt(torch.tanh(self.fc(x))))))


TOKENS = torch.arange(12).view(3, 4)


def net(*more: str, seed: int = 0, **options: object) -> "peft.PeftModel":
    """The network with adapters of which no factor is zero."""
    torch.manual_seed(seed)
    targets = options.pop("target_modules", ["embed", "conv", "fc", "gpt", "out"])
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
    model = peft.get_peft_model(Net(), config, autocast_adapter_dtype=False)
    for name in more:
        model.add_adapter(name, peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets, use_rslora=True))
    for each in find_factors(model):
        for factor in (each.a, each.b):
            nn.init.normal_(factor, std=0.1)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(TOKENS) - 1.0).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return losses


def products(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """sBA of every layer, from the groups of `lora_pairs`, one matrix for each expert."""
    (group, *_) = lo.lora_pairs(model, adapter, frozen="keep")
    found = {}
    for number, (scaling, experts) in enumerate(zip(group["scalings"], group["experts"], strict=True)):
        a, b = (param.detach() for param in group["params"][2 * number : 2 * number + 2])
        form_a, form_b = (tall(p.reshape(matrix_of(p)), first, experts) for p, first in ((a, True), (b, False)))
        found[group["param_names"][2 * number]] = scaling * form_b @ form_a.mT
    return found


# ------------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"fc": 2, "conv": 5}, "alpha_pattern": {"fc": 8}},
        {"target_modules": ["fc"], "target_parameters": ["experts.stack"]},
    ],
    ids=["linear, conv1d, embedding, conv", "rslora", "patterns", "experts"],
)
def test_the_product_of_every_pair_is_the_change_that_peft_makes(options: dict[str, object]):
    model = net("second", **options)
    for adapter in ("default", "second"):
        found = products(model, adapter)
        layers = [(each.path, each.layer) for each in find_factors(model) if each.adapter == adapter]
        assert len(found) == len(layers)
        for (name, product), (path, layer) in zip(found.items(), layers, strict=True):
            assert name.startswith(path)
            change = layer.get_delta_weight(adapter).detach()
            if change.dim() == 3:  # of experts, perhaps in another order of dimensions
                change = change if change.shape == product.shape else change.mT
            else:
                product = product[0] if "Embedding" not in type(layer).__name__ else product[0].mT
                product = product.mT if path.endswith("gpt") else product
                change = change.reshape(product.shape)
            assert torch.allclose(product, change, atol=1e-6), name


def test_both_gradients_of_every_pair_are_of_one_product():
    """Bᵀg_B = g_A Aᵀ: a stack that is reshaped the wrong way, or a pair that is matched wrongly, breaks it."""
    model = net(target_parameters=["experts.stack"])
    (model(TOKENS) - 1.0).square().mean().backward()
    (group, *_) = lo.lora_pairs(model)
    assert group["experts"].count(3) == 1
    for number, experts in enumerate(group["experts"]):
        a, b = group["params"][2 * number : 2 * number + 2]
        forms = {
            (name, first): tall(tensor.reshape(matrix_of(tensor)), first, experts)
            for p, first in ((a, True), (b, False))
            for name, tensor in (("w", p.detach()), ("g", p.grad))
        }
        left, right = forms["w", False].mT @ forms["g", False], forms["g", True].mT @ forms["w", True]
        assert torch.allclose(left, right, atol=1e-5 * float(left.abs().max()))


def test_what_is_no_plain_product_is_dense_and_what_comes_besides_has_a_group(caplog: pytest.LogCaptureFixture):
    groups = lo.lora_pairs(net(target_modules=["fc", "out"], use_dora=True), weight_decay=0.3)
    assert [len(group["params"]) for group in groups] == [4, 2]
    assert all("magnitude" in name for name in groups[1]["param_names"])
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    kasa = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["fc"], kasa_config=peft.KasaConfig()))
    with (
        caplog.at_level(logging.WARNING, "lowrank_optim"),
        pytest.raises(ValueError, match="no factors of the model are pairs"),
    ):
        lo.lora_pairs(kasa)
    assert "a gate (lora_diag) stands between them" in caplog.text


def test_adapters_that_are_not_active_are_left_out_unless_they_are_wanted():
    model = net("second")
    (group, *_) = lo.lora_pairs(model)
    assert all(".default" in name for name in group["param_names"])
    (both, *_) = lo.lora_pairs(model, frozen="keep")
    assert len(both["params"]) == 2 * len(group["params"])
    model.set_adapter("second")
    (second, *_) = lo.lora_pairs(model, "second")
    assert second["scalings"] == [pytest.approx(3**0.5)] * 5
    text = lo.describe(lo.lora_pairs(model))
    assert "pair (s 1.73205)" in text
    assert [line.split()[1:4] for line in text.splitlines() if "fc.lora_B" in line] == [["12x3", "B", "3"]]


# ----------------------------------------------------------------------------------------------------------------- training


def golden_layer() -> "peft.PeftModel":
    layer = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    model = peft.get_peft_model(layer, config, autocast_adapter_dtype=False).double()
    for each in find_factors(model):
        a, b = oracle.golden_pair()
        each.a.data.copy_(a), each.b.data.copy_(b)
    return model


def test_a_layer_of_peft_has_the_golden_numbers_with_its_own_lora_plus_too():
    """The loss of the golden problem depends on A and B through the scaled product alone."""
    rite, plus, theirs = golden_layer(), golden_layer(), golden_layer()
    optimizers = {
        rite: lo.LoRARiteAdamW(lo.lora_pairs(rite), lr=0.005, weight_decay=0.0),
        plus: lo.GaLoreAdamW(lo.lora_pairs(plus, lr_ratio=4.0), lr=0.05, weight_decay=0.0),
        theirs: create_loraplus_optimizer(
            theirs, lo.GaLoreAdamW, lr=0.05, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.0
        ),
    }
    expected = {rite: 0.2081335275, plus: 0.0283730241, theirs: 0.0283730241}
    for model, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        (factors,) = find_factors(model)
        for _ in range(3):
            optimizer.zero_grad()
            oracle.golden_loss(factors.a, factors.b).backward()
            optimizer.step()
        assert float(oracle.golden_loss(factors.a, factors.b).detach()) == pytest.approx(expected[model], abs=1e-10)


@pytest.mark.parametrize(
    "kind", [lo.LoRARiteAdamW, lo.AltLoRA, lo.LoRAProAdamW, lo.RiemannianAdamW], ids=lambda k: k.__name__
)
def test_a_model_trains_resumes_and_merges(kind: type[lo.LoRAOptimizer]):
    model = net(target_parameters=["experts.stack"])
    resumed = copy.deepcopy(model)
    optimizer = kind(lo.lora_pairs(model), lr=1e-3)
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0]
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    again = kind(lo.lora_pairs(resumed), lr=1e-3)
    resumed.load_state_dict(weights)
    again.load_state_dict(saved)
    train(resumed, again, 2)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), resumed.parameters(), strict=True))
    base = {each.path: each.layer.get_base_layer() for each in find_factors(model)}
    before = {path: layer.weight.detach().clone() for path, layer in base.items() if isinstance(layer, nn.Linear)}
    changes = {name.partition(".lora")[0]: product[0] for name, product in products(model).items()}
    output = model(TOKENS)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(TOKENS), output, atol=1e-5)
    for path, weight in before.items():
        name = path.removeprefix("base_model.model.")
        assert torch.allclose(merged.get_submodule(name).weight, weight + changes[path], atol=1e-6)


def test_scalings_are_read_again_after_they_were_changed():
    model = net(target_modules=["fc", "out"])
    optimizer = lo.LoRAProAdamW(lo.lora_pairs(model), moments="none")
    layers = {each.path: each.layer for each in find_factors(model)}
    layers["base_model.model.fc"].set_scale("default", 2.0)
    assert optimizer.param_groups[0]["scalings"] == [1.5, 1.5]
    lo.update_scalings(optimizer, model)
    assert optimizer.param_groups[0]["scalings"] == [3.0, 1.5]
    layers["base_model.model.out"].set_scale("default", 0.0)
    with pytest.raises(ValueError, match=r"the scaling of A of base_model\.model\.out"):
        lo.update_scalings(optimizer, model)
    assert optimizer.param_groups[0]["scalings"] == [3.0, 1.5]


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pruned_adapter_is_saved_and_loaded_as_any_other(tmp_path: Path, rslora: bool):
    model = net(use_rslora=rslora, target_parameters=["experts.stack"])
    base = copy.deepcopy(model).unload()
    with torch.no_grad():
        for each in find_factors(model):
            if each.path.endswith("fc"):
                each.a[[0, 2]] = 0.0
            if each.path.endswith("embed"):
                each.b[:, 1] = 0.0
            if each.experts == 3:
                each.b[:, 3 * 2 : 3 * 3] = 0.0  # rank 2 of all three
    before = model(TOKENS)
    small = lo.prune_ranks_(model)
    assert sorted(small.values()) == [2, 3, 3]
    assert model.peft_config["default"].rank_pattern == {"experts.stack": 3, "embed": 3, "fc": 2}
    assert torch.allclose(model(TOKENS), before, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(loaded(TOKENS), before, atol=1e-6)
    assert {each.a.shape[0] for each in find_factors(loaded)} == {2, 3, 4, 9}
    optimizer = lo.LoRARiteAdamW(lo.lora_pairs(model))
    train(model, optimizer, 1)


def test_l1_on_rank_one_terms_prunes_a_model():
    model = net(target_modules=["fc", "out"])
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(model, l1=3.0), lr=5e-3, weight_decay=0.0)
    train(model, optimizer, 12)
    before = model(TOKENS)
    assert lo.prune_ranks_(model)
    assert torch.allclose(model(TOKENS), before, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ other adapters


def test_adalora_is_trained_with_its_gates_without_decay():
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(target_modules=["fc", "out"], init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5)
    model = peft.get_peft_model(Net(), config)
    for name, param in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(param)
    groups = lo.param_groups(model, rank=2, weight_decay=0.1)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name["base_model.model.fc.lora_A.default"]["rank"] == 2
    assert by_name["base_model.model.fc.lora_E.default"]["weight_decay"] == 0.0
    optimizer = lo.GaLoreAdamW(groups, lr=1e-2)
    losses = []
    for step in range(8):
        loss = (model(TOKENS) - 1.0).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises(
        ValueError, match=r"fc\.lora_E\.default is a gate of AdaLoRA, whose update_and_allocate reads gradients"
    ):
        lo.update_in_backward(optimizer)
    assert not optimizer.param_groups[0]["params"][0]._post_accumulate_grad_hooks


def test_a_model_of_peft_begins_with_the_values_of_lora_sb_and_trains_its_core():
    model = net(target_modules=["fc", "gpt", "out"])
    target = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    before = float((model(TOKENS) - target).square().mean().detach())
    bases = lo.lora_sb_(model, lambda: (model(TOKENS) - target).square().mean(), eta=1e-3)
    optimizer = lo.LoRASBAdamW(lo.lora_pairs(model, freeze="A"), lr=1e-2, bases=bases)
    assert len(bases) == 3
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(TOKENS) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before
    expected = model(TOKENS).detach()
    assert torch.allclose(model.merge_and_unload()(TOKENS), expected, atol=1e-5)


def test_scales_of_ia3_have_no_decay_and_logits_of_vblora_are_no_stack_of_matrices():
    ia3 = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["fc"], feedforward_modules=[]))
    groups = lo.param_groups(ia3, rank=None, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    config = peft.VBLoRAConfig(target_modules=["fc"], r=4, num_vectors=8, vector_length=4)
    groups = lo.param_groups(peft.get_peft_model(Net(), config), rank=None, weight_decay=0.1)
    with pytest.raises(ValueError, match="no parameter is low-rank"):
        lo.param_groups(peft.get_peft_model(Net(), config), rank=2)


# --------------------------------------------------------------------------------------------------- in forward and backward


def test_noise_and_scaled_rows_on_layers_of_peft():
    model = net(target_modules=["fc", "gpt", "out"])
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(model), lr=1e-3)
    plain = model(TOKENS).detach()
    noise = lo.noise_in_forward(model, optimizer)
    assert not torch.allclose(model(TOKENS), plain, atol=1e-4)
    for each in find_factors(model):
        weight = each.layer.get_base_layer().weight + each.layer.get_delta_weight("default")
        weight = weight.mT if each.path.endswith("gpt") else weight
        (hook,) = each.layer._forward_hooks.values()
        assert torch.allclose(hook.scales, 0.03 * weight.norm(dim=1).detach() / weight.shape[1] ** 0.5, rtol=1e-4)
    with model.disable_adapter():
        base = model(TOKENS)
    noise.remove()
    with model.disable_adapter():
        assert torch.equal(base, model(TOKENS))
    model = net(target_modules=["fc", "gpt", "out"], use_dora=True)
    ends = []
    for scale in (None, 0.5):
        model.zero_grad()
        handle = None if scale is None else lo.scale_rows_in_backward(model, scale)
        (model(TOKENS) - 1.0).square().mean().backward()
        ends.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        if handle is not None:
            handle.remove()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, before, after in zip(names, *ends, strict=True):
        if "magnitude" in name:
            assert torch.allclose(after, before, rtol=1e-5)
        else:  # σ is at most η
            assert float(after.norm()) < 0.51 * float(before.norm()), name
    with pytest.raises(ValueError, match=r"can have no noise in forward: Dora.* computes in another way"):
        lo.noise_in_forward(model, optimizer)


@pytest.mark.parametrize("dora", [False, True])
def test_intruders_of_layers_of_peft_are_those_of_the_merged_model(dora: bool):
    targets = ["fc", "gpt", "out"] if dora else ["fc", "gpt", "out", "conv", "embed"]
    model = net(target_modules=targets, use_dora=dora)
    with torch.no_grad():
        for each in find_factors(model):
            each.b.mul_(20.0)
    found = lo.diagnostics.intruder_dimensions(model, 5, 0.7)
    base, merged = copy.deepcopy(model).unload(), copy.deepcopy(model).merge_and_unload()
    whole = lo.diagnostics.intruder_dimensions(merged, 5, 0.7, base=base)
    assert len(found.layers) == len(targets)
    assert found.total > 0
    for name, each in found.layers.items():
        plain = name.removeprefix("base_model.model.").removesuffix(".default")
        if plain != "embed":  # stored as its transpose, of which the other side is looked at
            assert each.similarities == pytest.approx(whole.layers[f"{plain}.weight"].similarities, abs=1e-4), name
