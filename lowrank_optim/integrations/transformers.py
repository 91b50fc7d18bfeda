"""The Trainer of transformers: `LowRank` builds an optimizer from a model and TrainingArguments, `InBackward` updates in backward,
`Progress` reports from within long steps.

Nothing of transformers is imported: a model is an `nn.Module`, and TrainingArguments are read by the names of their fields.
"""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.groups.build import param_groups
from lowrank_optim.groups.describe import describe
from lowrank_optim.groups.layers import layer_groups
from lowrank_optim.groups.names import Pattern
from lowrank_optim.in_backward import UpdateInBackward, update_in_backward
from lowrank_optim.optimizers import LowRankOptimizer, by_name
from lowrank_optim.optimizers.layer_switching import LayerSwitching
from lowrank_optim.optimizers.watch import StepProgress, StepWatch, to_stderr, watch_step

_log = logging.getLogger("lowrank_optim")

_FIELDS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}
"""Optimizer options and the fields of TrainingArguments that they come from."""


class LowRank:
    """Makes a low-rank optimizer for `transformers.Trainer`, with the settings of its TrainingArguments.

    Given to the Trainer as the class in `optimizer_cls_and_kwargs` (transformers ≥ 5.2), it is called with the model when training
    starts, so names and modules decide what is low-rank (`lowrank_optim.param_groups`):

        Trainer(
            model=model, args=args, train_dataset=data,
            optimizer_cls_and_kwargs=(LowRank, dict(method="galore", rank=128, include=["attn", "mlp"])),
        )

    Older versions of transformers give an optimizer class groups without names; there, and with trainers that have no
    `optimizer_cls_and_kwargs`, build the optimizer first (works in every version, but not with DeepSpeed or FSDP):

        Trainer(..., optimizers=(LowRank()(model.to(args.device), args, method="galore", rank=128), None))

    Learning rate, weight decay, betas and epsilon are those of the TrainingArguments; norms, biases and other vectors have no decay.
    `lr`, `weight_decay`, `betas` or `eps` among the options win. `optim_target_modules`, if set, is used as `include`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise RuntimeError(
                "LowRank takes no arguments: it is called with the model. If a Trainer raised this, its version of transformers "
                "(below 5.2) knows no optimizer factories: build the optimizer first and pass "
                "Trainer(..., optimizers=(LowRank()(model.to(args.device), args, method=..., rank=...), None)), or upgrade"
            )

    def __call__(
        self,
        model: nn.Module,
        training_args: Any = None,
        *,
        method: str | type[LowRankOptimizer] = "galore",
        rank: int | float | None = None,
        density: float | None = None,
        include: Pattern | Iterable[Pattern] | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
        **options: Any,
    ) -> LowRankOptimizer:
        """The optimizer for a model.

        Args:
            model: the model that is trained.
            training_args: TrainingArguments. May stand among the kwargs given to the Trainer; not given, those of the Trainer that
                makes this call are used.
            method: short name (of `lowrank_optim.METHODS`, `FULL_RANK_METHODS`, `LAYERWISE_METHODS`) or class of the optimizer.
            rank: see `lowrank_optim.param_groups`; so for `density`. MuonAdamW, SCALEOptimizer, SinkGDAdamW, FOAMAdamW need none.
            include: which matrices are low-rank, see `lowrank_optim.param_groups`.
            exclude: which are not.
            **options: options of the optimizer; for "lisa" and "badam" also `layers`, `always_on` and `as_layers`, see
                `lowrank_optim.layer_groups`, and `rank` may be left out.

        Raises:
            ValueError: there are no TrainingArguments and `lr`, `weight_decay`, `betas` or `eps` is not among the options either;
                or the TrainingArguments have `optim_args`, which belong into the kwargs here.
        """
        optimizer_class = by_name(method) if isinstance(method, str) else method
        layerwise = issubclass(optimizer_class, LayerSwitching)
        which = ("layers", "always_on", "as_layers") if layerwise else ()
        layers = {name: options.pop(name) for name in which if name in options}
        args = training_args if training_args is not None else _arguments_of_calling_trainer()
        settings = _settings(optimizer_class, args, options)
        if include is None:
            include = _target_modules(args)
        if rank is None and density is None and not layerwise:
            layers |= optimizer_class.matrix_options
            if not layers:
                raise ValueError("LowRank needs rank=… or density=… among the kwargs in optimizer_cls_and_kwargs")
        make_groups = layer_groups if layerwise else param_groups
        groups = make_groups(model, rank, density=density, include=include, exclude=exclude, **layers)
        optimizer = optimizer_class(groups, **settings)
        _log.info("%s for %s:\n%s", optimizer_class.__name__, type(model).__name__, describe(optimizer))
        return optimizer


def _settings(optimizer_class: type[Optimizer], args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, and what they leave open from TrainingArguments. Nothing set there is dropped without a word."""
    parameters = inspect.signature(optimizer_class).parameters
    # Adafactor's eps is a pair of other quantities and it has no betas: only what means the same is taken over.
    takes = {
        "lr": True,
        "weight_decay": True,
        "betas": "betas" in parameters,
        "eps": "eps" in parameters and isinstance(parameters["eps"].default, float),
    }
    missing = [name for name in _FIELDS if takes[name] and name not in options]
    if args is None:
        if missing:
            raise ValueError(
                f"LowRank cannot reach the TrainingArguments, so {', '.join(missing)} would be lost: add training_args=args to the "
                f"kwargs in optimizer_cls_and_kwargs, or call LowRank()(model, args, ...)"
            )
        return options
    if getattr(args, "optim_args", None):
        raise ValueError(
            f"TrainingArguments.optim_args is {args.optim_args!r}, which LowRank does not read; put these options into the kwargs "
            "in optimizer_cls_and_kwargs"
        )
    unused = [
        field
        for name, fields in _FIELDS.items()
        for field in fields
        if not takes[name] and getattr(args, field) != getattr(type(args), field, getattr(args, field))
    ]
    if unused:
        names = ", ".join(f"TrainingArguments.{field}" for field in unused)
        warnings.warn(f"{optimizer_class.__name__} does not use {names}", stacklevel=3)
    values = {name: tuple(getattr(args, field) for field in _FIELDS[name]) for name in missing}
    return options | {name: value if len(value) > 1 else value[0] for name, value in values.items()}


def _arguments_of_calling_trainer() -> Any:
    """TrainingArguments of the Trainer whose method called the factory, or None.

    `Trainer.create_optimizer` calls a factory with the model and the user's kwargs only, so its arguments can be reached only
    through the calling frame. (axolotl passes them; then this is not used.)
    """
    caller = sys._getframe(2)  # 1: LowRank.__call__
    args = getattr(caller.f_locals.get("self"), "args", None)
    return args if all(hasattr(args, field) for fields in _FIELDS.values() for field in fields) else None


def _target_modules(args: Any) -> list[Pattern] | None:
    """`TrainingArguments.optim_target_modules` as `include`, with the meaning that transformers gives it.

    There, a string is a regular expression for whole module names, or "all-linear"; each item of a list is a part of a module name
    or a regular expression for all of it.
    """
    targets = getattr(args, "optim_target_modules", None)
    if targets is None or (isinstance(targets, str) and targets.replace("_", "-") == "all-linear"):
        return None
    if isinstance(targets, str):
        return [re.compile(rf"^(?:{targets})\.\w+$")]
    return [re.compile(rf"{re.escape(target)}|^(?:{target})\.\w+$") for target in targets]


class _Callback:
    """Has every event of a `transformers.TrainerCallback`; those that a subclass does not name do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):  # an event that needs nothing
            return lambda *_, **__: None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class InBackward(_Callback):
    """A callback for the Trainer: parameters are updated, and their gradients freed, inside backward (`update_in_backward`).

        Trainer(
            model=model, args=args, train_dataset=data, callbacks=[InBackward()],
            optimizer_cls_and_kwargs=(LowRank, dict(method="galore", rank=128)),
        )

    `gradient_accumulation_steps` and `max_grad_norm` are those of the TrainingArguments, and the Trainer says which micro-batch is
    the last of its step, so that a short step at the end of an epoch is right, too. Learning rates are those of the one optimizer.
    Of the gradients, none is left when the Trainer measures their norm; what it logs as `grad_norm` is `optimizer.last_grad_norm`.

    From the start of training to its end; it has every event of a `transformers.TrainerCallback`.

    Args:
        clip: which norm `max_grad_norm` limits: "previous", "tensor" or "subspace", see `update_in_backward`.

    Raises:
        TypeError, ValueError: when training starts, as `update_in_backward`.
    """

    def __init__(self, clip: str = "previous") -> None:
        self.clip = clip
        self.handle: UpdateInBackward | None = None
        self._optimizer: LowRankOptimizer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """Attach to the optimizer of the Trainer."""
        self._detach()  # from a training that an exception has ended
        inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
        gradients: Any = getattr(optimizer, "gradient_state", None)
        accumulate, limit = args.gradient_accumulation_steps, args.max_grad_norm
        self.handle = update_in_backward(
            inner,
            accumulate,
            limit if limit is not None and limit > 0 else None,
            self.clip,
            getattr(optimizer, "scaler", None),
            last_micro_batch=None if accumulate == 1 or gradients is None else lambda: bool(gradients.sync_gradients),
        )
        self._optimizer = inner
        # Loggers see the norm only if this callback comes before them.
        handler: Any = sys._getframe(1).f_locals.get("self")
        if self in getattr(handler, "callbacks", ()):
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Put the norm where the Trainer has that of no gradients, 0."""
        norm = self._optimizer.last_grad_norm if self._optimizer is not None else None
        history = state.log_history[-1] if state.log_history else {}
        for entry in (logs or {}, history):
            if "grad_norm" in entry and isinstance(norm, Tensor):
                entry["grad_norm"] = float(norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore ordinary stepping."""
        self._detach()

    def _detach(self) -> None:
        if self.handle is not None and self.handle.active:
            self.handle.discard()  # of a step that was broken off
            self.handle.remove()
        self.handle = self._optimizer = None


class Progress(_Callback):
    """A callback for the Trainer: says how far a long step has come, and how much time is left (`watch_step`).

        Trainer(
            model=model, args=args, train_dataset=data, callbacks=[Progress()],
            optimizer_cls_and_kwargs=(LowRank, dict(method="galore", rank=128)),
        )

    The first step of a large model takes minutes, in which the Trainer's own bar stands still. Shorter steps report nothing. Goes
    with `InBackward`. Only the first process reports.

    Args:
        every: seconds from one report to the next.
        report: called with a `lowrank_optim.StepProgress`; by default its line goes to stderr.

    Raises:
        TypeError: when training starts, if the optimizer is not of this package.
    """

    def __init__(self, every: float = 10.0, report: Callable[[StepProgress], None] = to_stderr) -> None:
        self.every, self.report = every, report
        self._watch: StepWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """Watch the optimizer of the Trainer."""
        self.on_train_end(args, state, control)  # of a training that an exception has ended
        if state.is_world_process_zero:
            self._watch = watch_step(getattr(optimizer, "optimizer", optimizer), self.report, every=self.every)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report no more."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
