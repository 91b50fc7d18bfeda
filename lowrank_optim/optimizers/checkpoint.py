"""Loading a state dict: everything is checked before anything is changed, and every tensor keeps its own type.

torch's own `load_state_dict` casts all state but `step` to the parameter's type, which would turn float32 moments of bfloat16
weights, and any integer codes, into bfloat16.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.groups.names import plain_name
from lowrank_optim.groups.options import STRUCTURAL, plain_options
from lowrank_optim.optimizers.migrations import migrate
from lowrank_optim.sharding.dtensor import as_tensor, like
from lowrank_optim.step.init_state import init_state
from lowrank_optim.step.state_names import MEASURED


def load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put `state_dict` into the optimizer, or raise ValueError and leave it as it was."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    state_dict = migrate(state_dict)

    problems = list(_differences(optimizer, state_dict))
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ValueError(
            f"the checkpoint does not fit this {type(optimizer).__name__}, which is unchanged:\n  {shown}\n"
            "Build the optimizer with the options and parameter order of the run that saved it."
        )
    groups = [_merge(saved, own) for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)]
    state = dict(optimizer.state)
    for key, param, group in _saved_params(optimizer, state_dict):
        saved = state_dict["state"].get(key, {})
        own = optimizer.state_template(param, saved, group)  # type: ignore[attr-defined]
        if not own:  # a layer that sleeps
            state.pop(param, None)
            continue
        if not saved:  # it was frozen then: it begins afresh
            state.pop(param, None)
            if param.requires_grad:
                state[param] = init_state(param, group, optimizer.plans[param])  # type: ignore[attr-defined]
            continue
        device_of = optimizer.state_device  # type: ignore[attr-defined]
        state[param] = {name: like(saved[name], tensor, device_of(name, param, group)) for name, tensor in own.items()}

    optimizer.state.clear()
    optimizer.state.update(state)
    optimizer.param_groups[:] = groups
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _saved_params(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor, Mapping[str, Any]]]:
    """(key in the checkpoint, parameter, group as it will be) of all parameters: by name where both have names, else by order."""
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        group = {**own, **saved}
        for key, param in zip(_in_our_order(saved, own), own["params"], strict=True):
            yield key, param, group


def _in_our_order(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
    """The keys of a saved group's parameters, in the order of ours."""
    keys, theirs, ours = list(saved["params"]), saved.get("param_names"), own.get("param_names")
    if not theirs or not ours or len(theirs) != len(keys) or len(ours) != len(keys):
        return keys
    by_name = dict(zip(map(plain_name, theirs), keys, strict=True))
    names = list(map(plain_name, ours))
    unique = len(by_name) == len(keys) == len(set(names))
    return [by_name[name] for name in names] if unique and by_name.keys() == set(names) else keys


def _merge(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the saved hyperparameters, our parameters, and our values for options that the checkpoint does not know."""
    ours = ("params", "param_names") if own.get("param_names") else ("params",)
    kept = {name: deepcopy(value) for name, value in saved.items() if name not in ours}
    own = {name: value for name, value in own.items() if name != MEASURED}
    kept = plain_options(kept, keep_tensors=True)
    return {**own, **kept, "params": own["params"]}


def _fits(value: Tensor, template: Tensor) -> bool:
    """Whether `value` can become the template: same type, a narrower floating one, or that of arithmetic on float64 weights."""
    if tuple(value.shape) != tuple(template.shape):
        return False
    widened = torch.promote_types(value.dtype, template.dtype) if value.is_floating_point() else value.dtype
    return template.dtype in (widened, torch.float32 if value.dtype == torch.float64 else widened)


def _differences(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[str]:
    """Everything in which the checkpoint and the optimizer disagree, one line each."""
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved_groups) != len(groups):
        return [f"it has {len(saved_groups)} param groups, the optimizer {len(groups)}"]
    found = []
    for number, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(own["params"]):
            found.append(f"group {number}: {len(saved['params'])} parameters saved, {len(own['params'])} here")
        theirs, ours = (set(map(plain_name, group.get("param_names") or ())) for group in (saved, own))
        if theirs & ours and theirs != ours:
            only = ", ".join(sorted(theirs - ours)[:5]), ", ".join(sorted(ours - theirs)[:5])
            found.append(
                f"group {number}: only the checkpoint has {only[0] or 'nothing'}, only the optimizer {only[1] or 'nothing'}"
            )
        # A checkpoint of torch.optim.AdamW names none of these; its tensors are compared below.
        found += [
            f"group {number}: {name} is {saved[name]!r} in the checkpoint, {own.get(name)!r} here"
            for name in STRUCTURAL
            if name in saved and saved[name] != own.get(name)
        ]
    if found:
        return found
    plans = optimizer.plans  # type: ignore[attr-defined]
    for key, param, group in _saved_params(optimizer, state_dict):
        name = f"{plans[param].name} {tuple(param.shape)}"
        saved_state = state_dict["state"].get(key, {})
        if not saved_state and optimizer.may_begin(group):  # type: ignore[attr-defined]
            continue  # it was frozen then
        own_state = optimizer.state_template(param, saved_state, group)  # type: ignore[attr-defined]
        missing, extra = own_state.keys() - saved_state.keys(), saved_state.keys() - own_state.keys()
        if missing or extra:
            parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            parts += [f"has {', '.join(sorted(extra))} besides"] if extra else []
            if "micro_batches" in extra:
                parts = [
                    f"was written {int(saved_state['micro_batches'])} micro-batches into a step: call "
                    "lowrank_optim.update_in_backward(optimizer, accumulate=…) as its run did, then load_state_dict"
                ]
            found.append(f"{name}: the checkpoint {' and '.join(parts)}")
            continue
        found += [
            f"{name}: {field} is {value.dtype} {tuple(value.shape)} in the checkpoint, "
            f"{template.dtype} {tuple(template.shape)} here"
            for field, template in own_state.items()
            if not _fits(value := as_tensor(saved_state[field]), template)
        ]
    return found
