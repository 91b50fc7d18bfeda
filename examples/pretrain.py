"""Pretrain a LLaMA on text, with any optimizer of the package beside AdamW.

    python examples/pretrain.py                                            # GaLoreAdamW, a small model, minutes on a CPU
    python examples/pretrain.py --compare adamw,galore,fira --out runs/a   # several, one table and one plot
    python examples/pretrain.py --out runs/a --compare adamw,galore,fira --resume
    python examples/pretrain.py --sweep adamw,galore --out runs/sweep      # a learning-rate grid for each
    python examples/pretrain.py --model 60m --dataset allenai/c4 --bpe 32000 --dtype bfloat16 --steps 10000

The default text is the source code of Python's standard library, which is on every machine. A run writes metrics.jsonl,
checkpoint.pt, loss.png and result.json to its folder; killed at any moment, it continues with --resume to the same numbers.
"""

import argparse
import ast
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pretraining.configs import SIZES
from pretraining.data import (
    BYTE_VOCABULARY,
    DataError,
    FileBatches,
    StreamedBatches,
    Tokenizer,
    split,
    standard_library,
    stream_text,
    text_files,
)
from pretraining.report import Reporter, console, plot, results_table, write_comparison
from pretraining.run import Config, Result, Run, RunError

import lowrank_optim as lo

# What benchmarks/results/pretrain_sweep.json found best for the default model; others start from these.
LEARNING_RATES = {
    "adamw": 4e-3,
    "galore": 1.6e-2,
    "galore_adafactor": 1.6e-2,
    "fira": 8e-3,
    "apollo": 8e-3,
    "apollo_mini": 8e-3,
}
# Relative to these, each optimizer of a sweep gets the same number of points.
SWEEP = (0.25, 0.5, 1.0, 2.0)
LOW_RANK_OPTIONS = ("update_proj_gap", "scale", "proj_type", "projector", "on_refresh")


def arguments() -> argparse.ArgumentParser:
    methods = ", ".join(["adamw", *lo.METHODS])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", default="cpu", choices=SIZES, help="size (default cpu, under a million parameters)")
    what.add_argument("--optimizer", default="galore", help=f"one of {methods} (default galore)")
    what.add_argument("--compare", metavar="A,B,…", help="train with several optimizers, write one table and one plot")
    what.add_argument("--sweep", metavar="A,B,…", help="train with several learning rates for each optimizer")
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
    how.add_argument("--weight-decay", type=float, default=0.1)
    how.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), metavar=("B1", "B2"))
    how.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip (default 1)"
    )
    how.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "autocast"))
    how.add_argument("--device", help="default: cuda if there is one, else cpu")
    how.add_argument("--grad-checkpointing", action="store_true")
    how.add_argument("--seed", type=int, default=0)
    low = parser.add_argument_group("low-rank optimizers")
    low.add_argument(
        "--rank", type=number, help="an int, or a fraction of the short side (default 0.25; apollo_mini: 1)"
    )
    low.add_argument("--update-proj-gap", type=int, default=50, help="steps between refreshes (default 50)")
    low.add_argument("--scale", type=float)
    low.add_argument("--proj-type", default="std")
    low.add_argument("--projector")
    low.add_argument("--on-refresh", default="keep", choices=("keep", "reset", "rotate"))
    low.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="any other option; may be repeated"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="folder (default runs/pretrain)")
    files.add_argument("--resume", action="store_true", help="continue where a run in the folder was stopped")
    files.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start again")
    files.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    files.add_argument("--validate-every", type=int, default=100)
    files.add_argument("--validation-batches", type=int, default=8)
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
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def check(args: argparse.Namespace) -> list[str]:
    """Raise RunError for arguments that cannot work; returns the optimizers to run."""
    names = (args.compare or args.sweep or args.optimizer).split(",")
    for name in names:
        if name != "adamw":
            lo.by_name(name)
    if len(set(names)) < len(names):
        raise RunError(f"{','.join(names)} names an optimizer twice")
    for name in ("steps", "batch", "accumulate", "save_every", "validate_every", "validation_batches", "log_every"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("length", "bpe"):
        value, least = getattr(args, name), {"length": 2, "bpe": BYTE_VOCABULARY + 1}[name]
        if value is not None and value < least:
            raise RunError(f"--{name} is {value}; it must be at least {least}")
    if args.compare and args.sweep:
        raise RunError("--compare and --sweep cannot be combined; --sweep writes a table of its own")
    if args.text and args.dataset:
        raise RunError("--text and --dataset cannot be combined; choose one")
    if args.resume and args.overwrite:
        raise RunError("--resume continues a run and --overwrite deletes it; choose one")
    if args.lr is not None and len(names) > 1:
        raise RunError("--lr with several optimizers would be unfair to some; leave it out, or run them one by one")
    return names


def configuration(args: argparse.Namespace, name: str) -> Config:
    options: dict[str, Any] = {}
    if name != "adamw":
        options = {key: getattr(args, key) for key in LOW_RANK_OPTIONS if getattr(args, key) is not None}
        options |= dict(map(option, args.option))
    warmup = args.warmup if args.warmup is not None else max(1, args.steps // 10)
    return Config(
        model=args.model,
        optimizer=name,
        lr=args.lr if args.lr is not None else LEARNING_RATES.get(name, 1e-2),
        steps=args.steps,
        warmup=warmup,
        batch=args.batch,
        accumulate=args.accumulate,
        length=args.length or SIZES[args.model].length,
        clip=args.clip,
        weight_decay=args.weight_decay,
        betas=tuple(args.betas),
        dtype=args.dtype,
        seed=args.seed,
        corpus=args.dataset or (" ".join(map(str, args.text)) if args.text else "standard library"),
        bpe=args.bpe,
        rank=args.rank if name != "adamw" else None,
        validate_every=args.validate_every,
        validation_batches=args.validation_batches,
        grad_checkpointing=args.grad_checkpointing,
        options=options,
    )


def make_batches(args: argparse.Namespace, config: Config) -> tuple[FileBatches | StreamedBatches, int]:
    """The text as batches, and the size of its vocabulary."""
    cache = args.out / f"bpe-{args.bpe}.json"
    if args.dataset:
        sample = (text for text, _ in zip(stream_text(args.dataset), range(10_000), strict=False)) if args.bpe else None
        tokenizer = Tokenizer(args.bpe, sample, cache)
        held_out = config.validation_batches * config.batch
        return StreamedBatches(args.dataset, tokenizer, config.length, held_out), tokenizer.vocabulary
    train, held_out_text = split(text_files(args.text) if args.text else standard_library())
    tokenizer = Tokenizer(args.bpe, iter(train.decode("utf-8", "replace").splitlines(keepends=True)), cache)
    batches = FileBatches(tokenizer.encode(train), tokenizer.encode(held_out_text), config.length, config.seed)
    console.print(
        f"text: {config.corpus}, {len(batches.train):,} training and {len(batches.validation):,} validation tokens, "
        f"vocabulary {tokenizer.vocabulary}"
    )
    return batches, tokenizer.vocabulary


def prepare_folder(args: argparse.Namespace) -> None:
    """Start in an empty folder, or as the user said."""
    if args.overwrite and args.out.exists():
        shutil.rmtree(args.out)
    if args.out.exists() and any(args.out.iterdir()) and not args.resume:
        raise RunError(
            f"{args.out} holds a run already; continue it with --resume, delete it with --overwrite, or give another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)


def train(args: argparse.Namespace, config: Config, folder: Path, shared: dict[str, Any]) -> Result:
    """One run, or its result if it is finished."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.dataset or not shared:  # a stream starts anew for each run
        shared["batches"], shared["vocabulary"] = make_batches(args, config)
    run = Run(config, folder, shared["batches"], shared["vocabulary"], device)
    if (result := run.finished()) is not None:
        console.print(f"{config.optimizer}, lr {config.lr:g}: finished before")
        return result
    label = f"{config.optimizer}, lr {config.lr:g}" if args.sweep else config.optimizer
    with Reporter(label, config.steps, args.log_every) as reporter:
        return run.train(args.save_every, reporter)


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        names = check(args)
        configs = [configuration(args, name) for name in names]
        if args.sweep:
            configs = [replace(c, lr=c.lr * factor) for c in configs for factor in SWEEP]
        prepare_folder(args)
        shared: dict[str, Any] = {}
        several = len(configs) > 1
        runs = []
        for config in configs:
            part = f"{config.optimizer}-{config.lr:g}" if args.sweep else config.optimizer
            folder = args.out / part if several else args.out
            runs.append((train(args, config, folder, shared), folder))
    except (RunError, DataError, ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    results = [result for result, _ in runs]
    console.print(results_table(results))
    for what, amount in runs[-1][0].peak.items():
        console.print(f"{what}: {amount / 2**20:,.0f} MiB")
    if several:
        write_comparison(results, args.out / "comparison.json")
    if args.sweep:
        best = {name: min((r for r in results if r.optimizer == name), key=lambda r: r.val_loss) for name in names}
        runs = [(result, folder) for result, folder in runs if result is best[result.optimizer]]
        console.print("best: " + ", ".join(f"{name} {r.lr:g} ({r.val_loss:.4f})" for name, r in best.items()))
    plot(runs, args.out / "loss.png")
    console.print(f"wrote {args.out}/loss.png" + (f" and {args.out}/comparison.json" if several else ""))


if __name__ == "__main__":
    sys.exit(main())
