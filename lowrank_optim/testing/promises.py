"""The promises that parts of all three kinds make: names, state, masks, exact resume, updates in backward, sharding."""

import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_optim.groups.describe import describe
from lowrank_optim.groups.parts import Part, package_part
from lowrank_optim.in_backward import update_in_backward
from lowrank_optim.projectors import Projector
from lowrank_optim.rules import Rule
from lowrank_optim.testing.problem import MATRICES, Run, difference, kind_of, one_process_mesh

STEPS = 6
"""Of a run."""

STOP = 4
"""Steps before a run is saved; refreshes come before and after it."""

_ROTATING: dict[str, Any] = {"on_refresh": "rotate"}

CLOSE = 1e-4
"""Relative difference from which two numbers are not the same."""


def break_promise(part: Part, promise: str, came: str, needed: str) -> NoReturn:
    """Raise AssertionError."""
    raise AssertionError(f"{type(part).__name__}: {promise}. What came: {came}. What is needed: {needed}")


def check_same(
    part: Part,
    promise: str,
    got: Mapping[str, Tensor],
    needed: Mapping[str, Tensor],
    remedy: str,
    tolerance: float = 0.0,
) -> None:
    """Tensors are those that are needed: to the bit, or up to a relative tolerance."""
    if found := difference(got, needed, tolerance):
        break_promise(part, promise, found, remedy)


@contextmanager
def promised(part: Part, promise: str) -> Iterator[None]:
    """Turn whatever is raised inside into the message that a promise is broken."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        came = f"{type(error).__name__}: {error}"
        raise AssertionError(
            f"{type(part).__name__}: {promise}. What came: {came}. What is needed: {_remedy(part, error)}"
        ) from error


def check_object(part: object) -> None:
    """A part is an object, not its class."""
    if isinstance(part, type):
        raise AssertionError(
            f"{part.__name__} is a class. What is needed: an object with its hyperparameters, {part.__name__}()"
        )


def _remedy(part: Part, error: Exception) -> str:
    """What to do about an error, where that is known."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(key, str) and hasattr(type(part), key):
        return f"a type at the field, {key}: float = …, since fields without a type are no options"
    return "what the error says; the traceback above this one shows where it was raised"


def check_refused(part: Part, promise: str, call: Callable[[], object], name: str) -> None:
    """A call raises ValueError, with a name in its message."""
    try:
        call()
    except ValueError as error:
        if name in str(error):
            return
        came = f"ValueError: {error}"
    else:
        came = "no error"
    break_promise(part, promise, came, f"ValueError that names {name}")


def check_finite(part: Part, promise: str, tensors: Mapping[str, Tensor]) -> None:
    """No tensor holds NaN or infinity."""
    if found := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        break_promise(part, promise, f"NaN in {found[0]}", "numbers")


def check_in_place(part: Part, before: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """The state holds the tensors that it held before."""
    if replaced := sorted(n for n in {*before, *state} if n not in before or state.get(n) is not before[n]):
        came = f"other tensors for {', '.join(replaced)}"
        break_promise(part, "state is changed in place", came, "copy_, mul_, lerp_ … on those of init")


def check_shared(part: Part, *variants: dict[str, Any], bits: tuple[int, ...] = (8, 4)) -> None:
    """All promises that do not depend on what a part computes.

    Args:
        part: the rule, projector or residual.
        variants: options of optimizers that it has to train and to resume with.
        bits: values of `state_bits` besides 32 that it has to train with.
    """
    check_class(part)
    check_name(part)
    check_repeat(part)
    check_options(part)
    check_copies(part)
    for options in ({}, *variants, *({"state_bits": width} for width in bits)):
        check_training(part, options)
    check_types(part)
    check_mask(part)
    check_sharding(part)


# ----------------------------------------------------------------------------------------------------- names and options


def check_class(part: Part) -> None:
    """A part is a frozen dataclass."""
    kind = type(part)
    if "__dataclass_params__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        break_promise(
            part, "a part is a frozen dataclass", f"class {kind.__name__} is none", "@dataclass(frozen=True) above it"
        )


def check_name(part: Part) -> None:
    """A part has a name of its own, which stands in its groups and in checkpoints, and brings its fields as options."""
    kind = kind_of(part)
    name = getattr(part, "name", None)
    if not isinstance(name, str) or not name:
        break_promise(part, "a part has a name", f"name is {name!r}", 'name = "…" in the class, without a type')
    taken = package_part(kind, part.name)
    if taken is not None and (taken != part if isinstance(part, Projector) else type(taken) is not type(part)):
        break_promise(
            part,
            "the name of a part is its own",
            f"{part.name!r} is the name of {taken!r} already",
            "a name that no part of the package has",
        )
    with promised(part, "an optimizer can be built with the part"):
        run = Run(part)
    with promised(part, "describe shows an optimizer with the part"):
        describe(run.optimizer)
    group = run.optimizer.param_groups[0]
    if group[kind] != part.name:
        break_promise(part, f"group[{kind!r}] holds the name", f"{group[kind]!r}", f"{part.name!r}")
    saved = torch_roundtrip(part, run.optimizer.state_dict())
    if saved["param_groups"][0][kind] != part.name:
        break_promise(part, "a checkpoint holds the name", f"{saved['param_groups'][0][kind]!r}", f"{part.name!r}")


def other_values(part: Part) -> Iterator[tuple[str, Part]]:
    """Each field's name, and the part with another value there, if it takes one."""
    for each in fields(part):  # type: ignore[arg-type]
        value = getattr(part, each.name)
        if isinstance(value, bool):
            others: list[Any] = [not value]
        elif isinstance(value, (int, float)):
            others = [value + 1, value - 1, value / 2, value * 2] if value else [1, 0.5]
        elif isinstance(value, tuple) and all(isinstance(number, float) for number in value):
            others = [tuple(number / 2 for number in value)]
        else:
            others = [0.5] if value is None else []
        for other in others:
            try:
                changed: Part = replace(part, **{each.name: other})  # type: ignore[type-var]
            except (TypeError, ValueError):
                continue
            yield each.name, changed
            break


def check_options(part: Part) -> None:
    """Hyperparameters of rules and residuals are read from the group, and projectors with other fields have other names."""
    if isinstance(part, Projector):
        for name, changed in other_values(part):
            if changed.name == part.name:
                value, other = getattr(part, name), getattr(changed, name)
                break_promise(
                    part,
                    "the name tells projectors with other fields apart, for checkpoints hold nothing else of them",
                    f"{part.name!r} for {name} {value!r} and {other!r}",
                    f'a property `name` with {name} in it, such as f"{part.name}:{{self.{name}}}"',
                )
        return
    group = part.options()
    needed = None
    for name, changed in other_values(part):
        told = "hyperparameters come from `options`, which schedulers change, and not from `self`"
        with promised(part, told):
            needed = needed or Run(part, _ROTATING).train(range(STOP)).tensors()
            came = Run(changed, {**_ROTATING, **group}).train(range(STOP)).tensors()
        if found := difference(came, needed):
            value, other = group[name], getattr(changed, name)
            came_now = f"{found}, where self.{name} is {other!r} and options[{name!r}] is {value!r} as before"
            break_promise(part, told, came_now, f"options[{name!r}]")


def check_copies(part: Part) -> None:
    """An optimizer can be copied and, where the part's class can be imported, pickled; its copy goes on as it does."""
    original = Run(part).train(range(STOP))
    with promised(part, "an optimizer with the part can be copied by copy.deepcopy"):
        copies = [deepcopy(original)]
    kind = type(part)
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind:
        with promised(part, "an optimizer with the part can be pickled"):
            copies.append(pickle.loads(pickle.dumps(original)))
    needed = original.train(range(STOP, STEPS)).tensors()
    for copied in copies:
        came = copied.train(range(STOP, STEPS)).tensors()
        check_same(part, "a copy of an optimizer goes on as the original", came, needed, "the same bits")


# --------------------------------------------------------------------------------------------------- training and resume


def torch_roundtrip(part: Part, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint written and read again."""
    file = io.BytesIO()
    with promised(part, "a checkpoint can be read by torch.load(weights_only=True)"):
        torch.save(state_dict, file)
        file.seek(0)
        read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def check_training(part: Part, options: dict[str, Any]) -> None:
    """A run learns; it is the same when it is resumed, and with updates in backward."""
    told = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "default options"
    with promised(part, f"the part trains with {told}"):
        run = Run(part, options)
        before = run.loss()
        needed = run.train(range(STEPS)).tensors()
    check_finite(part, f"finite gradients give finite weights and state ({told})", needed)
    if not run.loss() < before:
        came = f"the loss went from {before:.6g} to {run.loss():.6g} in {STEPS} steps with lr 0.01"
        break_promise(part, f"an update goes down ({told})", came, "a smaller loss: W ← W − η·direction")
    check_resume(part, options, told, needed)
    check_in_backward(part, options, told, needed)


def check_repeat(part: Part) -> None:
    """A run that is repeated has the same bits."""
    with promised(part, "the part trains"):
        first, second = (Run(part).train(range(STOP)).tensors() for _ in range(2))
    remedy = "random numbers from `key` or none, and nothing remembered outside of the optimizer's state"
    check_same(part, "the same gradients give the same bits", second, first, remedy)


def check_resume(part: Part, options: dict[str, Any], told: str, needed: Mapping[str, Tensor]) -> None:
    """A run that is saved, and goes on in a new optimizer, has the bits of one that was not disturbed."""
    stopped, resumed = Run(part, options).train(range(STOP)), Run(part, options)
    with torch.no_grad():
        for name, param in resumed.params.items():
            param.copy_(stopped.params[name])
    saved = torch_roundtrip(part, stopped.optimizer.state_dict())
    with promised(part, f"a checkpoint fits a new optimizer of the same options ({told})"):
        resumed.optimizer.load_state_dict(saved)
    promise = f"a run resumed from a checkpoint has the bits of an undisturbed one ({told})"
    remedy = "everything that the part remembers in the state tensors that `init` returns"
    check_same(part, promise, resumed.train(range(STOP, STEPS)).tensors(), needed, remedy)


def check_in_backward(part: Part, options: dict[str, Any], told: str, ordinary: Mapping[str, Tensor]) -> None:
    """Updates in backward have the bits of ordinary steps, or are refused by name."""
    run = Run(part, options)
    if getattr(part, "feeds_back", False):
        promise = "updates in backward are refused where feeds_back"
        check_refused(part, promise, lambda: update_in_backward(run.optimizer), part.name)
        return
    with promised(part, f"the part is trained with updates in backward ({told})"):
        update_in_backward(run.optimizer)
        run.train(range(STEPS))
    promise = f"updates in backward have the bits of ordinary steps ({told})"
    check_same(part, promise, run.tensors(), ordinary, "the same bits")


def check_types(part: Part) -> None:
    """Weights of other types train, with arithmetic in float64 and in float32."""
    for dtype in (torch.float64, torch.bfloat16):
        with promised(part, f"the part trains {dtype} parameters"):
            tensors = Run(part, dtype=dtype).train(range(STOP)).tensors()
        check_finite(part, f"{dtype} parameters stay finite", tensors)


# ------------------------------------------------------------------------------------------------------- masks and shards


def check_mask(part: Part) -> None:
    """A gradient that is not finite changes nothing, also where only the device knows of it."""
    for bad in (float("nan"), float("inf")):
        # A tensor whose turn it is not uses no gradient, and only decays.
        decay: dict[str, Any] = {"weight_decay": 0.0} if getattr(part, "moments_change_shape", False) else {}
        run = Run(part, {"update_proj_gap": 100, **decay})
        run.optimizer._mask_on_device = True
        run.train(range(STOP))
        before = run.tensors()
        for param in run.params.values():
            param.grad = torch.full_like(param, bad)
        with promised(part, f"a gradient of {bad} is left out"):
            run.optimizer.step()
        after = run.tensors()
        for name in [name for name in before if name.startswith("state 'step' ")]:  # counts what was left out, too
            del before[name], after[name]
        promise = f"a gradient of {bad} changes no weight and no state, on devices where only a mask (`ok`) says so"
        remedy = "torch.where(ok, new, old) wherever state is written, or, for rules, masks = False"
        check_same(part, promise, after, before, remedy)


def check_sharding(part: Part) -> None:
    """Sharded parameters are refused by the name of the class, or stepped as others are."""
    knows = part.knows_shards or getattr(part, "elementwise", False)
    with one_process_mesh() as mesh:
        if mesh is None:
            return
        if not knows:
            promise = "sharded parameters are refused where knows_shards is False"
            check_refused(part, promise, lambda: Run(part, mesh=mesh), type(part).__name__)
            return
        check_places(part)
        with promised(part, "knows_shards: sharded parameters are trained"):
            sharded = Run(part, mesh=mesh).train(range(STEPS)).tensors()
        needed = Run(part).train(range(STEPS)).tensors()
        check_same(
            part, "knows_shards: sharded parameters are stepped as others", sharded, needed, "the same numbers", CLOSE
        )


def check_places(part: Part) -> None:
    """Where the tensors of a projector or a residual lie is said for every one of them."""
    if isinstance(part, Rule):
        return  # as R, if it is not said
    run = Run(part)
    for name in MATRICES:
        space = run.optimizer.plan_of(run.params[name]).space
        assert space is not None
        device = torch.device("cpu")
        made = part.init(space, 1, device) if isinstance(part, Projector) else part.init(space, device)
        missing = made.keys() - part.state_lies.keys()
        if missing:
            names = ", ".join(sorted(missing))
            break_promise(
                part, "knows_shards: state_lies says where state lies", f"nothing for {names}", "a place for each"
            )
