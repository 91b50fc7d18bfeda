"""LoRA-SB and LoRA-XS: the trained r×r matrix, on ordinary pairs, and the initial values."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from tests.adapters.test_pairs import drawn, loss_of, new_pair


def trained_core(basis: Tensor, core: Tensor, a: Tensor, s: float, steps: int, lr: float, decay: float) -> Tensor:
    """B₀R with R trained by torch's AdamW."""
    core = nn.Parameter(core.clone())
    optimizer = torch.optim.AdamW([core], lr=lr, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(a, basis @ core, s, step).backward()
        optimizer.step()
    return (basis @ core).detach()


@pytest.mark.parametrize("given", [False, True])
def test_the_pair_is_what_it_would_be_if_the_core_were_the_parameter(given: bool):
    a, b = new_pair(24, 17, 4)
    polar = torch.linalg.svd(b.detach(), full_matrices=False)
    basis = drawn(24, 4, seed=8) if given else polar.U @ polar.Vh
    core = torch.linalg.lstsq(basis, b.detach()).solution
    with torch.no_grad():
        b.copy_(basis @ core)
    kept = a.detach().clone()
    optimizer = lo.LoRASBAdamW(
        lo.lora_pairs([(a, b, 0.7)], freeze="A"), lr=0.02, weight_decay=0.1, bases={b: basis} if given else None
    )
    for step in range(6):
        optimizer.zero_grad()
        loss_of(a, b, 0.7, step).backward()
        optimizer.step()
    assert torch.allclose(b.detach(), trained_core(basis, core, kept, 0.7, 6, 0.02, 0.1), rtol=1e-9, atol=1e-11)
    assert torch.equal(a.detach(), kept)
    assert sum(lo.state_bytes(optimizer).values()) - 8 <= 8 * (24 * 4 + 2 * 16) + 16


def test_a_stack_of_experts_is_so_many_pairs():
    a, b = (nn.Parameter(drawn(*shape, seed=n)) for n, shape in enumerate([(6, 15), (11, 6)]))
    (group,) = lo.lora_pairs([(a, b, 1.0)], freeze="A")
    apart = [(a.detach()[2 * e : 2 * e + 2].clone(), nn.Parameter(b.detach()[:, e::3].clone())) for e in range(3)]
    whole = lo.LoRASBAdamW([{**group, "experts": [3]}], lr=0.02)
    single = lo.LoRASBAdamW(lo.lora_pairs([(*pair, 1.0) for pair in apart], freeze="A"), lr=0.02)
    for step in range(3):
        grad = drawn(11, 6, seed=20 + step)
        b.grad = grad
        for e, (_, own) in enumerate(apart):
            own.grad = grad[:, e::3].clone()
        whole.step()
        single.step()
    for e, (_, own) in enumerate(apart):
        assert torch.allclose(b[:, e::3], own, rtol=1e-10)


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one():
    a, b = new_pair(24, 17, 4, torch.float32)
    optimizer = lo.LoRASBAdamW(lo.lora_pairs([(a, b, 1.0)], freeze="A"), lr=0.01)

    def go(a: Tensor, b: Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(a, b, 1.0, step).backward()
            optimizer.step()

    go(a, b, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(b.detach().clone())
    other = lo.LoRASBAdamW(lo.lora_pairs([(a, again, 1.0)], freeze="A"), lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    go(a, b, optimizer, range(2, 4))
    go(a, again, other, range(2, 4))
    assert torch.equal(b, again)


def test_what_cannot_be_trained_so_is_refused():
    a, b = new_pair(24, 17, 4, zero=True)
    with pytest.raises(ValueError, match="LoRA-SB keeps A as it is"):
        lo.LoRASBAdamW(lo.lora_pairs([(a, nn.Parameter(b.detach() + drawn(24, 4, seed=1)), 1.0)]))
    groups = lo.lora_pairs([(a, b, 1.0)], freeze="A")
    with pytest.raises(ValueError, match=r"B of pair 0 \(24, 4\) has linearly dependent columns"):
        lo.LoRASBAdamW(groups)
    with pytest.raises(ValueError, match=r"the basis of B of pair 0 is \(4, 24\)"):
        lo.LoRASBAdamW(groups, bases={b: drawn(4, 24, seed=1)})


# ---------------------------------------------------------------------------------------------------------- initial values


class Adapted(nn.Module):
    """A linear layer with the attributes of peft's."""

    def __init__(self, m: int, n: int, transposed: bool, seed: int) -> None:
        super().__init__()
        self.base_layer, self.scaling = nn.Linear(n, m, bias=False).double(), {"default": 0.5}
        self.fan_in_fan_out = transposed
        with torch.no_grad():
            self.base_layer.weight.copy_(drawn(m, n, seed=seed))
        if transposed:
            self.base_layer.weight = nn.Parameter(self.base_layer.weight.detach().mT.contiguous())
        self.base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, 3, bias=False).double()})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, m, bias=False).double()})
        nn.init.zeros_(self.lora_B["default"].weight)

    @property
    def weight(self) -> Tensor:
        """m×n."""
        return self.base_layer.weight.mT if self.fan_in_fan_out else self.base_layer.weight

    @property
    def product(self) -> Tensor:
        return 0.5 * (self.lora_B["default"].weight @ self.lora_A["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.product).mT


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Adapted(14, 9, False, 1), nn.Tanh(), Adapted(14, 14, True, 2), nn.Tanh(), Adapted(7, 14, False, 3)
    )


def loss(model: nn.Module) -> Tensor:
    return (model(drawn(60, 9, seed=5)) - drawn(60, 7, seed=6)).square().mean()


def truncated(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :3] @ torch.diag(values[:3]) @ right[:3]


@pytest.mark.parametrize("init", ["sign", "gradient"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_product_begins_as_the_best_approximation_of_the_first_step(init: str, by_hand: bool):
    model, plain = network(), network()
    layers = [layer for layer in plain if isinstance(layer, Adapted)]
    weights = [nn.Parameter(layer.weight.detach().clone()) for layer in layers]
    x = drawn(60, 9, seed=5)
    for number, weight in enumerate(weights):
        x = x @ weight.mT
        x = torch.tanh(x) if number < 2 else x
    grads = torch.autograd.grad((x - drawn(60, 7, seed=6)).square().mean(), weights)
    marked = model[0].lora_A["default"].weight
    marked.grad = torch.ones_like(marked)
    before = float(loss(model).detach())
    given = {str(2 * n): grad for n, grad in enumerate(grads)} if by_hand else lambda: loss(model)
    bases = lo.lora_sb_(model, given, eta=1e-3, init=init)
    for layer, grad in zip((model[0], model[2], model[4]), grads, strict=True):
        step = -1e-3 * (grad.sign() if init == "sign" else grad)
        assert torch.allclose(layer.product, truncated(step), rtol=1e-8, atol=1e-13)
        basis = bases[layer.lora_B["default"].weight]
        assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)
        assert not layer.base_layer.weight.requires_grad
        assert layer.base_layer.weight.grad is None
    assert float(loss(model).detach()) < before
    assert torch.equal(marked.grad, torch.ones_like(marked))
    optimizer = lo.LoRASBAdamW(lo.lora_pairs(model, freeze="A"), bases=bases, lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model).detach()) < before
    for layer in (model[0], model[2], model[4]):
        trained, basis = layer.lora_B["default"].weight.detach(), bases[layer.lora_B["default"].weight]
        assert torch.linalg.norm(trained - basis @ (basis.mT @ trained)) <= 1e-12 * torch.linalg.norm(trained)


def test_lora_xs_has_the_leading_directions_of_the_weights_and_hardly_changes_the_model():
    model = network()
    before = model(drawn(5, 9, seed=9)).detach()
    bases = lo.lora_sb_(model, init="weight")
    assert torch.allclose(model(drawn(5, 9, seed=9)), before, atol=1e-2)
    for layer in (model[0], model[2], model[4]):
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(bases[pair[1]] @ pair[0], truncated(layer.weight.detach()), atol=1e-10)
        core = torch.linalg.lstsq(bases[pair[1]], pair[1].detach()).solution
        assert 2e-6 < float(core.std()) < 3e-5
    again = network()
    lo.lora_sb_(again, init="weight")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_initial_values_that_cannot_be_found_are_refused_and_nothing_changes():
    model = network()
    before = copy.deepcopy(model.state_dict())
    grads = {"0": drawn(14, 9, seed=1), "2": drawn(14, 14, seed=2), "4": drawn(7, 14, seed=3)}
    for given, options, message in (
        (None, {"eta": 1.0}, "needs gradients"),
        (grads, {}, "eta is None"),
        (grads, {"eta": 1.0, "init": "xs"}, "init is 'xs'"),
        ({"0": grads["0"]}, {"eta": 1.0}, "there is no gradient for 2"),
        ({**grads, "4": grads["4"].mT}, {"eta": 1.0}, r"the gradient of 4 is \(14, 7\)"),
        ({**grads, "4": torch.zeros(7, 14)}, {"eta": 1.0}, "of 4 is zero or of a rank below 3"),
        ({**grads, "4": torch.full((7, 14), torch.nan)}, {"eta": 1.0}, "of 4 holds NaN"),
        (lambda: model[0](drawn(2, 9, seed=1)).sum(), {"eta": 1.0, "init": "sign"}, "0 is zero or of a rank below 3"),
        (grads, {"eta": 1.0, "adapter": "other"}, "no adapter 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            lo.lora_sb_(model, given, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model[0].base_layer.weight.requires_grad
    assert model[0].lora_A["default"].weight.requires_grad
