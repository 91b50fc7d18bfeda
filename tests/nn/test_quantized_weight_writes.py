"""Writes to 8-bit weights arrive in the codes or raise: in place, through views, in lists, as results, and below the dispatcher."""

import copy
import inspect
import io
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import lowrank_optim as lo
from lowrank_optim.nn import QuantizedWeight
from lowrank_optim.nn.quantized_weight import WeightView

ROWS, COLS = 8, 12
StepParams = Callable[[Any], object]


def start(dtype: torch.dtype = torch.float32, rows: int = ROWS, cols: int = COLS) -> QuantizedWeight:
    return QuantizedWeight.from_float(torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype))


def levels(weight: QuantizedWeight) -> Tensor:
    """The distance of two codes, for each element."""
    return weight.scale.repeat_interleave(256, -1)[:, : weight.shape[1]] / 127


def assert_same(weight: QuantizedWeight, dense: Tensor, tolerance: float = 1.0) -> None:
    error = (weight.decoded(torch.float32) - dense.float()).abs()
    assert torch.all(error <= tolerance * levels(weight) * 1.01 + 1e-6), error.max()


def written_both(write: StepParams, dtype: torch.dtype) -> tuple[QuantizedWeight, Tensor]:
    """An 8-bit weight and a float32 matrix of the same values, after the same write."""
    weight = start(dtype)
    dense = weight.decoded(torch.float32)
    with torch.no_grad():
        for target in (dense, weight):
            torch.manual_seed(3)
            write(target)
    return weight, dense


GRID = torch.arange(float(ROWS * COLS)).view(ROWS, COLS)

VIEWS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda w: w[2:5],
    "row": lambda w: w[3],
    "column": lambda w: w[..., 3],
    "element": lambda w: w[1, 2],
    "step": lambda w: w[1::2, ::3],
    "none": lambda w: w[None, 2:4],
    "view": lambda w: w.view(-1)[5:9],
    "view_3d": lambda w: w.view(2, 4, COLS)[1],
    "view_as": lambda w: w.view_as(torch.empty(4, 24))[2],
    "reshape": lambda w: w.reshape(4, 24)[1],
    "flatten": lambda w: w.flatten()[7:20],
    "ravel": lambda w: w.ravel()[3:],
    "unflatten": lambda w: w.unflatten(1, (3, 4))[:, 1],
    "t": lambda w: w.t()[2],
    "T": lambda w: w.T[1:],
    "mT": lambda w: w.mT[2:],
    "transpose_twice": lambda w: w.transpose(0, 1)[2:].transpose(0, 1)[1:],
    "permute": lambda w: w.permute(1, 0)[1:],
    "movedim": lambda w: w.movedim(0, 1)[1:],
    "swapaxes": lambda w: w.swapaxes(0, 1)[1:],
    "narrow": lambda w: w.narrow(1, 2, 3),
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: w.split(3)[2],
    "split_sizes": lambda w: w.split([3, 5], 0)[1],
    "tensor_split": lambda w: w.tensor_split(3, 1)[2],
    "hsplit": lambda w: torch.hsplit(w, 2)[1],
    "unsafe_chunk": lambda w: w.unsafe_chunk(4)[1],
    "unsafe_view": lambda w: torch.ops.aten._unsafe_view(w, (4, 24))[1],
    "select": lambda w: w.select(0, 3),
    "diagonal": lambda w: w.diagonal(),
    "linalg_diagonal": lambda w: torch.linalg.diagonal(w, offset=1),
    "unbind": lambda w: w.unbind(1)[4],
    "iterated": lambda w: list(w)[3],
    "as_strided": lambda w: w[2:].as_strided((4,), (13,), 1),
    "expand": lambda w: w.expand(2, ROWS, COLS)[0],
    "broadcast_to": lambda w: torch.broadcast_to(w, (1, ROWS, COLS))[0],
    "squeeze": lambda w: w.unsqueeze(0).squeeze(0),
    "unfold": lambda w: w.unfold(1, 4, 4)[:, 1],
    "einsum": lambda w: torch.einsum("ij->ji", w)[1],
    "dropout": lambda w: nn.functional.dropout(w, training=False),
    "contiguous": lambda w: w.contiguous(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data[2:],
    "data_of_view": lambda w: w[2:].data,
    "detached_view": lambda w: w[2:].detach(),
    "alias": lambda w: torch.ops.aten.alias(w[2:]),
    "shallow_copy": lambda w: copy.copy(w),
    "parameter": lambda w: nn.Parameter(w).data[1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_live(name: str, dtype: torch.dtype) -> None:
    def write(target: Any) -> None:
        part = VIEWS[name](target)
        part.mul_(0.5)
        part.fill_(5.0)
        part.sub_(0.5)

    weight, dense = written_both(write, dtype)
    assert_same(weight, dense, tolerance=2.0)  # other elements of a row are rounded when its scale changes
    assert torch.equal(VIEWS[name](weight) + 0, VIEWS[name](weight.decoded()))
    written = VIEWS[name](weight.decoded(torch.float32))
    assert torch.all((written - 4.5).abs() <= 4.5 / 127)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_live_in_inference_mode(name: str) -> None:
    weight = start()
    with torch.inference_mode():
        VIEWS[name](weight).fill_(5.0)
        assert torch.all((VIEWS[name](weight.decoded()) - 5.0).abs() <= 5.0 / 127)


WRITES: dict[str, StepParams] = {
    "setitem": lambda w: w.__setitem__(slice(0, 3), 0),
    "setitem_row": lambda w: w.__setitem__(slice(None), torch.ones(COLS)),
    "setitem_mask": lambda w: w.__setitem__(w > 0, 0.25),
    "setitem_index": lambda w: w.__setitem__(torch.tensor([1, 3]), torch.ones(2, COLS, dtype=w.dtype)),
    "iadd": lambda w: w.__iadd__(1),
    "mul_": lambda w: w.mul_(2.0),
    "add_itself": lambda w: w.add_(w),
    "copy_row": lambda w: w.copy_(GRID[1]),
    "copy_rolled": lambda w: w.copy_(w.roll(1, 0)),
    "lerp_": lambda w: w.lerp_(GRID.to(w.dtype), 0.5),
    "addmm_": lambda w: w.addmm_(GRID[:, :3].to(w.dtype), GRID[:3].to(w.dtype)),
    "negative_bit": lambda w: w.add_(GRID.to(w.dtype)._neg_view()),
    "zero_": lambda w: w.zero_(),
    "fill_diagonal_": lambda w: w.fill_diagonal_(4.0),
    "index_put_": lambda w: w.index_put_((torch.tensor([0, 0]),), torch.ones((), dtype=w.dtype), accumulate=True),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([2]), torch.ones(1, COLS, dtype=w.dtype)),
    "index_fill_": lambda w: w.index_fill_(1, torch.tensor([2]), 7.0),
    "masked_fill_": lambda w: w.masked_fill_(torch.eye(ROWS, COLS).bool(), 3.0),
    "scatter_": lambda w: w.scatter_(1, torch.zeros(ROWS, 1, dtype=torch.long), 1.5),
    "put_": lambda w: w.put_(torch.tensor([3]), torch.tensor([9.0], dtype=w.dtype)),
    "renorm_": lambda w: w.renorm_(2, 0, 0.5),
    "embedding": lambda w: nn.functional.embedding(torch.tensor([0, 1]), w, max_norm=0.1),
    "relu_": lambda w: nn.functional.relu_(w),
    "dropout_": lambda w: nn.functional.dropout(w, 0.5, True, inplace=True),
    "uniform_": lambda w: nn.init.uniform_(w),
    "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "xavier_normal_": lambda w: nn.init.xavier_normal_(w),
    "eye_": lambda w: nn.init.eye_(w),
    "constant_": lambda w: nn.init.constant_(w, 0.3),
    "dirac_": lambda w: nn.init.dirac_(w.view(ROWS, COLS, 1)),
    "out": lambda w: torch.add(GRID, 2, out=w),
    "out_itself": lambda w: torch.mul(w, 2, out=w),
    "out_mm": lambda w: torch.mm(GRID[:, :3].to(w.dtype), GRID[:3].to(w.dtype), out=w),
    "out_view": lambda w: torch.add(GRID[:3], 2, out=w[2:5]),
    "out_two_views": lambda w: torch.aminmax(GRID.to(w.dtype), dim=0, out=(w.detach()[0], w.detach()[1])),
    "out_list": lambda w: torch.split_copy(GRID.to(w.dtype), 4, out=[w[:4], w[4:]]),
    "out_of_no_input": lambda w: torch.ones(ROWS, COLS, out=w),
    "foreach_add_": lambda w: torch._foreach_add_([w, torch.ones(3)], 1.0),
    "foreach_scalars": lambda w: torch._foreach_mul_([torch.ones(2), w], [1.0, 2.0]),
    "foreach_tensor_of_scalars": lambda w: torch._foreach_addcdiv_(
        [torch.ones(2), w],
        [torch.ones(2), GRID.to(w.dtype)],
        [torch.ones(2), GRID.to(w.dtype) + 1],
        torch.tensor([1.0, 2.0]),
    ),
    "foreach_lerp_": lambda w: torch._foreach_lerp_([w], [GRID.to(w.dtype)], 0.25),
    "foreach_copy_": lambda w: torch._foreach_copy_([w], [GRID]),
    "foreach_zero_": lambda w: torch._foreach_zero_([torch.ones(3), w]),
    "foreach_out": lambda w: torch.ops.aten._foreach_add.Scalar_out([GRID], 2.0, out=[w]),
    "foreach_views": lambda w: torch._foreach_mul_(list(w.split(3)), 2.0),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(GRID.flatten() + 1, [w]),
    "data": lambda w: setattr(w, "data", GRID + 1),
    "data_copy": lambda w: w.data.copy_(GRID),
    "aten_set_data": lambda w: torch.ops.aten.set_data(w, GRID + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITES)
def test_writes_arrive(name: str, dtype: torch.dtype) -> None:
    weight, dense = written_both(WRITES[name], dtype)
    assert_same(weight, dense)
    assert not torch.equal(weight.codes, start(dtype).codes) or not torch.equal(weight.scale, start(dtype).scale)


def test_a_write_returns_the_weight_itself() -> None:
    weight = start()
    assert weight.mul_(2.0) is weight
    assert torch.add(GRID, 1, out=weight) is weight
    row = weight[2]
    assert row.zero_() is row


REFUSED: dict[str, StepParams] = {
    "resize_": lambda w: w.resize_(3, 3),
    "resize_as_": lambda w: w.resize_as_(torch.empty(3)),
    "t_": lambda w: w.t_(),
    "square_t_": lambda w: w[:, :ROWS].t_(),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "as_strided_": lambda w: w.as_strided_((2, 2), (1, 1)),
    "set_": lambda w: w.set_(torch.ones(ROWS, COLS)),
    "set_storage": lambda w: w.set_(torch.ones(ROWS, COLS).untyped_storage()),
    "bits": lambda w: w.view(torch.int32).zero_(),
    "complex": lambda w: torch.view_as_complex(w.view(ROWS, 6, 2)).zero_(),
    "negative_view": lambda w: w._neg_view(),
    "out_of_another_shape": lambda w: torch.add(torch.ones(3, COLS), 2, out=w),
    "overlapping": lambda w: w.expand(2, ROWS, COLS).add_(1.0),
    "data_of_another_shape": lambda w: setattr(w, "data", torch.ones(3)),
    "data_of_integers": lambda w: setattr(w, "data", torch.ones(ROWS, COLS, dtype=torch.long)),
    "data_of_a_view": lambda w: setattr(w[0], "data", torch.ones(COLS)),
    "apply_": lambda w: w.apply_(lambda x: 0.0),
    "map_": lambda w: w.map_(torch.ones(ROWS, COLS), lambda x, y: y),
    "numpy": lambda w: w.numpy(),
    "dlpack": lambda w: torch.from_dlpack(w),
    "dlpack_of_a_view": lambda w: torch.from_dlpack(w[0]),
    "storage": lambda w: w.storage().fill_(0),
    "untyped_storage": lambda w: w.untyped_storage().fill_(0),
    "copy_into_storage": lambda w: w.untyped_storage().copy_(torch.ones(ROWS, COLS).untyped_storage()),
    "resize_storage": lambda w: w.untyped_storage().resize_(0),
    "storage_of_a_view": lambda w: w[0].untyped_storage().fill_(0),
    "foreach_resize": lambda w: torch.ops.aten._foreach_add.Scalar_out([torch.ones(3)], 2.0, out=[w]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_arrive_raises_and_changes_nothing(name: str) -> None:
    weight = start()
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        REFUSED[name](weight)
    assert weight.shape == (ROWS, COLS)
    assert torch.equal(weight.codes, start().codes)
    assert torch.equal(weight.scale, start().scale)


def test_the_messages_say_what_to_do() -> None:
    weight = start()
    with pytest.raises(NotImplementedError, match=r"t_.*QuantizedWeight \(8, 12\).*weight\.copy_\(values\)"):
        weight.t_()
    with pytest.raises(RuntimeError, match=r"needs a result of shape \(3, 12\); got a QuantizedWeight \(8, 12\)"):
        torch.add(torch.ones(3, COLS), 2, out=weight)
    with pytest.raises(ValueError, match=r"\(8, 12\) torch.float32 was set to \(3,\) torch.float32; needed"):
        weight.data = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"no memory of type torch\.float32.*weight\.decoded\(\)"):
        torch.from_dlpack(weight)


# ------------------------------------------------------------------------------------------------- every operation of torch


def writing_operations() -> Iterator[Any]:
    """The public ones, and those on lists; internal ones take any memory for what they expect, and crash."""
    for name in sorted(dir(torch.ops.aten)):
        if not re.match(r"[a-z]|_foreach_|__i", name) or re.search(INTERNAL, name):
            continue
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            func = getattr(packet, overload)
            if func._schema.is_mutable:
                yield func


SIMPLE: dict[str, list[Any]] = {
    "Tensor": [
        GRID / 50,
        torch.ones(ROWS, COLS, dtype=torch.bool),
        torch.zeros(ROWS, 1, dtype=torch.long),
        torch.tensor([1, 2]),
    ],
    "Optional[Tensor]": [None],
    "number": [0.5],
    "float": [0.5],
    "int": [1],
    "SymInt": [1],
    "bool": [False],
    "List[Tensor]": [[GRID / 50, torch.ones(3)]],
    "List[number]": [[0.5, 2.0]],
    "List[float]": [[0.5, 2.0]],
    "List[int]": [[ROWS, COLS]],
    "List[SymInt]": [[ROWS, COLS]],
    "Optional[number]": [0.25, None],
    "Optional[float]": [0.25, None],
    "Optional[int]": [None],
    "Optional[SymInt]": [None],
    "Optional[bool]": [None],
    "Optional[Generator]": [None],
}


def argument_sets(func: Any) -> Iterator[dict[str, Any]]:
    """Arguments by name that may suit an operation; `None` stands for the tensor or list that is written."""
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    others = [a for a in func._schema.arguments if a.name not in written and a.default_value is None]
    others = [a for a in others if not (a.kwarg_only and str(a.type).startswith("Optional"))]
    if len(written) != 1 or any(str(a.type) not in SIMPLE for a in others):
        return
    for choice in range(4):
        for rotation in range(2):
            made = {}
            for i, argument in enumerate(others):
                values = SIMPLE[str(argument.type)]
                made[argument.name] = values[(choice + i * rotation) % len(values)]
            yield {written[0]: None, **made}


INTERNAL = "backward|cudnn|mkldnn|miopen|mps|fbgemm|quantize|q_|sparse|csr|csc|coo|nested|lstm|gru|rnn|empty|from_file|set_|_packed"


def results_of(func: Any, make: Callable[[], Any], given: dict[str, Any]) -> tuple[Any, Exception | None]:
    """What an operation leaves in the tensor that it writes to, and what it raised."""
    target = make()
    argument = next(a for a in func._schema.arguments if a.name in given and given[a.name] is None and a.alias_info)
    listed = str(argument.type) == "List[Tensor]"
    written = {argument.name: [target, torch.ones(3)] if listed else target}
    torch.manual_seed(5)
    try:
        func(**copy.deepcopy({name: value for name, value in given.items() if name not in written}), **written)
    except Exception as error:
        return target, error
    return target, None


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_no_operation_of_torch_loses_a_write() -> None:
    """Whatever a plain matrix takes, an 8-bit weight takes with the same result, or raises and is as before."""
    arrived, raised, wrong = [], [], []
    for func in writing_operations():
        for given in argument_sets(func):
            with torch.no_grad():
                dense, error = results_of(func, lambda: start().decoded(), given)
                if error is not None:
                    continue
                weight, refused = results_of(func, start, given)
            if refused is not None:
                raised.append(str(func))
                same = torch.equal(weight.codes, start().codes) and torch.equal(weight.scale, start().scale)
            else:
                arrived.append(str(func))
                decoded = weight.decoded()
                finite = torch.isfinite(dense).all(-1)
                near = (decoded - dense).abs() <= dense.abs().amax(-1, keepdim=True) / 127 * 1.01 + 1e-6
                same = (
                    dense.shape == weight.shape
                    and bool(near[finite].all())
                    and not torch.isfinite(decoded[~finite]).any()
                )
            if not same:
                wrong.append(str(func))
            break
    assert not wrong
    assert len(arrived) > 250, len(arrived)
    assert len(raised) < len(arrived) / 2, raised


# ------------------------------------------------------------------------------------------------------------------ rounding


def test_writes_round_stochastically_with_the_right_mean() -> None:
    weight = QuantizedWeight.from_float(
        torch.full((64, 256), 0.5).index_fill_(1, torch.tensor([0]), 127.0)
    )  # a level is 1
    before = weight.decoded()
    for _ in range(200):
        weight[:, 1:].add_(0.01)
    moved = (weight.decoded() - before)[:, 1:].double()
    assert float(moved.mean()) == pytest.approx(2.0, abs=5 * (2.0 / moved.numel()) ** 0.5)
    assert len(moved.unique()) > 2


def test_rounding_depends_on_values_and_number_of_writes_alone() -> None:
    """Replicas that make the same writes stay equal, whatever else their processes have drawn or loaded."""
    first, second = start(), start()
    second.copy_(GRID.bfloat16())
    second.copy_(first)
    for step in range(5):
        for weight in (first, second):
            torch.manual_seed(int(weight is first))
            weight.add_(torch.full((ROWS, COLS), 1e-3 * step))
    assert torch.equal(first.codes, second.codes)
    again = start()
    states = {tuple(copy.deepcopy(again).add_(1e-3).codes.flatten().tolist())}
    for _ in range(5):
        trial = start()
        trial.writes[0] = len(states)
        states.add(tuple(trial.add_(1e-3).codes.flatten().tolist()))
    assert len(states) > 1


def test_copies_of_16_bit_values_do_not_drift() -> None:
    weight = start(torch.bfloat16)
    for _ in range(50):
        weight.copy_(weight.detach() * 1.0)
        weight[2:] = weight[2:] * 1.0
        weight.data = weight.data * 1.0
    assert torch.equal(weight.codes, start(torch.bfloat16).codes)


def test_lists_are_decoded_one_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    most = 0
    decoded = QuantizedWeight.decoded

    def counted(self: QuantizedWeight, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        result = decoded(self, *args, **kwargs)
        alive.append(1)
        most = max(most, len(alive))
        weakref.finalize(result, alive.pop)
        return result

    weights = [start() for _ in range(6)]
    monkeypatch.setattr(QuantizedWeight, "decoded", counted)
    torch._foreach_add_(weights, 1.0)
    assert most == 1


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    for write in (
        lambda w: w.mul_(2),
        lambda w: w[:3].zero_(),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: w.t().zero_(),
    ):
        layer = lo.nn.quantize_weights_(nn.Linear(COLS, ROWS), include="weight")
        loss = layer(torch.ones(2, COLS).requires_grad_()).sum()
        with torch.no_grad():
            write(layer.weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_views_pass_gradients_on() -> None:
    weight = nn.Parameter(start())
    x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(4))
    (x @ weight.t()).square().sum().backward()
    (nn.functional.linear(x, weight.unsqueeze(0)[0])).sum().backward()
    dense = weight.decoded().requires_grad_()
    ((x @ dense.t()).square().sum() + (x @ dense.t()).sum()).backward()
    torch.testing.assert_close(weight.grad, dense.grad)


# ---------------------------------------------------------------------------------------------------- optimizers and averages


def make_model(dtype: torch.dtype = torch.float32, quantized: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.BatchNorm1d(96), nn.Linear(96, 32, bias=False)).to(dtype)
    return lo.nn.quantize_weights_(model, include=["0", "3"]) if quantized else model  # type: ignore[return-value]


def loss_of(model: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, size, generator=generator).to(dtype) for size in (48, 32))
    return (model(x) - y).float().square().mean()


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_trains(name: str, mode: str, dtype: torch.dtype) -> None:
    """As float32 weights, which is more than bfloat16 weights do: small updates count."""
    kind = getattr(torch.optim, name)
    options = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[mode]
    if not set(options) <= set(inspect.signature(kind).parameters):
        if mode != "plain":
            pytest.skip(f"{name} has no {mode}")
        options = {}
    results = []
    for quantized in (True, False):
        model = make_model(dtype if quantized else torch.float32, quantized)
        if not quantized:
            for mine, theirs in zip(model.parameters(), make_model(dtype).parameters(), strict=True):
                mine.data.copy_(theirs.data)
        params = [param for param in model.parameters() if name != "Muon" or param.dim() == 2]
        try:
            optimizer = kind(params, lr=1e-2, **options)
        except RuntimeError as error:
            pytest.skip(str(error))

        def closure(model: nn.Module = model, optimizer: Any = optimizer, quantized: bool = quantized) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, dtype if quantized else torch.float32)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(8)]
        results.append((losses[0], float(closure()), model))
    (first, mine, model), (_, theirs, reference) = results
    assert mine < first
    assert first - mine == pytest.approx(first - theirs, rel=0.1)
    for index in (0, 3) if dtype == torch.float32 and name in ("SGD", "AdamW", "Adagrad") else ():
        error = (model[index].weight.decoded() - reference[index].weight).abs()
        assert float(error.mean()) < 2 * float(levels(model[index].weight).mean())


Average = Callable[[Tensor, Tensor, int], Tensor]


def equal_weights(average: Tensor, value: Tensor, seen: int) -> Tensor:
    return average + (value - average) / (seen + 1)


def exponential(average: Tensor, value: Tensor, seen: int) -> Tensor:
    return 0.99 * average + 0.01 * value


AVERAGES: dict[str, tuple[dict[str, Any], Average]] = {
    "default": ({}, equal_weights),
    "avg_fn": ({"avg_fn": get_swa_avg_fn()}, equal_weights),
    "multi_avg_fn": ({"multi_avg_fn": get_swa_multi_avg_fn()}, equal_weights),
    "ema_avg_fn": ({"avg_fn": get_ema_avg_fn(0.99)}, exponential),
    "ema_multi_avg_fn": ({"multi_avg_fn": get_ema_multi_avg_fn(0.99)}, exponential),
    "buffers": ({"multi_avg_fn": get_ema_multi_avg_fn(0.99), "use_buffers": True}, exponential),
}


def averaged(
    dtype: torch.dtype, name: str, prepare: StepParams = lambda model: None
) -> tuple[AveragedModel, Tensor, Tensor]:
    """The average of 30 models, its float64 reference, and how far the last model is from it."""
    options, average = AVERAGES[name]
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200)).to(dtype)
    lo.nn.quantize_weights_(model, include="0.weight")
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(200, 300, generator=generator) / 17)
    mean_model = AveragedModel(model, **options)
    prepare(mean_model)
    reference = None
    for seen in range(30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(200, 300, generator=generator) * 0.002 + 0.001)
        value = model[0].weight.decoded(torch.float64)
        reference = value if reference is None else average(reference, value, seen)
        mean_model.update_parameters(model)
    assert reference is not None
    return mean_model, reference, value - reference


def as_it_is(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [as_it_is, nn.Module.float])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_models_are_right(name: str, prepare: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and (prepare is as_it_is) != ("multi_avg_fn" in AVERAGES[name][0]):
        pytest.skip("torch computes this average in bfloat16, or takes no two types")
    mean_model, reference, away = averaged(dtype, name, prepare)
    weight = mean_model.module[0].weight  # type: ignore[index]
    assert isinstance(weight, QuantizedWeight)
    error, away = ((value / levels(weight)) for value in (weight.decoded(torch.float64) - reference, away))
    noise = (30 / 18) ** 0.5 if AVERAGES[name][1] is equal_weights else float(away.abs().mean() / 2) ** 0.5
    assert float(away.mean()) > 3  # an average that stood still would be wrong by as much
    assert float(error.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(error.std()) < 1.2 * noise


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_in_float_are_exact(name: str) -> None:
    mean_model, reference, _ = averaged(torch.float32, name, lo.nn.dequantize_weights_)
    torch.testing.assert_close(mean_model.module[0].weight.double(), reference, rtol=1e-5, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("size", [2, 16])
def test_a_slow_average_of_a_small_weight_arrives(size: int) -> None:
    """Steps of a fiftieth of a level and less: to nearest, it would never move; with noise from the values alone, it might stop."""
    model = lo.nn.quantize_weights_(nn.Linear(256, size, bias=False), include="weight")
    with torch.no_grad():
        model.weight.copy_(torch.full((size, 256), 0.5).index_fill_(1, torch.tensor([0]), 127.0))  # a level is 1
        mean_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        mean_model.update_parameters(model)
        model.weight[:, 1:] += 4.0
    for _ in range(1500):
        mean_model.update_parameters(model)
    error = (mean_model.module.weight.decoded() - model.weight.decoded())[:, 1:]
    assert float(error.mean()) == pytest.approx(0.0, abs=0.2)


def test_loss_scaling_and_batch_norm_statistics() -> None:
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    codes = model[0].weight.codes.clone()
    scaler.scale(loss_of(model, torch.float32)).backward()
    scaler.unscale_(optimizer)
    expected = model[0].weight.decoded() - 0.1 * model[0].weight.grad
    scaler.step(optimizer)
    assert not torch.equal(codes, model[0].weight.codes)
    assert_same(model[0].weight, expected)
    mean_model = AveragedModel(model)
    data = [torch.randn(32, 48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    update_bn(data, mean_model)
    seen = torch.cat([mean_model.module[1](mean_model.module[0](x)) for x in data])
    torch.testing.assert_close(mean_model.module[2].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- assignment, checkpoints and processes


def test_data_can_be_swapped_and_restored() -> None:
    weight, other = start(), QuantizedWeight.from_float(GRID)
    before, kept = weight.codes.clone(), weight.data
    weight.data = other.data
    assert torch.equal(weight.decoded(), other.decoded())
    weight.data = GRID / 2
    assert torch.equal(other.decoded(), QuantizedWeight.from_float(GRID).decoded())
    weight.data = kept
    assert torch.equal(weight.codes, before)
    weight.data = GRID.half()
    assert weight.dtype == torch.float16
    assert torch.equal(weight.codes, QuantizedWeight.from_float(GRID).codes)


def test_an_old_view_of_replaced_data_keeps_the_old_codes() -> None:
    weight = start()
    alias, row = weight.detach(), weight[0]
    weight.data = GRID
    row.zero_()
    assert_same(weight, GRID)
    assert torch.equal(alias[0] + 0, torch.zeros(COLS))


def test_vectors_of_parameters() -> None:
    model, other = make_model(), make_model(seed=1)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(other.parameters()), model.parameters())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine + 0, theirs + 0)


def test_swapped_tensors() -> None:
    weight, plain = nn.Parameter(start()), nn.Parameter(torch.ones(2, 3))
    torch.utils.swap_tensors(weight, plain)
    assert torch.equal(weight, torch.ones(2, 3))
    assert isinstance(plain, QuantizedWeight)
    with torch.no_grad():
        plain[0] = 1.0
    assert torch.equal(plain[0] + 0, torch.ones(COLS))
    assert torch.equal(plain.codes[1:], start().codes[1:])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_loading_keeps_the_weights_in_8_bits(coded: bool, assign: bool) -> None:
    model, other = make_model(), make_model(quantized=coded, seed=1)
    state = other.state_dict()
    model.load_state_dict(state, assign=assign)
    right = other[0].weight if coded else QuantizedWeight.from_float(other[0].weight)
    assert isinstance(model[0].weight, QuantizedWeight)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight.codes, right.codes)
    assert torch.equal(model[0].weight.scale, right.scale)
    if coded:
        del state["0.weight_scale"]
        with pytest.raises(ValueError, match=r"0\.weight: .*torch\.int8 codes without their scales, 0\.weight_scale"):
            model.load_state_dict(state, strict=False, assign=assign)


def test_copies_are_independent_and_views_are_saved_as_values() -> None:
    weight = start()
    file = io.BytesIO()
    torch.save({"weight": weight, "row": weight[2]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copies = [copy.deepcopy(weight), weight.clone(), pickle.loads(pickle.dumps(weight)), loaded["weight"]]
    for other in copies:
        assert torch.equal(other.codes, weight.codes)
        other[1:] = 0.0
        assert torch.equal(weight.codes, start().codes)
    assert isinstance(weight[2], WeightView)
    for row in (loaded["row"], copy.deepcopy(weight[2])):
        assert type(row) is Tensor
        assert torch.equal(row, weight[2])


def _write_there(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[:3] = 7.0  # type: ignore[index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_memory_of_processes(method: str) -> None:
    model = make_model()
    assert not model[0].weight.is_shared()
    model.share_memory()
    assert model[0].weight.is_shared()
    before = model[0].weight.codes.clone()
    process = torch.multiprocessing.get_context(method).Process(target=_write_there, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(model[0].weight[:3] + 0, torch.full((3, 48), 7.0))
    assert torch.equal(model[0].weight.codes[3:], before[3:])


def test_collectives_into_codes_are_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = start()
        for collective in (torch.distributed.all_reduce, lambda w: torch.distributed.broadcast(w, 0)):
            for target in (weight, weight[2]):
                with pytest.raises(NotImplementedError, match=r"weight\.codes and weight\.scale"):
                    collective(target)
        gathered = [torch.empty(ROWS, COLS)]
        torch.distributed.all_gather(gathered, weight)
        assert torch.equal(gathered[0], weight.decoded())
        assert torch.equal(weight.codes, start().codes)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_functions_read_views() -> None:
    weight = nn.Parameter(start())
    x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(4))

    def product(x: Tensor) -> Tensor:
        return x @ weight.t() + (weight[3] * x).sum()

    expected = product(x)
    expected.sum().backward()
    grad, weight.grad = weight.grad, None
    result = torch.compile(product, backend="aot_eager")(x)
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(weight.grad, grad)
