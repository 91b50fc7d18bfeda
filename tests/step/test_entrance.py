"""What comes into a step: parameters without elements, replaced or resized ones, gradients of unusual kinds.

Each is trained like its plain counterpart, or refused, by name, before anything changes.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels

EMPTY = [(0,), (8, 0), (0, 8), (0, 0), (0, 12, 8), (3, 0, 8), (3, 12, 0), (0, 3, 3, 3), (8, 0, 3, 3)]
FRUGAL = [{"coordinates": "columns"}, {"coordinates": "rows"}, {"coordinates": "entries"}, {"blocks": "random"}]
WAYS = ["step", "device mask", "backward", "micro-batches"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(draw(i, *shape)) for i, shape in enumerate(shapes)]


def build(name: str, params: list, **options: object) -> lo.LowRankOptimizer:
    options = {"lr": 1e-2, "update_proj_gap": 2, **options}
    if not {"rank", "density", "blocks", "coordinates"} & options.keys():
        options["rank"] = 1 if name == "apollo_mini" else 4
    return lo.by_name(name)(params, **options)


def values(params: list[nn.Parameter], optimizer: lo.LowRankOptimizer) -> list[Tensor]:
    """Copies of all that a step may change."""
    state = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in (*params, *state)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------------------------ empty parameters


def train(name: str, way: str, empty: list[tuple[int, ...]], options: dict) -> list[Tensor]:
    """Two matrices after a few steps, with parameters of shapes `empty` beside them in a group of their own."""
    params = weights((96, 64), (24, 16))
    groups = [{"params": params}, {"params": [nn.Parameter(torch.zeros(shape)) for shape in empty]}]
    optimizer = build(name, groups, **options)
    optimizer._mask_on_device = way == "device mask"
    batches = 2 if way == "micro-batches" else 1
    if way in ("backward", "micro-batches"):
        lo.update_in_backward(optimizer, accumulate=batches)
    for step in range(5):
        for batch in range(batches):
            every = [p for group in groups for p in group["params"]]
            sum((p * draw(100 + 10 * step + batch, *p.shape)).sum() for p in every).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [p.detach() for p in params]


METHODS = [(name, {}) for name in lo.METHODS if name not in ("lisa", "badam")]
METHODS += [("frugal", option) for option in FRUGAL]
METHODS += [("galore", {"projector": projector}) for projector in ("svd", "random", "coordinate:entries")]
METHODS += [("galore", {"state_bits": bits}) for bits in (16, 8, 4)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_empty_parameters_of_every_shape_are_taken_and_change_nothing(name, options, way):
    in_backward, scaled = (
        way in ("backward", "micro-batches"),
        name in ("fira", "alice", "apollo", "apollo_mini", "subtrack"),
    )
    signs = name.startswith("frugal") and name != "frugal_sgd"
    if (name == "ldadam" and in_backward) or (way == "micro-batches" and (scaled or signs)):
        pytest.skip("refused by name")
    expected = train(name, way, [], options)
    assert not torch.equal(expected[0], draw(0, 96, 64))
    assert_same(train(name, way, EMPTY, options), expected)


@pytest.mark.parametrize("layout", ["conv", "transposed"])
def test_empty_stacks_and_convolutions_are_taken_in_every_layout(layout):
    for name in ("galore", "frugal"):
        for shape in EMPTY[1:]:
            params = [nn.Parameter(torch.zeros(shape)), *weights((24, 16))]
            optimizer = build(name, [{"params": params, "layout": layout}])
            sum(p.sum() for p in params).backward()
            optimizer.step()
            assert optimizer.state[params[0]]["step"] == 1
            assert not torch.equal(params[1], draw(0, 24, 16))


def test_describe_calls_an_empty_parameter_dense():
    group = {"params": [("a", nn.Parameter(torch.zeros(8, 0)))], "rank": 4}
    assert "dense (empty)" in lo.describe([group])


# ------------------------------------------------------------------------------------------------------------ unusual gradients


class Named(Tensor):
    """A subclass of Tensor that holds its own numbers."""


def odd_views(grad: Tensor) -> dict[str, Tensor]:
    """The gradient as tensors whose memory does not hold its values as they are."""
    room = torch.zeros(*grad.shape[:-1], 2 * grad.shape[-1])
    room[..., ::2] = grad
    return {
        "negative": torch._neg_view(-grad),
        "conjugate": torch.complex(torch.zeros_like(grad), -grad).conj().imag,
        "every other column": room[..., ::2],
        "transposed": grad.mT.contiguous().mT,
        "subclass": grad.as_subclass(Named),
        "zero": torch._efficientzerotensor(grad.shape),
        "one row": grad[:1].expand(grad.shape),
        "one column": grad[:, :1].expand(grad.shape),
        "one number": grad[:1, :1].expand(grad.shape),
    }


KINDS = list(odd_views(torch.zeros(2, 2)))
TOGETHER = [(96, 64), (64, 80), (80, 64)]  # of sizes that are coded, and that one launch takes together
WITH_GRADIENTS = [
    ("galore", {"rank": None, "state_bits": 8}),
    ("galore", {"rank": None}),
    ("galore", {"state_bits": 8, "rank": 48}),
    ("galore", {}),
    ("apollo", {"state_bits": 4, "rank": 48}),
    ("fira", {}),
    ("ldadam", {}),
    ("frugal", {"coordinates": "columns"}),
    ("frugal", {"blocks": "random"}),
    ("frugal_lion", {"coordinates": "entries"}),
]


def run(name: str, kind: str, odd: bool, options: dict, in_backward: bool) -> list[Tensor]:
    params = weights(*TOGETHER)
    optimizer = build(name, params, **options)
    if in_backward:
        lo.update_in_backward(optimizer, max_grad_norm=0.5)
    for step in range(4):
        for i, param in enumerate(params):
            grad = odd_views(draw(100 * step + i, *param.shape))[kind]
            param.grad = grad if odd else torch.empty_like(param).copy_(grad)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in params]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), WITH_GRADIENTS, ids=str)
def test_gradients_of_every_kind_train_like_plain_ones(name, options, kind, in_backward):
    if in_backward and name == "ldadam":
        pytest.skip("refused by name")
    expected, found = (run(name, kind, odd, options, in_backward) for odd in (False, True))
    assert kind == "zero" or not torch.equal(expected[0], draw(0, *TOGETHER[0]))
    exact = kind not in ("every other column", "transposed")  # products of other strides may round differently
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0 if exact else 1e-3)


def test_norms_of_every_kind_are_those_of_the_values():
    grad = draw(3, 96, 64)
    for tensor in odd_views(grad).values():
        (norm,) = kernels.norms([tensor])
        expected = torch.linalg.vector_norm(torch.empty_like(grad).copy_(tensor).double())
        torch.testing.assert_close(float(norm), float(expected), rtol=1e-4, atol=0)


def freed(like: Tensor) -> Tensor:
    grad = torch.ones_like(like)
    grad.untyped_storage().resize_(0)
    return grad


def fake(like: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(like.shape)


REFUSED = {
    "freed": (freed, "has no memory: its storage was freed"),
    "fake": (fake, "is a FakeTensor, whose numbers the step cannot read, the parameter a Parameter"),
    "coo": (lambda p: torch.ones_like(p).to_sparse(), "is sparse; make it dense.*SparseAdam"),
}


def attach(param: nn.Parameter, kind: str) -> str:
    """Give the parameter a gradient that no step can use; returns a part of the message."""
    if kind == "shape":
        param.grad = torch.ones_like(param)
        param.grad.data = torch.ones(3)
        return r"is \(3,\) on cpu, the parameter \(96, 64\) on cpu"
    if kind == "type":
        param.grad = torch.ones_like(param)
        param.grad.data = torch.ones(param.shape, dtype=torch.float64)
        return r"is torch.float64, the parameter torch.float32; convert it"
    make, message = REFUSED[kind]
    param.grad = make(param)
    return message


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", ["freed", "fake", "coo", "shape", "type"])
@pytest.mark.parametrize("options", [{}, {"rank": None, "state_bits": 8}], ids=str)
def test_a_gradient_that_no_step_can_use_is_refused_before_anything_changes(options, kind, in_backward):
    params = weights((64, 96), (96, 64))
    optimizer = build("galore", [("first", params[0]), ("layer.weight", params[1])], **options)
    if in_backward:
        lo.update_in_backward(optimizer)
    before = values(params, optimizer)
    params[0].grad = torch.ones_like(params[0])
    message = attach(params[1], kind)
    with pytest.raises(ValueError, match=f"the gradient of layer.weight {message}"):
        optimizer.step()
    assert_same(values(params, optimizer), before)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.vmap(f, in_dims=0)])
def test_a_gradient_inside_of_a_transform_is_refused(transform):
    (param,) = weights((96, 64))
    optimizer = build("galore", [param])
    before = values([param], optimizer)

    def step(x: Tensor) -> Tensor:
        param.grad = x
        with pytest.raises(ValueError, match=r"the gradient of 0\.0 belongs to a transform of torch\.func"):
            optimizer.step()
        return x.sum()

    transform(step)(torch.ones(96, 64) if transform is torch.func.grad else torch.ones(2, 96, 64))
    assert_same(values([param], optimizer), before)


UNWRITABLE = {
    "one row": lambda: torch.ones(1, 8).expand(12, 8),
    "one column": lambda: torch.ones(12, 1).expand(12, 8),
    "zero": lambda: torch._efficientzerotensor((12, 8)),
    "negative": lambda: torch._neg_view(torch.ones(12, 8)),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_parameters_that_cannot_be_written_to_as_they_lie_are_refused(kind):
    with pytest.raises(ValueError, match=r"parameter 0\.0 \(12, 8\) is a view with a negative bit.*only a copy of it"):
        lo.GaLoreAdamW([nn.Parameter(UNWRITABLE[kind]())], rank=4)
    params = weights((24, 16), (12, 8))
    optimizer = build("galore", params)
    before = values(params[:1], optimizer)
    params[1].data = UNWRITABLE[kind]()
    params[0].grad = torch.ones(24, 16)
    with pytest.raises(ValueError, match=r"parameter 0\.1 \(12, 8\) is a view with a negative bit"):
        optimizer.step()
    assert_same(values(params[:1], optimizer), before)


# --------------------------------------------------------------------------------------------- parameters that are not the same


def trained(name: str, **options: object) -> tuple[nn.Sequential, lo.LowRankOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    optimizer = build(name, lo.param_groups(model, rank=None), **options)
    backward(model)
    optimizer.step()
    return model, optimizer


def backward(model: nn.Sequential) -> None:
    model.zero_grad()
    model(draw(1, 16, model[0].in_features)).square().mean().backward()


def grow(model: nn.Sequential) -> str:
    """More columns, in the same parameter."""
    old = model[0].weight.data
    model[0].weight.data = torch.cat([old, torch.zeros(96, 16)], 1)
    model[0].in_features = 80
    return r"0\.weight has shape \(96, 80\), and had \(96, 64\) when the optimizer was built.*build a new optimizer"


def replace(model: nn.Sequential, optimizer: lo.LowRankOptimizer) -> str:
    """Another tensor in the module and in the group."""
    old, model[0].weight = model[0].weight, nn.Parameter(torch.zeros(96, 64))
    for group in optimizer.param_groups:
        group["params"] = [model[0].weight if p is old else p for p in group["params"]]
    return r"0\.weight \(96, 64\) was replaced by a parameter \(96, 64\) torch.float32 in param group 0.*param.copy_"


def append(model: nn.Sequential, optimizer: lo.LowRankOptimizer) -> str:
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3, 4)))
    return r"a parameter \(3, 4\) torch.float32 in param group 0 has no state.*optimizer.add_param_group"


CHANGES = {"grow": lambda model, _: grow(model), "replace": replace, "append": append}
ANY = [("frugal", {"coordinates": "columns"}), ("frugal", {"blocks": "random"}), ("galore", {}), ("ldadam", {})]
ANY += [("galore", {"rank": None, "state_bits": 8})]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "options"), ANY, ids=str)
def test_a_parameter_that_is_another_or_has_another_shape_is_named_before_anything_changes(name, options, change):
    model, optimizer = trained(name, **options)
    saved = copy.deepcopy(optimizer.state_dict())
    known = list(optimizer.state)
    message = CHANGES[change](model, optimizer)
    before = values(known, optimizer)
    backward(model)
    load, attach_hooks = lambda: optimizer.load_state_dict(saved), lambda: lo.update_in_backward(optimizer)
    for call in (optimizer.step, load, attach_hooks, optimizer.step):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert_same(values(known, optimizer), before)


@pytest.mark.parametrize("change", ["replace", "append"])
def test_a_checkpoint_of_other_parameters_is_refused_by_name(change):
    """torch has a KeyError of an address for it."""
    model, optimizer = trained("galore")
    message = CHANGES[change](model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.state_dict()


def test_in_backward_a_grown_parameter_is_named_and_stays():
    model, optimizer = trained("frugal", lr=0.1)
    lo.update_in_backward(optimizer)
    message, other = grow(model), model[1].weight.detach().clone()
    before = values([model[0].weight], optimizer)
    with pytest.raises(RuntimeError, match=message):
        backward(model)
    assert_same(values([model[0].weight], optimizer), before)
    assert not torch.equal(model[1].weight, other)


def test_a_conversion_hides_no_other_shape():
    """Layouts are made anew when a parameter is converted."""
    model, optimizer = trained("frugal")
    message = grow(model)
    model[1].double()
    model.zero_grad()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_resized_embeddings_are_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = lo.FrugalAdamW(lo.param_groups(model, density=0.25))
    model.resize_token_embeddings(80)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight has shape \(80, 32\), and had \(64, 32\)"):
        optimizer.step()
