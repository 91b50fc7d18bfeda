"""Pretrain a LLaMA on text, with any optimizer of the package beside AdamW.

    python examples/pretrain.py                                            # GaLoreAdamW, a small model, minutes on a CPU
    python examples/pretrain.py --compare adamw,galore,fira --out runs/a   # several, one table and one plot
    python examples/pretrain.py --out runs/a --compare adamw,galore,fira --resume
    python examples/pretrain.py --sweep adamw,galore --out runs/sweep      # a learning-rate grid for each
    python examples/pretrain.py --compare adamw,galore --out runs/a --report report.html    # curves, memory, settings: one page
    python examples/pretrain.py --config 7b --budget 24GiB                 # 7B on one card; without a GPU, the plan
    python examples/pretrain.py --config 7b --budget 24GiB --device cpu    # really, in the host's memory: minutes a step
    python examples/pretrain.py --config 7b --budget 16GiB --optimizer qgalore
    python examples/pretrain.py --parametrization sltrain --rank 32 --density 0.05       # sparse plus low-rank layers
    python examples/pretrain.py --config 7b --parametrization sltrain --density 0.05 --budget 24GiB
    python examples/pretrain.py --compare adamw,galore --parametrization none,sltrain --out runs/b
    python examples/pretrain.py --model 60m --dataset allenai/c4 --bpe 32000 --dtype bfloat16 --steps 10000

The default text is the source code of Python's standard library, which is on every machine. A run writes metrics.jsonl,
checkpoint.pt, loss.png and result.json to its folder; killed at any moment, it continues with --resume to the same numbers
(on a GPU with --deterministic). On SIGTERM it finishes the step, saves it and says how to go on.
"""

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

try:  # before torch, see pretraining/__init__.py
    from pretraining.budget import Budget, plan_run, preset, refusal
    from pretraining.configs import SIZES, build_model
    from pretraining.host import available, give_blocks_back
    from pretraining.page import check_target, write_page
    from pretraining.report import (
        Reporter,
        best_of_each,
        console,
        plot,
        results_table,
        write_comparison,
    )
except ModuleNotFoundError as error:
    sys.exit(f"pretrain.py: {error}; install what the example needs: pip install 'lowrank-optim[hf,plot]'")

import torch
from pretraining.data import (
    BYTE_VOCABULARY,
    DataError,
    FileBatches,
    StreamedBatches,
    Text,
    Tokenizer,
    as_lines,
    read_text,
    standard_library,
    stream_text,
    text_files,
)
from pretraining.folder import FolderError, check_folder, delete_runs, only_process
from pretraining.layers import PARAMETRIZATIONS
from pretraining.run import Config, DivergedError, Result, Run, RunError, attach, change_layers, make_optimizer
from pretraining.stopping import STATUS, Terminated, catch_sigterm

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text
from lowrank_optim.planner.memory_plan import describe_plan
from lowrank_optim.planner.simulation.allocator import parse_bytes

# For adamw and galore: what benchmarks/results/pretrain_sweep.json found best for the default model. Others: starting points, near
# what benchmarks/results/convergence-cpu.json found for shorter runs.
LEARNING_RATES = {
    "adamw": 2e-3,
    "galore": 1.6e-2,
    "galore_8bit": 1.6e-2,
    "galore_adafactor": 1.6e-2,
    "fira": 1.6e-2,
    "apollo": 1.6e-2,
    "apollo_mini": 4e-3,
    "frugal": 2e-3,
    "frugal_lion": 1e-3,
    "frugal_sgd": 0.256,
    "ldadam": 4e-3,
    "qgalore": 1.6e-2,
    "muon_adamw": 8e-3,
    "sumo": 8e-3,
    "scale": 1e-3,
    "sinkgd": 1.6e-2,
    "alice": 3.2e-2,
    "subtrack": 8e-3,
    "conda": 4e-3,
    "foam": 8e-3,
    "low_rank": 2e-3,
    "sltrain": 4e-3,
    "lisa": 2e-3,
    "badam": 2e-3,
}
# The learning rates of a sweep are 1, 2, 4 and 8 times these: as many for each optimizer.
SWEEP_FACTORS = (1, 2, 4, 8)
SWEEP_FROM = {name: rate / 4 for name, rate in LEARNING_RATES.items()} | {"adamw": 1e-3}
# For methods that are in neither table.
ANY_SWEEP_FROM, ANY_LEARNING_RATE = 2e-3, 8e-3
OWN_GAP = ("ldadam",)  # a new subspace at every step is what the method is
OPTIMIZERS = ("adamw", *lo.METHODS, *lo.FULL_RANK_METHODS, *lo.LAYERWISE_METHODS)
LOW_RANK_OPTIONS = ("update_proj_gap", "scale", "proj_type", "projector", "on_refresh")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", default="cpu", choices=SIZES, help="size (default cpu, under a million parameters)")
    what.add_argument(
        "--config",
        choices=SIZES,
        help="a size as it is trained on one card: galore_8bit (or another --optimizer; qgalore with int8 weights) in backward, "
        "checkpointing, bfloat16, 1 × 2048 tokens of a vocabulary of 32,000; other arguments override",
    )
    what.add_argument("--optimizer", help=f"one of {', '.join(OPTIMIZERS)} (default galore)")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in PARAMETRIZATIONS.items())
    what.add_argument(
        "--parametrization",
        default="none",
        metavar="A,B,…",
        help=f"the linear layers ({kinds}); `none` is trained with --optimizer, --compare or --sweep, each of the others with AdamW, "
        "as one more run (default none)",
    )
    what.add_argument("--density", type=float, help="of S in sltrain (default 0.03)")
    what.add_argument("--alpha", type=float, help="s = alpha/rank (default: s = 1)")
    what.add_argument("--compare", metavar="A,B,…", help="train with several optimizers, write one table and one plot")
    what.add_argument("--sweep", metavar="A,B,…", help="train with four learning rates for each optimizer")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", nargs="+", type=Path, metavar="PATH", help="files or folders (default: the standard library)"
    )
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a dataset of the hub, streamed, e.g. allenai/c4")
    text.add_argument("--bpe", type=int, metavar="N", help="train a byte-level BPE of N tokens (default: bytes)")
    text.add_argument("--length", type=int, help="tokens in a sequence (default: by model)")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=800, help="updates (default 800)")
    how.add_argument("--batch", type=int, default=16, help="sequences in a micro-batch (default 16)")
    how.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step (default 1)")
    how.add_argument("--lr", type=float, help="peak learning rate (default: by optimizer)")
    how.add_argument("--warmup", type=int, help="steps of linear warm-up (default: a tenth); then a cosine to a tenth")
    how.add_argument("--weight-decay", type=float, default=0.1, help="decoupled (default 0.1)")
    how.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), metavar=("B1", "B2"), help="default 0.9 0.95")
    how.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip (default 1)"
    )
    how.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "autocast"),
        help="of weights and arithmetic; autocast: float32 weights, bfloat16 arithmetic (default float32)",
    )
    how.add_argument("--device", help="default: cuda if there is one, else cpu")
    how.add_argument(
        "--grad-checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    how.add_argument(
        "--in-backward", action="store_true", help="update each parameter inside backward and free its gradient at once"
    )
    how.add_argument("--ddp", action="store_true", help="under torchrun: DistributedDataParallel")
    how.add_argument("--fsdp", action="store_true", help="under torchrun: fully_shard, with sharded checkpoints")
    how.add_argument("--deterministic", action="store_true", help="the same bits in every run on a GPU too; slower")
    how.add_argument("--seed", type=int, default=0, help="of weights and data order (default 0)")
    how.add_argument(
        "--budget", metavar="SIZE", help="plan the memory first, refuse what does not fit (24GiB), and never take more"
    )
    how.add_argument("--weight-bits", type=int, choices=(16, 8), default=16, help="8: int8 weights (default 16)")
    low = parser.add_argument_group("low-rank optimizers")
    low.add_argument(
        "--rank",
        type=number,
        help="an int, or a fraction of the short side (default 0.25; apollo_mini: 1; lisa, badam: dense); that of the layers with "
        "a --parametrization, too",
    )
    low.add_argument("--update-proj-gap", type=int, help="steps between refreshes (default 50; ldadam: 1)")
    low.add_argument("--scale", type=float, help="multiplies the low-rank update (default: by optimizer)")
    low.add_argument("--proj-type", default="std", help="std, reverse_std, left, right or full (default std)")
    low.add_argument("--projector", help="randomized_svd, svd, random or coordinate (default: by optimizer)")
    low.add_argument(
        "--on-refresh",
        choices=("keep", "reset", "rotate"),
        help="what happens to the moments when the subspace changes (default: by optimizer)",
    )
    low.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="any other option; may be repeated"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="folder (default runs/pretrain)")
    files.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write curves, memory and settings as one page, which needs no other file",
    )
    files.add_argument("--resume", action="store_true", help="continue where a run in the folder was stopped")
    files.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start again")
    files.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    files.add_argument("--validate-every", type=int, default=100, help="steps between validations (default 100)")
    files.add_argument("--validation-batches", type=int, default=8, help="batches of a validation (default 8)")
    files.add_argument("--log-every", type=int, default=100, help="steps between lines where there is no terminal")
    return parser


def number(text: str) -> int | float:
    """An int where it is written as one, else a float."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as a Python literal or, where it is none, a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RunError(f"--option {text}: write KEY=VALUE")
    if key in (*LOW_RANK_OPTIONS, "rank", "lr", "betas", "weight_decay", "seed"):
        raise RunError(f"--option {text}: use --{key.replace('_', '-')} {value}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def check_names(what: str, names: Iterable[str], valid: Collection[str]) -> None:
    """Raise RunError for a name that is not valid, with the nearest one."""
    for name in names:
        if name not in valid:
            near = get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RunError(f"there is no {what} {name!r}: {hint}valid names are {', '.join(valid)}")


def layers_to_train(args: argparse.Namespace) -> list[str]:
    """The names in --parametrization.

    Raises:
        RunError: there is none of that name, or it cannot go with the other arguments.
    """
    kinds = str(args.parametrization).split(",")
    check_names("parametrization", kinds, PARAMETRIZATIONS)
    if len(set(kinds)) < len(kinds):
        raise RunError(f"--parametrization {args.parametrization} names one twice")
    asked = args.compare or args.sweep or args.optimizer
    if "none" not in kinds and asked not in (None, "adamw"):
        raise RunError(
            f"--parametrization {args.parametrization} is trained with AdamW; for dense layers with {asked} beside it write "
            f"--parametrization none,{args.parametrization}"
        )
    for name, needed in (("density", {"sltrain"}), ("alpha", {"sltrain", "low_rank"})):
        if getattr(args, name) is not None and not needed & set(kinds):
            raise RunError(f"--{name} needs --parametrization {' or '.join(sorted(needed))}")
    if args.weight_bits == 8 and kinds != ["none"]:
        raise RunError("--weight-bits 8 and --parametrization exclude each other: factors are not stored in int8")
    return kinds


def check(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Raise RunError for arguments that cannot work; returns (optimizer, parametrization) of each run."""
    kinds = layers_to_train(args)
    names = (args.compare or args.sweep or args.optimizer or "galore").split(",") if "none" in kinds else []
    check_names("optimizer", names, OPTIMIZERS)
    if len(set(names)) < len(names):
        raise RunError(f"{','.join(names)} names an optimizer twice")
    for name in ("steps", "batch", "accumulate", "save_every", "validate_every", "validation_batches", "log_every"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name, least in (("length", 2), ("bpe", BYTE_VOCABULARY + 1), ("warmup", 0), ("clip", 0.0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise RunError(f"--{name} is {value}; it must be at least {least}")
    if args.compare and args.sweep:
        raise RunError("--compare and --sweep cannot be combined; --sweep writes a table of its own")
    if args.text and args.dataset:
        raise RunError("--text and --dataset cannot be combined; choose one")
    if args.report is not None:
        if args.fsdp or args.ddp:
            raise RunError("--report needs one process: runs under --fsdp and --ddp write no metrics")
        check_target(args.report, args.out)
    if args.resume and args.overwrite:
        raise RunError("--resume continues a run and --overwrite deletes it; choose one")
    if args.lr is not None and args.sweep:
        raise RunError("--lr and --sweep cannot be combined; a sweep chooses the learning rates")
    runs = [(name, "none") for name in names] + [("adamw", kind) for kind in kinds if kind != "none"]
    if args.lr is not None and len(runs) > 1:
        raise RunError("--lr with several optimizers would be unfair to some; leave it out, or run them one by one")
    if len(runs) > 1 and not args.compare and not args.sweep:
        raise RunError(
            f"--parametrization {args.parametrization} is more than one run: add --compare {','.join(names) or 'adamw'}"
        )
    if args.in_backward and runs == [("adamw", "none")]:
        raise RunError("--in-backward: adamw is torch's, which cannot; try --optimizer galore")
    if args.option and runs == [("adamw", "none")]:
        raise RunError(f"--option {args.option[0]}: adamw has no further options")
    return runs


def configuration(args: argparse.Namespace, name: str, layers: str = "none") -> Config:
    options: dict[str, Any] = {}
    if layers != "none":
        options = dict(map(option, args.option))
    elif name != "adamw":
        options = {} if name in OWN_GAP else {"update_proj_gap": 50}
        options |= {key: getattr(args, key) for key in LOW_RANK_OPTIONS if getattr(args, key) is not None}
        options |= dict(map(option, args.option))
    label, theirs = (name if layers == "none" else layers), name == "adamw" and layers == "none"
    return Config(
        model=args.model,
        optimizer=name,
        lr=args.lr if args.lr is not None else LEARNING_RATES.get(label, ANY_LEARNING_RATE),
        steps=args.steps,
        warmup=args.warmup if args.warmup is not None else max(1, args.steps // 10),
        batch=args.batch,
        accumulate=args.accumulate,
        length=args.length or SIZES[args.model].length,
        clip=args.clip,
        weight_decay=args.weight_decay,
        betas=tuple(args.betas),
        dtype=args.dtype,
        seed=args.seed,
        corpus=args.dataset or (" ".join(map(str, args.text)) if args.text else "standard library"),
        text_digest=None,
        bpe=args.bpe,
        rank=None if theirs else args.rank,
        validate_every=args.validate_every,
        validation_batches=args.validation_batches,
        grad_checkpointing=args.grad_checkpointing,
        in_backward=args.in_backward and not theirs,
        weight_bits=args.weight_bits,
        parametrization=layers,
        density=args.density if layers == "sltrain" else None,
        alpha=args.alpha if layers != "none" else None,
        options=options,
    )


def check_optimizer(config: Config) -> None:
    """Raise RunError for options that the optimizer refuses, now and not after an hour of another optimizer's run."""
    meta = torch.device("meta")  # shapes without numbers: no memory, no time
    model = build_model(config.model, BYTE_VOCABULARY, config.length, meta, torch.float32, False, config.seed)
    if config.parametrization != "none":
        model = change_layers(config, model)
    attach(config, make_optimizer(config, model))


def within_budget(args: argparse.Namespace, configs: list[Config], device: torch.device, dry: bool) -> None:
    """Plan every run and refuse what does not fit; on a GPU, limit the allocator.

    With `dry` the plan is that of a GPU.
    """
    try:
        budget = Budget(parse_bytes(args.budget))
    except ValueError as error:
        raise RunError(f"--budget: {error}") from error
    for config in configs:
        vocabulary = config.bpe or BYTE_VOCABULARY
        found = plan_run(config, vocabulary, torch.device("cuda") if dry else device)
        if not found.fits(budget.size):
            raise RunError("--budget\n\n" + refusal(config, vocabulary, budget.size, found))
        if device.type == "cpu" and not dry and (free := available()) is not None and free < found.peak_bytes:
            raise RunError(
                f"--budget: the run takes {found.peak_bytes / 2**30:.1f} GiB, but the machine has {free / 2**30:.1f} GiB free; "
                "end other programs, or take a smaller --config"
            )
        console.print(describe_plan(found, budget.size))
    if device.type == "cuda":
        budget.limit(device)
    elif device.type == "cpu" and not dry:
        console.print(give_blocks_back())
    if dry:
        console.print("\nThere is no GPU here, so this was a dry run; --device cpu trains on the CPU.")


def choose_device(args: argparse.Namespace) -> torch.device:
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {args.device} cannot be used: {reason}") from error
    if device.type == "meta":
        raise RunError("--device meta holds no numbers; there is nothing to train")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    return device


class Source:
    """The text of all runs, as batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.text: Text | None = None
        self.batches: FileBatches | None = None
        if not args.dataset:
            self.text = read_text(text_files(args.text) if args.text else standard_library())
        self.digest = self.text.digest if self.text else None

    def tokenizer(self) -> Tokenizer:
        args = self.args
        if self.text:
            return Tokenizer(args.bpe, iter(as_lines(self.text.train)), args.out / f"bpe-{args.bpe}-{self.digest}.json")
        name = "".join(c if c.isalnum() else "-" for c in args.dataset)
        sample = (text for text, _ in zip(stream_text(args.dataset), range(10_000), strict=False))
        return Tokenizer(args.bpe, sample, args.out / f"bpe-{args.bpe}-{name}.json")

    def open(self, config: Config) -> tuple[FileBatches | StreamedBatches, int]:
        """The batches for one run, and the size of the vocabulary."""
        if self.text is None:  # a stream starts anew for each run
            tokenizer = self.tokenizer()
            held_out = config.validation_batches * config.batch
            return StreamedBatches(self.args.dataset, tokenizer, config.length, held_out), tokenizer.vocabulary
        if self.batches is None:
            tokenizer = self.tokenizer()
            self.vocabulary = tokenizer.vocabulary
            train, validation = tokenizer.encode(self.text.train), tokenizer.encode(self.text.validation)
            self.batches = FileBatches(train, validation, config.length, config.seed)
            console.print(
                f"text: {config.corpus}, {len(train):,} training and {len(validation):,} validation tokens, "
                f"vocabulary {self.vocabulary}"
            )
        return self.batches, self.vocabulary


def train(args: argparse.Namespace, run: Run) -> Result:
    """One run, or its result if it is finished."""
    config = run.config
    if (result := run.finished()) is not None:
        console.print(f"{config.label}, lr {config.lr:g}: finished before")
        return result
    label = f"{config.label}, lr {config.lr:g}" if args.sweep else config.label
    try:
        with Reporter(label, config.steps, args.log_every) as reporter:
            return run.train(args.save_every, reporter, reporter.within_step)
    except DivergedError as error:
        if not args.sweep:
            raise
        console.print(f"{label}: {error}")
        return run.diverged()


def train_parallel(args: argparse.Namespace, runs: list[tuple[str, str]]) -> None:
    """One run on the processes that torchrun has started."""
    from pretraining import parallel

    if args.fsdp and args.ddp:
        raise RunError("--fsdp and --ddp exclude each other")
    if len(runs) > 1 or args.sweep:
        raise RunError("--fsdp and --ddp train with one --optimizer and --parametrization at a time")
    config, how = configuration(args, *runs[0]), "fsdp" if args.fsdp else "ddp"
    args.out.mkdir(parents=True, exist_ok=True)
    parallel.train(config, how, Source(args), args.out, args.save_every, args.log_every, args.resume)


def train_all(args: argparse.Namespace) -> list[tuple[Result, Path]]:
    """Every run that was asked for, with its folder; whatever can be refused is refused before the first one starts."""
    runs = check(args)
    if args.fsdp or args.ddp:
        train_parallel(args, runs)
        return []
    device = choose_device(args)
    # With --budget, without a GPU and without --device, the plan for a GPU is all there is to do: it needs no folder.
    dry = args.budget is not None and args.device is None and device.type == "cpu"
    if not dry:
        check_folder(args.out, args.resume, args.overwrite)
    configs = [configuration(args, *run) for run in runs]
    for config in configs:
        check_optimizer(config)
    if args.budget is not None:
        within_budget(args, configs, device, dry)
    if dry:
        return []
    source = Source(args)
    configs = [replace(config, text_digest=source.digest) for config in configs]
    if args.sweep:
        configs = [
            replace(config, lr=SWEEP_FROM.get(config.label, ANY_SWEEP_FROM) * factor)
            for config in configs
            for factor in SWEEP_FACTORS
        ]
    folders = [args.out]
    if args.sweep:
        folders = [args.out / f"{config.label}-{config.lr:g}" for config in configs]
    elif args.compare:
        folders = [args.out / config.label for config in configs]
    with only_process(args.out):
        if not args.overwrite:
            for config, folder in zip(configs, folders, strict=True):
                Run.check_config(config, folder)
        done = []
        for config, folder in zip(configs, folders, strict=True):
            batches, vocabulary = source.open(config)
            if args.overwrite and not done:  # only now is it certain that the new run can start
                delete_runs(args.out)
            done.append((train(args, Run(config, folder, batches, vocabulary, device)), folder))
        report(args, done)
    return done


def report(args: argparse.Namespace, runs: list[tuple[Result, Path]]) -> None:
    """Tables, files and the plot of finished runs."""
    results = [result for result, _ in runs]
    console.print(results_table(results))
    for what, amount in runs[-1][0].peak.items():
        console.print(f"{what}: {amount / 2**20:,.0f} MiB")
    written = [args.out / "loss.png"]
    if args.compare or args.sweep:
        write_comparison(results, args.out)
        written += [args.out / "comparison.md", args.out / "comparison.json"]
    if args.sweep:
        best = best_of_each(results)
        for name, r in best.items():
            rates = [other.lr for other in results if other.optimizer == name]
            edge = " (at the edge of the grid)" if r.lr in (rates[0], rates[-1]) else ""
            console.print(f"best: {name}, lr {r.lr:g}{edge}, validation loss {r.val_loss:.4f}")
        runs = [(result, folder) for result, folder in runs if result is best.get(result.optimizer)]
    shown = [(result, folder) for result, folder in runs if result.val_loss is not None]
    if shown and args.report is not None:
        write_page(shown, args.report)
        console.print(f"wrote {args.report}")
    if shown:
        plot(shown, written[0])
        console.print("wrote " + ", ".join(map(str, written)))


def resume_command(arguments: list[str]) -> str:
    """The command that goes on with the run of these arguments."""
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return shlex.join(["python", sys.argv[0], *kept, "--resume"])


def main(argv: list[str] | None = None) -> None:
    accept_any_text()
    parser = arguments()
    args = parser.parse_args(argv)
    if args.config is not None:  # its settings are defaults, which arguments override
        named = None if args.optimizer == parser.get_default("optimizer") else args.optimizer
        parser.set_defaults(**preset(args.config, named, args.parametrization))
        args = parser.parse_args(argv)

    def refuse(message: object) -> NoReturn:
        parser.exit(2, f"{parser.prog}: {message}\n")

    def stop(status: int, where: str) -> NoReturn:
        command = resume_command(sys.argv[1:] if argv is None else argv)
        parser.exit(
            status, f"\n{parser.prog}: stopped. This goes on from {where} to the same numbers:\n\n    {command}\n"
        )

    # torchrun ends its processes by SIGTERM when one has failed: they must not wait for it.
    several = args.fsdp or args.ddp
    try:
        with nullcontext() if several else catch_sigterm():
            train_all(args)
    except (DataError, FolderError, RunError) as error:
        refuse(error)
    except KeyboardInterrupt:
        stop(130, "the last checkpoint")
    except Terminated as stopped:
        stop(STATUS, "the last checkpoint" if stopped.step is None else f"step {stopped.step}, which is saved,")


if __name__ == "__main__":
    main()
