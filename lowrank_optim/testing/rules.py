"""What a rule promises."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.quantization.coded_moments import SIGNED
from lowrank_optim.rules import Context, Direction, JointRule, Rule, masked_direction
from lowrank_optim.testing.problem import Run, difference, numbers
from lowrank_optim.testing.promises import (
    CLOSE,
    break_promise,
    check_in_place,
    check_object,
    check_refused,
    check_same,
    check_shared,
    promised,
)

SHAPES = ((24, 8), (2, 20, 8), (33,))


def check_rule(rule: Rule) -> None:
    """Try a rule of your own: direction, masks, parts, few bits, resume, updates in backward, sharding, names.

    Takes two or three seconds. Writes nothing, and starts no process.

    Args:
        rule: with the hyperparameters to be tried.

    Raises:
        AssertionError: the first promise that the rule breaks; the message says what came and what is needed.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> from dataclasses import dataclass
        >>> from lowrank_optim.testing import check_rule
        >>> @dataclass(frozen=True)
        ... class HeavyBall(lo.MomentumRule):
        ...     name = "heavy_ball"
        ...     heavy: float = 0.9
        ...     def direction(self, grad, state, options, context):
        ...         momentum = state["exp_avg"].mul_(options["heavy"]).add_(grad)
        ...         return lo.Direction(momentum.clone())
        >>> check_rule(HeavyBall())
    """
    check_object(rule)
    if isinstance(rule, JointRule):
        check_shared(rule)
        return
    options = _options(rule)
    for shape in SHAPES:
        if rule.on_matrices and len(shape) < 2:
            continue
        _check_init(rule, options, shape)
        _check_direction(rule, options, shape)
        _check_ignored(rule, options, shape)
        if rule.elementwise:
            _check_parts(rule, options, shape)
    _check_moments(rule, options)
    if not rule.in_subspaces:
        _check_refused_subspaces(rule)
        check_shared(rule, {"state_bits": 16})
        return
    _check_transport(rule, options)
    rotated_bits = {"on_refresh": "rotate", "state_bits": 16}
    check_shared(rule, {"on_refresh": "rotate"}, {"on_refresh": "reset"}, rotated_bits)


def _options(rule: Rule) -> Mapping[str, Any]:
    """A complete group of the rule."""
    with promised(rule, "an optimizer can be built with the rule"):
        return Run(rule).optimizer.param_groups[0]


def _context(weight: Tensor, step: int, ok: Tensor | None = None) -> Context:
    return Context(float(step), float(step), weight, ok, dense=True, fresh=step == 1)


def _init(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    with promised(rule, f"init makes the state for a gradient of {shape}"):
        return rule.init(shape, options, torch.float32, torch.device("cpu"))


def _begun(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights, and the state after three steps."""
    weight, state = 0.25 * numbers(shape, 3), _init(rule, options, shape)
    for step in (1, 2, 3):
        with promised(rule, f"direction takes a gradient of {shape}"):
            direction: object = rule.direction(numbers(shape, step), state, options, _context(weight, step))
        if not isinstance(direction, Direction):
            came = type(direction).__name__
            break_promise(rule, "direction returns a Direction", f"a {came}", "return lo.Direction(tensor)")
    return weight, state


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _check_init(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """State is zero, and of the same shapes on the meta device."""
    state = _init(rule, options, shape)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        break_promise(rule, "init returns tensors", f"{state}", "tensors only: checkpoints hold nothing else")
    for name, tensor in state.items():
        if bool(tensor.count_nonzero()):
            break_promise(
                rule, "init returns zeros", f"{name} of {shape} is not 0", "zeros: resets and few bits rest on them"
            )
    with promised(rule, "init makes tensors on the device that it is given"):
        meta = rule.init(shape, options, torch.float32, torch.device("meta"))
    there = {name: (tensor.shape, tensor.device.type) for name, tensor in meta.items()}
    needed = {name: (tensor.shape, "meta") for name, tensor in state.items()}
    if there != needed:
        break_promise(rule, "init makes tensors on the device that it is given", f"{there}", f"{needed}")


def _check_direction(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """The direction has the gradient's shape and type; gradient and weights are left alone, and tensors of the state kept."""
    weight, state = _begun(rule, options, shape)
    grad, kept, before = numbers(shape, 9), weight.clone(), dict(state)
    matrix = rule.direction(grad, state, options, _context(weight, 4)).matrix
    if (matrix.shape, matrix.dtype) != (grad.shape, grad.dtype):
        came = f"{matrix.dtype} {tuple(matrix.shape)} for {grad.dtype} {shape}"
        break_promise(rule, "the direction has the gradient's shape and type", came, "the same")
    for name, tensor, old in (("gradient", grad, numbers(shape, 9)), ("weight", weight, kept)):
        if not torch.equal(tensor, old):
            break_promise(rule, f"direction does not change the {name}", "it changed", "operations out of place")
    (_, one), (_, two) = (_begun(rule, options, shape) for _ in range(2))
    first, again = (rule.direction(grad, each, options, _context(weight, 4)).matrix for each in (one, two))
    check_same(
        rule,
        "direction is a function of its arguments",
        {"the direction": again, **two},
        {"the direction": first, **one},
        "no random numbers, and nothing remembered but in the tensors that init returns",
    )
    check_in_place(rule, before, state)
    follows = matrix.clone()
    rule.direction(numbers(shape, 10), state, options, _context(weight, 5))
    if not torch.equal(matrix, follows):
        break_promise(
            rule, "a direction is no part of the state", "the next step changed it", "a tensor of its own: .clone()"
        )


def _check_ignored(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Where `ok` is false the moments stay, and the direction is 0."""
    weight, state = _begun(rule, options, shape)
    before = _copy(state)
    ignored = _context(weight, 4, torch.tensor(False))
    direction = masked_direction(rule, torch.zeros(shape), state, options, ignored)
    found = difference(state, before)
    if found or bool(direction.matrix.count_nonzero()):
        break_promise(
            rule,
            f"masks = {rule.masks}: where `context.ok` is false the moments stay and the direction is 0",
            found or "a direction that is not 0",
            "torch.where(context.ok, new, old) for every moment, or masks = False, which does it around `direction`",
        )
    weight, state = _begun(rule, options, shape)
    plain = rule.direction(numbers(shape, 4), _copy(state), options, _context(weight, 4)).matrix
    used = replace(ignored, ok=torch.tensor(True))
    masked = masked_direction(rule, numbers(shape, 4), state, options, used).matrix
    promise, remedy = "where `context.ok` is true it changes nothing", "the direction without a mask"
    check_same(rule, promise, {"the direction": masked}, {"the direction": plain}, remedy, CLOSE)


def _check_parts(rule: Rule, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """A large tensor may be given in parts, with those parts of the state that have its shape."""
    promise = "elementwise = True: a tensor that is given in parts has the directions and moments of the whole"
    weight, state = _begun(rule, options, shape)
    for name, tensor in state.items():
        if tensor.shape != weight.shape:
            break_promise(
                rule, promise, f"{name} is {tuple(tensor.shape)} for {shape}", "tensors of the gradient's shape"
            )
    grad, pieces = numbers(shape, 9).view(-1), []
    parts = _copy(state)
    whole = rule.direction(grad.view(shape), state, options, _context(weight, 4)).matrix
    for chunk in (slice(0, 11), slice(11, None)):
        part = {name: tensor.view(-1)[chunk] for name, tensor in parts.items()}
        with promised(rule, promise):
            context = _context(weight.view(-1)[chunk], 4)
            pieces.append(rule.direction(grad[chunk], part, options, context).matrix)
    got, needed = {"the direction": torch.cat(pieces), **parts}, {"the direction": whole.reshape(-1), **state}
    remedy = "nothing but operations on single elements, or elementwise = False"
    check_same(rule, promise, got, needed, remedy, CLOSE)


def _check_refused_subspaces(rule: Rule) -> None:
    promise = "groups with a rank are refused where in_subspaces is False"
    group = {"params": [torch.nn.Parameter(numbers((24, 8), 1))], "rank": 4}
    check_refused(rule, promise, lambda: LowRankOptimizer([group], rule=rule), rule.name)


def _check_transport(rule: Rule, options: Mapping[str, Any]) -> None:
    """A change to the same basis changes no moments."""
    _, state = _begun(rule, options, SHAPES[0])
    before = _copy(state)
    needed = 'state["exp_avg"].copy_(move(state["exp_avg"], 1)), with power 2 for squares'
    promise = "transport expresses the moments in a new basis"
    with promised(rule, promise):
        rule.transport(_ReadOnly(state), lambda moment, power: moment.clone(), options, 3.0)
    check_same(rule, "transport into the same basis changes nothing", state, before, needed, CLOSE)
    turn = torch.linalg.qr(numbers((SHAPES[0][-1],) * 2, 4)).Q
    with promised(rule, promise):
        rule.transport(_ReadOnly(state), lambda moment, power: moment @ turn.pow(power), options, 3.0)
    for name, tensor in state.items():
        if tensor.shape == SHAPES[0] and bool(tensor.any()) and torch.equal(tensor, before[name]):
            break_promise(rule, promise, f"{name} is what it was in the old one", needed)


class _ReadOnly(Mapping[str, Tensor]):
    """A state whose tensors can be changed, but not replaced, as with moments in few bits."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        raise TypeError(f"state[{name!r}] = … replaces a tensor; write state[{name!r}].copy_(…)")


def _check_moments(rule: Rule, options: Mapping[str, Any]) -> None:
    """What few bits take the moments for, by their names."""
    _, state = _begun(rule, options, SHAPES[0])
    squares = state.get("exp_avg_sq")
    if squares is not None and bool((squares < 0.0).any()):
        break_promise(
            rule,
            "the moment exp_avg_sq is at least 0: few bits hold its root",
            "numbers below 0",
            "the name exp_avg for a moment with a sign, or another name for one that stays in 32 bits",
        )
    others = [name for name, tensor in state.items() if name not in SIGNED and tensor.shape == SHAPES[0]]
    if others:
        told = f"{type(rule).__name__}: {', '.join(others)} stays in 32 bits whatever state_bits is"
        warnings.warn(
            f"{told}; only exp_avg (with a sign) and exp_avg_sq (at least 0) are stored in few bits", stacklevel=3
        )
