"""One training run: model, optimizer, schedule, loop, checkpoints, metrics."""

import inspect
import json
import math
import os
import pickle
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import lowrank_optim as lo
from pretraining import checkpoint
from pretraining.baselines import BASELINES
from pretraining.configs import build_model
from pretraining.data import FileBatches, StreamedBatches
from pretraining.folder import write_atomically
from pretraining.host import fast_products
from pretraining.layers import parametrize
from pretraining.stopping import Terminated, termination

Batches = FileBatches | StreamedBatches
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""


class DivergedError(RunError):
    """The loss is not finite any more."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run; a resume must agree on all of it."""

    model: str
    optimizer: str
    lr: float
    steps: int
    warmup: int
    batch: int
    accumulate: int
    length: int
    clip: float
    weight_decay: float
    betas: tuple[float, float]
    dtype: str
    seed: int
    corpus: str
    text_digest: str | None  # None for a stream
    bpe: int | None
    rank: int | float | None
    validate_every: int
    validation_batches: int
    grad_checkpointing: bool = False
    in_backward: bool = False
    weight_bits: int = 16
    parametrization: str = "none"
    density: float | None = None  # of the parametrization
    alpha: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a run is called: the parametrization, or the optimizer of dense layers."""
        return self.optimizer if self.parametrization == "none" else self.parametrization

    def comparable(self) -> dict[str, Any]:
        """As JSON reads it back; without what is off and what runs of earlier versions do not know."""
        content = json.loads(json.dumps(asdict(self)))
        off = {"in_backward": False, "weight_bits": 16, "parametrization": "none", "density": None, "alpha": None}
        return {key: value for key, value in content.items() if key not in off or value != off[key]}


@dataclass
class Result:
    """What a finished run reports; a run that diverged has no losses."""

    optimizer: str  # the label of its configuration
    lr: float
    steps: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    seconds: float
    bytes: dict[str, int]
    peak: dict[str, int]


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """A baseline of torch, or a low-rank optimizer by its short name; matrices of the layers are low-rank, the rest is dense.

    The betas of the configuration go to methods that have some, unless its options name others (Lion's are not Adam's). Layers with a
    parametrization are trained by Adam as they are, whose groups know that factors decay half as much.

    Raises:
        RunError: the optimizer refuses an option, or needs a newer torch.
    """
    try:
        if config.parametrization != "none":
            groups = lo.param_groups(model, rank=None, weight_decay=config.weight_decay)
            rule = {"rule": "adam", "betas": config.betas} | config.options
            return lo.LowRankOptimizer(groups, lr=config.lr, weight_decay=config.weight_decay, seed=config.seed, **rule)
        if config.optimizer in BASELINES:
            return BASELINES[config.optimizer](model, config.lr, config.betas, config.weight_decay)
        method = lo.by_name(config.optimizer)
        options = dict(config.options)
        if "betas" in inspect.signature(method).parameters:
            options.setdefault("betas", config.betas)
        rank = config.rank if config.rank is not None else (1 if config.optimizer == "apollo_mini" else 0.25)
        # `density` is FRUGAL's word for a fractional rank and, like it, decides which groups there are.
        size = {"density": options.pop("density")} if "density" in options else {"rank": rank}
        if method.matrix_options and config.rank is None and "density" not in size:
            size = dict(method.matrix_options)
        make_groups = lo.param_groups
        if config.optimizer in lo.LAYERWISE_METHODS:  # some layers at a time, dense unless a rank was asked for
            make_groups, size = lo.layer_groups, size if "density" in size else {"rank": config.rank}
        groups = make_groups(model, **size, weight_decay=config.weight_decay)
        return method(groups, lr=config.lr, weight_decay=config.weight_decay, seed=config.seed, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(str(error)) from error


def change_layers(config: Config, model: nn.Module) -> nn.Module:
    """The model with the layers and the weights that its run has, before there is an optimizer.

    Raises:
        RunError: a layer cannot have them, and why.
    """
    try:
        model = parametrize(config, model)
    except ValueError as error:
        raise RunError(f"--parametrization {config.parametrization}: {error}") from error
    return lo.nn.quantize_weights_(model) if config.weight_bits == 8 else model


def attach(config: Config, optimizer: Optimizer) -> lo.UpdateInBackward | None:
    """Updates inside backward, where the configuration has them: each gradient is freed as soon as it is used.

    Raises:
        RunError: the optimizer cannot, and why.
    """
    if not config.in_backward:
        return None
    try:
        return lo.update_in_backward(optimizer, config.accumulate, config.clip or None)
    except (TypeError, ValueError) as error:
        raise RunError(f"--in-backward: {error}") from error


def schedule(config: Config) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to a tenth."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return factor


def exact_bytes(
    model: nn.Module, optimizer: Optimizer, in_backward: lo.UpdateInBackward | None = None
) -> dict[str, int]:
    """Bytes of weights, of gradients of those that are trained now, and of optimizer state by kind, counted from the tensors.

    With updates in backward one gradient is alive at a time, and what accumulation keeps of the others.
    """
    weights = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    state = {f"state: {name}": size for name, size in lo.state_bytes(optimizer).items()}
    gradients = {"gradients": sum(size for size, on in weights if on)}
    if in_backward is not None:
        memory = in_backward.memory()
        gradients = {"gradients, the largest of them": memory["gradient"]}
        gradients |= {"gradients, accumulated": memory["accumulated"]} if memory["accumulated"] else {}
    return {"weights": sum(size for size, _ in weights)} | gradients | state


CUDA_PEAK = "torch.cuda.max_memory_allocated"


def peak_memory(device: torch.device) -> dict[str, int]:
    """The largest use of memory so far, named as what it is."""
    if device.type == "cuda":
        return {CUDA_PEAK: torch.cuda.max_memory_allocated(device)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak resident memory of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Run:
    """A run in a folder: `metrics.jsonl`, `checkpoint.pt`, `config.json`, and `result.json` at the end."""

    def __init__(self, config: Config, folder: Path, batches: Batches, vocabulary: int, device: torch.device) -> None:
        self.config, self.folder, self.batches, self.device = config, folder, batches, device
        self.vocabulary = vocabulary
        self.step = 0
        self.seconds = 0.0
        self.bytes: dict[str, int] = {}

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def finished(self) -> Result | None:
        """The result of an earlier, finished run with this configuration."""
        if not self.result_file.exists():
            return None
        self.check_config(self.config, self.folder)
        return Result(**json.loads(self.result_file.read_text(encoding="utf-8")))

    @staticmethod
    def check_config(config: Config, folder: Path) -> None:
        """Refuse to continue a run that was started with other settings."""
        path = folder / "config.json"
        if not path.exists():
            return
        saved, now = json.loads(path.read_text(encoding="utf-8")), config.comparable()
        differing = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        if differing:
            lines = [f"{key}: {saved.get(key)!r} there, {now.get(key)!r} now" for key in differing]
            raise RunError(
                f"{folder} holds a run with other settings:\n  " + "\n  ".join(lines) + "\n"
                "continue with those, or give another --out, or delete that run with --overwrite"
            )

    def train(
        self,
        save_every: int,
        report: Callable[["Run", dict[str, Any]], None],
        within_step: Callable[[lo.StepProgress], None] | None = None,
    ) -> Result:
        """Train to the last step, from the checkpoint if there is one.

        `report` is called after every step, `within_step` every ten seconds in one that takes longer.

        Raises:
            Terminated: SIGTERM came; the step that it came in is saved.
        """
        config = self.config
        self.check_config(config, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.json", json.dumps(config.comparable(), indent=2))
        if self.device.type == "cuda":  # the peak is this run's, not an earlier one's
            torch.cuda.reset_peak_memory_stats(self.device)
        random.seed(config.seed)
        model = build_model(
            config.model,
            self.vocabulary,
            config.length,
            self.device,
            DTYPES[config.dtype],
            config.grad_checkpointing,
            config.seed,
        )
        model = change_layers(config, model)
        optimizer = make_optimizer(config, model)
        in_backward = attach(config, optimizer)
        if within_step is not None and isinstance(optimizer, lo.LowRankOptimizer):
            lo.watch_step(optimizer, within_step)
        scheduler = LambdaLR(optimizer, schedule(config))
        fast = fast_products(self.device, DTYPES[config.dtype])
        with self._resume(model, optimizer, scheduler) as metrics, fast, termination.training():
            while self.step < config.steps:
                began = time.perf_counter()
                lr = scheduler.get_last_lr()[0]
                loss, norm = self._gradients(model)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if in_backward is not None:  # which has clipped, and knows the norm when the step is over
                    norm = float(optimizer.last_grad_norm)
                self.step += 1
                row: dict[str, Any] = {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}
                row["tokens"] = self.tokens
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    row["val_loss"] = self.validate(model)
                self.seconds += time.perf_counter() - began
                row["seconds"] = round(self.seconds, 6)
                metrics.write(json.dumps(row) + "\n")
                # torch.optim.AdamW makes its state in the first step; before that there is nothing to count.
                self.bytes = self.bytes or exact_bytes(model, optimizer, in_backward)
                report(self, row)
                if self.step % save_every == 0 or self.step == config.steps or termination.came:
                    self._save(model, optimizer, scheduler, metrics)
                if termination.came:
                    raise Terminated(self.step)
        # Still empty where a run was killed between its last checkpoint and its result.
        self.bytes = self.bytes or exact_bytes(model, optimizer, in_backward)
        rows = read_metrics(self.folder)
        recent = [row["loss"] for row in rows[-20:]]
        return self._finish(sum(recent) / len(recent), rows[-1]["val_loss"])

    def diverged(self) -> Result:
        """The result of a run whose loss is not finite any more."""
        return self._finish(None, None)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.batch * self.config.accumulate * self.config.length

    def _finish(self, train_loss: float | None, val_loss: float | None) -> Result:
        config = self.config
        result = Result(
            config.label,
            config.lr,
            self.step,
            self.tokens,
            train_loss,
            val_loss,
            self.seconds,
            self.bytes,
            peak_memory(self.device),
        )
        write_atomically(self.result_file, json.dumps(asdict(result), indent=2))
        return result

    def _gradients(self, model: nn.Module) -> tuple[float, float]:
        """Accumulate the gradients of one step; returns the mean loss and the norm before clipping."""
        config = self.config
        total = torch.zeros((), device=self.device)
        windows = self.batches.batch(self.step, config.batch * config.accumulate).to(self.device)
        for part in windows.split(config.batch):
            loss = self._loss(model, part) / config.accumulate
            loss.backward()
            total += loss.detach()
        if not math.isfinite(value := float(total)):
            raise DivergedError(f"the loss is {value} at step {self.step + 1}; try a lower --lr")
        limit = config.clip if config.clip > 0 else math.inf
        return value, float(nn.utils.clip_grad_norm_(model.parameters(), limit))

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        enabled = self.config.dtype == "autocast"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            return model(input_ids=tokens, labels=tokens).loss

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Mean loss over the validation windows."""
        model.eval()
        batches = self.batches.validation_batches(self.config.validation_batches, self.config.batch)
        losses = [float(self._loss(model, tokens.to(self.device))) for tokens in batches]
        model.train()
        return sum(losses) / len(losses)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, metrics: Any) -> None:
        metrics.flush()
        os.fsync(metrics.fileno())
        content = {
            "config": self.config.comparable(),
            "step": self.step,
            "seconds": self.seconds,
            "metrics_bytes": metrics.tell(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": checkpoint.random_state(),
        }
        checkpoint.save(self.folder / "checkpoint.pt", content)

    def _resume(self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> Any:
        """Restore the last checkpoint, if any; returns the metrics file, cut to the step of the checkpoint."""
        path, kept = self.folder / "checkpoint.pt", 0
        if path.exists():
            try:
                content = checkpoint.load(path)
            except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                raise RunError(f"{path} is damaged; delete it, and --resume starts this run again") from error
            if content["config"] != self.config.comparable():
                raise RunError(
                    f"{path} was written with other settings than config.json beside it; choose another --out"
                )
            try:
                model.load_state_dict(content["model"])
                optimizer.load_state_dict(content["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise RunError(f"{path} is of another version of this program: {error}") from error
            scheduler.load_state_dict(content["scheduler"])
            checkpoint.restore_random_state(content["random"])
            self.step, self.seconds, kept = content["step"], content["seconds"], content["metrics_bytes"]
        metrics = (self.folder / "metrics.jsonl").open("a+", encoding="utf-8")
        metrics.truncate(kept)
        metrics.seek(kept)
        return metrics


def read_metrics(folder: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics, of its first `steps` steps."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:steps]]
