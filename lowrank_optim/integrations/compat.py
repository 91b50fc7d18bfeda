"""`install()`: flags and imports that name galore_torch or apollo_torch reach this package, until `uninstall()`.

Nothing is changed unless `install` is called. It changes two things: the modules that `import galore_torch` and `import apollo_torch`
find, and, where transformers is installed, what its Trainer makes of `optim="galore_adamw"` and the like. What is installed can be
read from these places; nothing else remembers it.
"""

import ast
import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from lowrank_optim.integrations import stand_ins
from lowrank_optim.integrations.transformers import InBackward, LowRank
from lowrank_optim.optimizers import LowRankOptimizer

_GALORE = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")
_MODULES = {"galore_torch": _GALORE, "apollo_torch": (*_GALORE, "APOLLOAdamW")}

_DEFAULTS: dict[str, Any] = {"rank": 128, "update_proj_gap": 200, "proj_type": "std"}
_FLAGS: dict[str, dict[str, Any]] = {
    "galore_adamw": {"method": "galore", "scale": 0.25},
    "galore_adamw_8bit": {"method": "galore_8bit", "scale": 0.25},
    "galore_adafactor": {"method": "galore_adafactor", "scale": 0.25, "scale_parameter": False},
    "apollo_adamw": {"method": "apollo", "scale": 1.0},
}
"""Values of `TrainingArguments.optim` without "_layerwise", and the options that transformers gives them."""


def install(trainer: bool = True) -> None:
    """Let what names galore_torch or apollo_torch use the optimizers of this package.

    * `galore_torch` and `apollo_torch`, imported, are modules with the optimizers of this package: `GaLoreAdamW`, `GaLoreAdamW8bit`,
      `GaLoreAdafactor`, `APOLLOAdamW`, with the arguments, group keys and defaults of those packages, which need not be installed.
      LLaMA-Factory's `use_galore` and `use_apollo` import them.
    * The Trainer of transformers: `optim` "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw", each also with
      "_layerwise". Rank, gap, scale and proj_type have the defaults that transformers gives them, `optim_args` changes them and may
      have any other option of the optimizer (`"rank=64,projector=svd"`); `optim_target_modules` chooses the matrices, and may be left
      out. Unlike with galore_torch, betas, epsilon and weight decay of the TrainingArguments are used; norms, biases and other
      vectors have no decay; output heads stay dense. "_layerwise" updates in backward (`InBackward`), so that accumulation, clipping,
      schedules and checkpoints work.

    The numbers are those of this package (decoupled decay before the update, staggered refreshes, a randomized SVD), not those of
    the other two; `match_reference=True` among the options or in `optim_args` takes theirs.

    Call it at the top of a script, before anything imports galore_torch, apollo_torch or LLaMA-Factory.

    Args:
        trainer: False leaves the Trainer alone, for versions of transformers that know no optimizer factories (below 5.2); code that
            imports the two packages itself is served all the same. There, the Trainer's own flags reach the classes here, but it
            hands on neither betas nor decay to GaLore.

    Raises:
        RuntimeError: it is installed already; galore_torch or apollo_torch was imported before; the Trainer knows no factories.
            Nothing has changed then.
    """
    for name in _MODULES:
        if isinstance(there := sys.modules.get(name), _StandIn):
            raise RuntimeError(
                "lowrank_optim.integrations.compat is installed already; one call of install() is enough, and uninstall() undoes it"
            )
        if there is not None:
            raise RuntimeError(
                f"{name} is imported already (from {getattr(there, '__file__', None)}), and whoever took a class from it keeps that "
                "class; call lowrank_optim.integrations.compat.install() at the top of the script, before the imports that bring "
                f"{name}, in a fresh process"
            )
    trainer_class = _trainer_class() if trainer else None
    answer = None
    if trainer_class is not None:
        answer = _with_our_flags(trainer_class.get_optimizer_cls_and_kwargs)
        trainer_class.get_optimizer_cls_and_kwargs = staticmethod(answer)
    for name in _MODULES:
        sys.modules[name] = _StandIn(name, answer)
    _forget_what_is_available()


def uninstall() -> None:
    """Undo `install`. Optimizers that were made stay as they are, and so do names that were imported from the two modules.

    Raises:
        RuntimeError: nothing is installed; or something else has replaced what was. Nothing has changed then.
    """
    modules = [sys.modules.get(name) for name in _MODULES]
    there = [module for module in modules if isinstance(module, _StandIn)]
    if not there:
        raise RuntimeError(
            "lowrank_optim.integrations.compat is not installed; call install() first, or leave uninstall() out"
        )
    if len(there) < len(_MODULES):
        (name,) = [name for name, module in zip(_MODULES, modules, strict=True) if not isinstance(module, _StandIn)]
        raise RuntimeError(
            f"{name} in sys.modules was replaced after install(); put back what was there, then uninstall"
        )
    answer = there[0].answer
    if answer is not None:
        trainer_class = _trainer_class()
        current = trainer_class.get_optimizer_cls_and_kwargs
        if current is not answer:
            raise RuntimeError(
                "Trainer.get_optimizer_cls_and_kwargs was replaced after install(), by "
                f"{current.__module__}.{current.__name__}; undo that first, then uninstall"
            )
        trainer_class.get_optimizer_cls_and_kwargs = staticmethod(answer.__wrapped__)
    for name in _MODULES:
        del sys.modules[name]
    _forget_what_is_available()


class _StandIn(ModuleType):
    """A module under the name of another package. It has a spec, so that `importlib.util.find_spec` finds it.

    answer: what was installed as `Trainer.get_optimizer_cls_and_kwargs`, or None.
    """

    def __init__(self, name: str, answer: Any) -> None:
        super().__init__(name, f"Stands in for {name}: the optimizers of lowrank_optim, called as those of {name} are.")
        self.answer = answer
        self.__spec__ = ModuleSpec(name, loader=None, origin="lowrank_optim.integrations.compat")
        self.__all__ = list(_MODULES[name])
        for public in _MODULES[name]:
            setattr(self, public, getattr(stand_ins, public))


class _FromFlags(LowRank):
    """The factory that the Trainer gets for one of our flags."""

    def __call__(self, model: nn.Module, training_args: Any = None, *, layerwise: bool = False, **options: Any) -> Any:
        trainer = sys._getframe(1).f_locals.get("self")  # Trainer.create_optimizer
        # Their content is among the options; LowRank refuses to guess what they mean.
        training_args = copy.copy(training_args)
        training_args.__dict__["optim_args"] = None
        optimizer: LowRankOptimizer = super().__call__(model, training_args, **options)
        if layerwise:
            handler = getattr(trainer, "callback_handler", None)
            if handler is None:
                raise RuntimeError(
                    'an optim that ends in "_layerwise" updates in backward, and only a Trainer of transformers can be told so; take '
                    "the optim without it, and call lowrank_optim.update_in_backward(optimizer)"
                )
            if not any(isinstance(callback, InBackward) for callback in handler.callbacks):
                handler.add_callback(InBackward())
        return optimizer


def _trainer_class() -> Any:
    """The Trainer of transformers, or None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    transformers = importlib.import_module("transformers")
    module = importlib.import_module("transformers.trainer")
    if not hasattr(module, "is_optimizer_factory"):
        raise RuntimeError(
            f"the Trainer of transformers {transformers.__version__} knows no optimizer factories (5.2 and newer do), so betas and "
            "weight decay would be lost on the way to GaLore; nothing was installed. Upgrade transformers, or build the optimizer "
            "first: Trainer(..., optimizers=(LowRank()(model.to(args.device), args, method=..., rank=...), None)). Code that imports "
            "galore_torch or apollo_torch itself, such as LLaMA-Factory, is served by install(trainer=False)"
        )
    return module.Trainer


def _with_our_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.get_optimizer_cls_and_kwargs` that answers for `_FLAGS`, and asks `original` for all others."""

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        flag = str(getattr(args.optim, "value", args.optim))
        name = flag.removesuffix("_layerwise")
        if name not in _FLAGS:
            theirs: tuple[Any, dict[str, Any]] = original(args, model)
            return theirs
        options = {**_DEFAULTS, **_FLAGS[name], **stand_ins.translated(_parsed(args.optim_args, flag))}
        return _FromFlags, {**options, "training_args": args, "layerwise": name != flag}

    return get_optimizer_cls_and_kwargs


def _parsed(optim_args: str | None, flag: str) -> dict[str, Any]:
    """`TrainingArguments.optim_args`, "name=value, name=value", with numbers, True, False and None as Python's own."""
    options: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in (optim_args or "").split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise ValueError(
                f'optim_args is {optim_args!r}, and {item!r} is not "name=value"; write "rank=64, scale=0.25"'
            )
        if name in ("method", "training_args", "layerwise"):
            raise ValueError(
                f"optim_args has {name}, which optim={flag!r} says already; for other methods give the Trainer "
                "optimizer_cls_and_kwargs=(lowrank_optim.integrations.transformers.LowRank, dict(method=..., rank=...))"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _forget_what_is_available() -> None:
    """transformers asks once whether a package is there, and keeps the answer."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in _MODULES:
        clear = getattr(getattr(utils, f"is_{name}_available", None), "cache_clear", None)
        if clear is not None:
            clear()
