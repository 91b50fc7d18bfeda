"""The run that is measured: model, optimizer and a few steps, on tensors without numbers.

Three steps stand for all: the first one (every subspace is made), an ordinary one, and one in which every subspace is due for a new
basis (in training, staggering spreads these; what one refresh takes is given back before the next, so all at once peak as one does).
Steps in which a handle on the optimizer acts (`truncate_ranks`) follow, if there is one.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lowrank_optim.groups.describe import handles_of
from lowrank_optim.in_backward import update_in_backward
from lowrank_optim.optimizers import LowRankOptimizer
from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.simulation.pretend import (
    DataNeeded,
    Recorder,
    backward,
    bare,
    one_text_a_row,
    pretend,
    storage_bytes,
    unwrapped,
)
from lowrank_optim.planner.simulation.timeline import PARTS, Moment, Timeline

FIRST, ORDINARY, REFRESH = "first step", "ordinary step", "refresh step"


class DataInForward(PlanError):
    """The forward pass reads values of tensors that have none."""


@dataclass(frozen=True)
class Setting:
    """One training set-up.

    build_model: a model on meta tensors, made within the pretended device.
    build_optimizer: its optimizer.
    batch: what the model is called with: a mapping (keyword arguments), a tuple (positional ones) or one tensor; meta or real.
    loss: the loss from the model's output.
    accumulate: micro-batches in a step.
    """

    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], Optimizer]
    batch: Any
    loss: Callable[[Any], Tensor]
    device: torch.device
    in_backward: bool = False
    activation_checkpointing: bool = False
    accumulate: int = 1
    steps: tuple[str, ...] = (FIRST, ORDINARY, REFRESH)


@dataclass(frozen=True)
class Run:
    """What a simulation leaves.

    timeline: its record.
    weights, state: bytes on the device after the last step; the state by part.
    parameters: (bytes, layer, whether it is trained) of each parameter, by name.
    """

    timeline: Timeline
    weights: int
    state: dict[str, int]
    parameters: dict[str, tuple[int, str, bool]]


def simulate(setting: Setting, progress: Callable[[str], None] = lambda step: None) -> Run:
    """Run the steps of a setting.

    Raises:
        PlanError: the forward pass needs real data, or fails; the optimizer cannot be built, or updated in backward.
    """
    with pretend(setting.device) as recorder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        model = setting.build_model()
        layer_of = label_parameters(model)
        for name, tensor in _tensors_of(model).items():
            recorder.claim(tensor, "weights", layer_of[name], rows=_rows(tensor) if tensor.requires_grad else 0)
        if setting.activation_checkpointing:
            checkpoint_activations(model)
        for name, param in model.named_parameters():
            _claim_gradient(recorder, param, layer_of[name])
        track_layers(model, recorder)
        optimizer = setting.build_optimizer(model)
        _claim_state(recorder, optimizer, model, layer_of)
        if setting.in_backward:
            attach_in_backward(optimizer, setting.accumulate)

        def take(step: str) -> None:
            progress(step)
            with one_text_a_row():
                _step(model, optimizer, setting, recorder, step)
            _claim_state(recorder, optimizer, model, layer_of)

        for step in steps_of(optimizer, setting.steps):
            if step == REFRESH:
                make_refreshes_due(optimizer)
            take(step)
        state = _bytes_of_state(recorder, optimizer)  # a decomposition may take some away
        for handle in handles_of(optimizer):
            handle.make_due()
            for step in handle.heavy_steps:
                take(step)
        recorder.moment = Moment("", "end", "")
        parameters = {
            name: (storage_bytes(param), layer_of[name], param.requires_grad)
            for name, param in model.named_parameters()
        }
        stored = {
            inner.untyped_storage()._cdata: storage_bytes(inner)
            for tensor in _tensors_of(model).values()
            for inner in unwrapped(tensor)
        }
        events = list(recorder.timeline.events)  # before everything is freed
    return Run(Timeline(events), sum(stored.values()), state, parameters)


def _step(model: nn.Module, optimizer: Optimizer, setting: Setting, recorder: Recorder, step: str) -> None:
    """Forward, backward and update, as in a plain training loop."""
    for _ in range(setting.accumulate):
        recorder.moment = Moment(step, "forward", "")
        recorder.may_read = False
        try:
            output = _call(model, setting.batch)
            loss = setting.loss(output)
            del output
        except (DataNeeded, NotImplementedError) as error:
            raise DataInForward(
                f"the forward pass needs real data: {error}. Give example_batch with real tensors of integers (token ids, lengths, "
                "masks) on the CPU, whose values are then used; a branch on computed floating-point values cannot be planned"
            ) from error
        finally:
            recorder.may_read = True
        recorder.moment = Moment(step, "backward", "")
        backward(loss)
        del loss
    recorder.moment = Moment(step, "optimizer", "")
    optimizer.step()
    optimizer.zero_grad()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def steps_of(optimizer: Optimizer, steps: tuple[str, ...]) -> tuple[str, ...]:
    """The steps that can differ for this optimizer: without subspaces, none is refreshed."""
    refreshes = any("last_refresh" in state for state in optimizer.state.values())
    return tuple(step for step in steps if step != REFRESH or refreshes)


def make_refreshes_due(optimizer: Optimizer) -> None:
    """Let many steps have passed, so that every subspace is due for a new basis in the next one."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if "last_refresh" in state:
                state["step"].fill_(4 * group["update_proj_gap"])


def attach_in_backward(optimizer: Optimizer, accumulate: int) -> None:
    if not isinstance(optimizer, LowRankOptimizer):
        raise PlanError(
            f"in_backward is True, but {type(optimizer).__module__}.{type(optimizer).__name__} cannot update in backward; use an "
            "optimizer of lowrank_optim, or in_backward=False"
        )
    try:
        update_in_backward(optimizer, accumulate)
    except (TypeError, ValueError) as error:
        raise PlanError(f"in_backward is True: {error}") from error


# What belongs to what ---------------------------------------------------------------------------------------------------------------


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated layers by name: members of lists or sequences of at least two modules with parameters of one class."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path == known or path.startswith(f"{known}.") for known in found):
            continue
        children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(children) > 1
            and len(set(map(type, children.values()))) == 1
        ):
            found |= {f"{path}.{name}" if path else name: child for name, child in children.items()}
    return found


def label_parameters(model: nn.Module) -> dict[str, str]:
    """The layer, or else the module, that each parameter and buffer belongs to, by name; tied ones by their first name."""
    layers = repeated_layers(model)
    return {
        name: next((layer for layer in layers if name.startswith(f"{layer}.")), name.rpartition(".")[0])
        for name in _tensors_of(model)
    }


def track_layers(model: nn.Module, recorder: Recorder) -> None:
    """Let the recorder know in which layer each pass is: by hooks on modules, and, in backward, on the tensors that they return."""
    layers = repeated_layers(model)
    inner = {f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_modules() if name}
    for path, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if path in layers or (own and path not in inner and path):
            module.register_forward_pre_hook(partial(_enter, recorder, path))
            module.register_forward_hook(partial(_leave, recorder, path))


def _enter(recorder: Recorder, path: str, module: nn.Module, args: Any) -> None:
    recorder.moment = Moment(recorder.moment.step, recorder.moment.phase, path)


def _leave(recorder: Recorder, path: str, module: nn.Module, args: Any, output: Any) -> None:
    if recorder.moment.phase == "forward":
        recorder.moment = Moment(recorder.moment.step, "forward", "")
    for tensor in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(partial(_enter_backward, recorder, path))


def _enter_backward(recorder: Recorder, path: str, grad: Tensor) -> None:
    if recorder.moment.phase == "backward":
        recorder.moment = Moment(recorder.moment.step, "backward", path)


def _claim_gradient(recorder: Recorder, param: Tensor, layer: str) -> None:
    def claim(param: Tensor) -> None:
        if param.grad is not None:
            recorder.claim(param.grad, "gradients", layer, rows=_rows(param))

    frozen = not param.requires_grad
    param.requires_grad_(True).register_post_accumulate_grad_hook(claim)
    param.requires_grad_(not frozen)


def part_of(name: str) -> str:
    """Which part of the state a tensor of this name is."""
    if name.endswith(("_scale", "_zero")):
        return "scales"
    if name.startswith(("basis", "indices")):
        return "basis"
    return "moments" if name.startswith(("exp_", "momentum", "square_avg", "max_exp", "state1", "state2")) else "other"


def _state_tensors(recorder: Recorder, optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(parameter, name, tensor) of the optimizer state on the device."""
    for param, state in optimizer.state.items():
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and recorder.counts(tensor):
                yield param, name, tensor


def _claim_state(recorder: Recorder, optimizer: Optimizer, model: nn.Module, layer_of: Mapping[str, str]) -> None:
    layers: dict[Tensor, str] = {param: layer_of[name] for name, param in model.named_parameters()}
    for param, name, tensor in _state_tensors(recorder, optimizer):
        rows = tensor.shape[0] if _is_split(optimizer, param, name) and tensor.dim() > 0 and tensor.shape[0] > 1 else 0
        recorder.claim(tensor, "optimizer_state", layers.get(param, ""), part_of(name), rows)


def _bytes_of_state(recorder: Recorder, optimizer: Optimizer) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for _, name, tensor in _state_tensors(recorder, optimizer):
        found[part_of(name)] += storage_bytes(tensor)
    return found


def _is_split(optimizer: Optimizer, param: Tensor, name: str) -> bool:
    """Whether FSDP splits a state tensor: all but bases of the side that is not split (see `sharding.param_sharding`).

    Of a stack of experts, whole experts are split, each with its basis.
    """
    if not name.startswith(("basis", "indices")) or (param.dim() == 3 and optimizer.state[param][name].dim() == 3):
        return True
    space = optimizer.plan_of(param).space if isinstance(optimizer, LowRankOptimizer) else None
    return space is not None and space.side == "left"


def _rows(tensor: Tensor) -> int:
    """The dimension along which FSDP splits a parameter."""
    return tensor.shape[0] if tensor.dim() else 0


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


# Models -----------------------------------------------------------------------------------------------------------------------------


def without_numbers(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model whose parameters and buffers are meta tensors, floating ones in `dtype` (None: in their own); ties stay."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = bare(tensor, dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# Tensors are looked at in and out of disguise, so that a comparison of their devices finds differences.
_CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}


def checkpoint_activations(model: nn.Module) -> None:
    """Keep the inputs of repeated layers only, and run their forward passes again in backward.

    Raises:
        PlanError: the model has no repeated layers.
    """
    enable = getattr(model, "activation_checkpointing_enable", getattr(model, "gradient_checkpointing_enable", None))
    if callable(enable):
        enable(_CHECKPOINT)
        return
    layers = repeated_layers(model)
    if not layers:
        raise PlanError(
            f"activation_checkpointing is True, but {type(model).__name__} has no repeated layers (an nn.ModuleList or "
            "nn.Sequential of equal modules); checkpoint in the model itself and plan with activation_checkpointing=False"
        )
    for layer in layers.values():
        layer.forward = partial(checkpoint, layer.forward, **_CHECKPOINT)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors have this type within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
