"""Does a method train as well as AdamW? Every optimizer of the package beside AdamW and Muon, each at its own best learning rate.

    python benchmarks/convergence.py --preset cpu                            # about two hours on 2 cores
    python benchmarks/convergence.py --preset cpu --methods adamw,fira --steps 100 --out runs/try
    python benchmarks/convergence.py --preset 60m --dataset allenai/c4       # a GPU; 130m likewise

The same LLaMA, the same text in the same order and the same number of tokens for all: `torch.optim.AdamW` (adamw), the same with a
quarter of the rate for the matrices of the layers (adamw_split), `torch.optim.Muon` on these matrices with AdamW on everything else
(muon, its updates scaled to AdamW's size so that AdamW's rates fit), and every name in `lowrank_optim.METHODS` but sara, which is
for fine-tuning. The matrices have a quarter of their short side as rank (`SETTINGS` names the exceptions); weight decay, betas,
clipping, warm-up and schedule are the same. GaLore, Fira and FRUGAL scale the update of the matrices by α = 1/4, and APOLLO's is
smaller than Adam's, so that embeddings, head and norms learn faster than matrices; adamw_split gives AdamW that advantage too,
which is large in a short training of a small model. low_rank and sltrain are layers of another form, W = s·B A and W = s·B A + S at
the same rank (S has 3 % of the entries), which Adam trains from the first step on; what they save of weights and gradients is not
in the table.

The learning rate of each method is chosen by one rule (`next_rungs`): rates are a factor of 2 apart; begin at the method's starting
rate with seed 0, and extend towards the better side until the best rate has a worse or diverged neighbour on both sides, or the
ladder has its largest number of rates (the table marks such a method: its best rate may lie further out). The best rate is then
trained with further seeds, which change the initial weights, the order of the data and the optimizer's random choices (a streamed
dataset is read in its own order). All grids are 10⁻³·2ᵏ, so that no method has rates between those of another.

Loss is the mean over seeds and its spread their sample standard deviation. State is counted from the tensors
(`lowrank_optim.state_bytes`) and holds that of embeddings, head and norms, which every method trains densely. Time is the mean of a
whole training step (forward, backward, update, refreshes; no validation) in the least disturbed run of each method, over AdamW's in
the same benchmark: runs of all methods take turns on the same workers, so that a busy machine disturbs them alike, but it stays the
noisiest number here.

Other arguments go to `examples/pretrain.py` (`--text`, `--dataset`, `--batch`, `--weight-decay`, `--device`, …). Finished runs in
the folder are used as they are and an unfinished one continues from its checkpoint, so an interrupted benchmark continues with the
same command. A benchmark with all steps and three seeds, nothing else changed but the text, is written to
benchmarks/results/convergence-PRESET.json: all methods, or some of them with adamw among them, whose rows then take the place of
their earlier ones (`added`). Each method there has the environment that it ran in. Any other goes to the folder only. The standard
library is a small text: at 60m and 130m it is read hundreds of times, and only a dataset makes sense there.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import pretrain  # before torch, see pretraining/__init__.py
import torch
from common import RESULTS, environment, write
from convergence_plot import Curve, plot
from convergence_study import (
    RULE,
    Row,
    Setting,
    Study,
    markdown,
    next_rungs,
    over_adamw,
    rich_table,
    summarise,
    table_rows,
)
from pretraining.baselines import BASELINES
from pretraining.data import DataError, FileBatches
from pretraining.folder import FolderError, only_process, write_atomically
from pretraining.layers import PARAMETRIZATIONS
from pretraining.report import console
from pretraining.run import Config, DivergedError, Run, RunError, read_metrics
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import lowrank_optim as lo

FEWEST_SEEDS = 3
"""Of a complete benchmark."""


@dataclass(frozen=True)
class Preset:
    """One model and budget, the same for all methods."""

    model: str
    steps: int
    batch: int
    accumulate: int
    gap: int  # update_proj_gap
    dtype: str
    bpe: int | None
    workers: int
    threads: int | None  # of each worker; None: as many as torch takes
    validate_every: int
    validation_batches: int
    save_every: int
    longest: int  # rates in a ladder


CPU = Preset(
    model="cpu",
    steps=500,
    batch=8,
    accumulate=1,
    gap=50,
    dtype="float32",
    bpe=None,
    workers=2,
    threads=1,
    validate_every=50,
    validation_batches=16,
    save_every=100,
    longest=7,
)
# Batches of 512 sequences, 10 000 and 20 000 steps: the C4 experiments of GaLore, Fira and APOLLO.
GPU = Preset(
    model="60m",
    steps=10_000,
    batch=64,
    accumulate=8,
    gap=200,
    dtype="autocast",
    bpe=32_000,
    workers=1,
    threads=None,
    validate_every=500,
    validation_batches=32,
    save_every=500,
    longest=9,
)
PRESETS = {"cpu": CPU, "60m": GPU, "130m": replace(GPU, model="130m", steps=20_000, validate_every=1000)}

SETTINGS = {
    "adamw": Setting(2e-3, None, refreshes=False),
    "adamw_split": Setting(8e-3, None, refreshes=False),
    "muon": Setting(4e-3, None, refreshes=False),
    "galore": Setting(1.6e-2),
    "galore_8bit": Setting(1.6e-2),
    "galore_adafactor": Setting(1.6e-2),
    "fira": Setting(8e-3),
    "apollo": Setting(8e-3),
    "apollo_mini": Setting(8e-3, 1),
    # α as GaLore's and Fira's: with 1, the published value, matrices and embeddings would have to share one rate, as in adamw.
    # And GaLore's subspaces, so that what differs is the residual: random columns end at 1.66 ± 0.02 here, far behind.
    "frugal": Setting(8e-3, None, {"density": 0.25, "scale": 0.25, "projector": "randomized_svd"}),
    # Lion's own betas: 0.95 is no memory for its momentum.
    "frugal_lion": Setting(2e-3, None, {"density": 0.25, "scale": 0.25, "betas": (0.9, 0.99)}),
    # Without momentum it would be plain SGD. SGD's rates are so large that a decay of rate times 0.1 in each step erases the weights.
    "frugal_sgd": Setting(0.256, None, {"density": 0.25, "momentum": 0.9}, weight_decay=0.0),
    "ldadam": Setting(2e-3, refreshes=False),  # a new subspace at every step
    "qgalore": Setting(1.6e-2),
    # Matrices by their rule, without a subspace.
    "muon_adamw": Setting(8e-3, None, refreshes=False),
    "scale": Setting(2e-3, None, refreshes=False),
    "sinkgd": Setting(1.6e-2, None, refreshes=False),
    "foam": Setting(8e-3, None, refreshes=False),
    "alice": Setting(1.6e-2),
    "subtrack": Setting(1.6e-2),
    "conda": Setting(2e-3, 1.0),
    "low_rank": Setting(8e-3, refreshes=False),
    "sltrain": Setting(8e-3, refreshes=False),
}
LAYERS = tuple(name for name in PARAMETRIZATIONS if name != "none")
NOT_SARA = tuple(name for name in lo.METHODS if name != "sara")  # which is for fine-tuning
METHODS = (*BASELINES, *NOT_SARA, *lo.FULL_RANK_METHODS, *LAYERS)
"""Methods that are not in `SETTINGS` take `Setting()`. Starting rates decide how many rates are tried, hardly which one is found."""


# Runs in worker processes -------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """What a worker process keeps between runs: the text, and where it tells of its progress."""

    args: argparse.Namespace
    source: pretrain.Source
    device: torch.device
    queue: Any


_worker: Worker | None = None


def start_worker(args: argparse.Namespace, threads: int | None, queue: Any) -> None:
    """Called once in each worker process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=die_with, args=(parent.sentinel,), daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    console.quiet = True
    _worker = Worker(args, pretrain.Source(args), pretrain.choose_device(args), queue)


def die_with(sentinel: int) -> None:
    """End this process when the one behind the sentinel has ended, even by SIGKILL; checkpoints make that safe."""
    wait_for([sentinel])
    os._exit(1)


def train(config: Config, folder: Path, rung: int) -> Row:
    """One run to its end, in a worker process; from its result or its checkpoint, if it has one."""
    assert _worker is not None
    worker = _worker
    batches, vocabulary = worker.source.open(config)
    if isinstance(batches, FileBatches):  # the source keeps one for all runs, with the seed of the first
        batches = copy(batches)
        batches.seed = config.seed
    run = Run(config, folder, batches, vocabulary, worker.device)
    often = max(1, config.steps // 100)

    def report(run: Run, row: dict[str, Any]) -> None:
        if row["step"] % often == 0:
            worker.queue.put((folder.name, row["step"]))

    result = run.finished()
    if result is None:
        try:
            result = run.train(worker.args.save_every, report)
        except DivergedError:
            result = run.diverged()
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # of 80 finished runs they would fill a disk
    val_loss = result.val_loss if result.val_loss is not None and math.isfinite(result.val_loss) else None
    return Row(
        method=config.label,
        lr=config.lr,
        rung=rung,
        seed=config.seed,
        val_loss=val_loss,
        train_loss=result.train_loss if val_loss is not None else None,
        steps=result.steps,
        step_seconds=step_seconds(read_metrics(folder)),
        state={kind.removeprefix("state: "): n for kind, n in result.bytes.items() if kind.startswith("state")},
        folder=folder.name,
    )


def step_seconds(metrics: Sequence[Mapping[str, Any]], warmup: int = 10) -> float | None:
    """Mean time of a step without validation, after the first ones; None for a run that is too short to tell."""
    times = [
        after["seconds"] - before["seconds"]
        for before, after in zip(metrics[warmup:], metrics[warmup + 1 :], strict=False)
        if "val_loss" not in after
    ]
    return mean(times) if len(times) >= warmup else None


def run_all(studies: list[Study], args: argparse.Namespace, configs: Mapping[str, Config], preset: Preset) -> None:
    """Every run that the studies want, several at a time; each study goes on when its round of runs has ended."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    queue = context.Queue()
    pending: dict[Future[Row], Study] = {}
    pool = ProcessPoolExecutor(preset.workers, context, start_worker, (args, preset.threads, queue))
    try:
        with Bars(studies, args.steps) as bars:

            def dispatch(study: Study) -> None:
                for rung, seed in study.wanted():
                    config = replace(configs[study.method], lr=study.lr(rung), seed=seed)
                    folder = args.out / f"{study.method}-lr{config.lr:g}-seed{seed}"
                    pending[pool.submit(train, config, folder, rung)] = study

            for study in studies:
                dispatch(study)
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bars.steps(queue)
                for future in done:
                    study, row = pending.pop(future), future.result()
                    study.rows[row.rung, row.seed] = row
                    if study not in pending.values():
                        dispatch(study)
                    bars.finished(row)
    except BaseException:  # also Ctrl-C: do not wait for runs that may take hours, they have checkpoints
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Bars:
    """A bar for the whole benchmark and one for each run in progress; a line for each run that has ended."""

    def __init__(self, studies: list[Study], steps: int) -> None:
        self.studies, self.run_steps = studies, steps
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.total = self.progress.add_task("runs", total=None)
        self.running: dict[str, Any] = {}
        self.ended: set[str] = set()

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def steps(self, queue: Any) -> None:
        """Take what the workers told since the last call."""
        while not queue.empty():
            name, step = queue.get()
            if name in self.ended:  # the result overtook its last news
                continue
            if name not in self.running:
                self.running[name] = self.progress.add_task(name, total=self.run_steps)
            self.progress.update(self.running[name], completed=step)

    def finished(self, row: Row) -> None:
        self.ended.add(row.folder)
        if row.folder in self.running:
            self.progress.remove_task(self.running.pop(row.folder))
        done = sum(len(study.rows) for study in self.studies)
        # What is certain to come: the next round of every study, and its further seeds.
        seeds = sum(study.seeds - 1 for study in self.studies if next_rungs(study.ladder, study.longest))
        least = seeds + sum(len(study.wanted()) for study in self.studies)
        self.progress.update(self.total, completed=done, total=done + least)
        loss = "diverged" if row.val_loss is None else f"{row.val_loss:.4f}"
        pace = "" if row.step_seconds is None else f", {1000 * row.step_seconds:.0f} ms/step"
        console.print(
            f"{done}/≥{done + least} {row.method}, lr {row.lr:g}, seed {row.seed}: validation loss {loss}{pace}"
        )


# Results ---------------------------------------------------------------------------------------------------------------------


def as_json(args: argparse.Namespace, preset: Preset, configs: Mapping[str, Config], studies: list[Study]) -> Any:
    """Everything that was run and how, diverged runs too."""
    summaries = [summarise(study) for study in studies]
    ratios = over_adamw(summaries)
    own = ("rank", "options", "weight_decay", "parametrization")
    settings = {name: config.comparable() for name, config in configs.items()}
    varying = ("optimizer", "lr", "seed", *own)
    shared = {key: value for key, value in settings[studies[0].method].items() if key not in varying}
    methods = {}
    for s, study in zip(summaries, studies, strict=True):
        found = asdict(s) | {"environment": environment(), "over_adamw": ratios[s.method]}
        found |= {"rates": len(study.ladder), "start": study.setting.lr}
        methods[s.method] = found | {key: settings[s.method][key] for key in own if key in settings[s.method]}
    return {
        "rule": RULE,
        "trained_on": str(pretrain.choose_device(args)),
        "longest_ladder": preset.longest,
        "seeds": studies[0].seeds,
        "workers": preset.workers,
        "threads_of_a_worker": preset.threads,
        "tokens": args.steps * args.batch * args.accumulate * shared["length"],
        "shared": shared,
        "methods": methods,
        "runs": [asdict(study.rows[key]) for study in studies for key in sorted(study.rows)],
    }


def curves(studies: list[Study], folder: Path) -> list[Curve]:
    """What the plot shows: each method at its best rate, its losses averaged over seeds."""
    out = []
    for study in studies:
        summary = summarise(study)
        if summary.val_loss is None:
            continue
        held_out = [
            [(row["tokens"], row["val_loss"]) for row in read_metrics(folder / run.folder) if "val_loss" in row]
            for run in study.best_runs()
        ]
        points = [(rows[0][0], mean(loss for _, loss in rows)) for rows in zip(*held_out, strict=True)]
        out.append(Curve(study.method, points, summary.val_loss, summary.spread or 0.0, summary.state_bytes))
    return out


# The command --------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    # No abbreviations: --seed is an argument of the main job, not a short --seeds.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ",".join(METHODS)
    parser.add_argument("--preset", default="cpu", choices=PRESETS, help="model and budget (default cpu)")
    parser.add_argument("--methods", metavar="A,B,…", help=f"some of {names} (default: all)")
    parser.add_argument("--steps", type=int, help="updates (default: by preset)")
    parser.add_argument("--seeds", type=int, default=FEWEST_SEEDS, help="runs at the best rate (default 3)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: 2 on the CPU, 1 on a GPU)")
    parser.add_argument("--out", type=Path, help="folder (default runs/convergence-PRESET)")
    return parser


FIXED = ("lr", "seed", "optimizer", "compare", "sweep", "rank", "scale", "option", "resume", "overwrite", "model")
FIXED += ("parametrization", "density", "alpha")
"""Arguments of examples/pretrain.py that the benchmark sets itself."""


def pretrain_arguments(args: argparse.Namespace, preset: Preset, rest: list[str]) -> argparse.Namespace:
    """The arguments of the main job that all runs share."""
    for word in rest:
        if (name := word.partition("=")[0].removeprefix("--")) in FIXED and word.startswith("--"):
            raise RunError(f"--{name} is set by the benchmark; see SETTINGS in {Path(__file__).name}")
    steps = args.steps or preset.steps
    own = {
        "model": preset.model,
        "steps": steps,
        "batch": preset.batch,
        "accumulate": preset.accumulate,
        "dtype": preset.dtype,
        "update-proj-gap": preset.gap,
        # A shorter run is looked at as often.
        "validate-every": max(1, preset.validate_every * steps // preset.steps),
        "validation-batches": preset.validation_batches,
        "save-every": preset.save_every,
        "out": args.out or Path("runs") / f"convergence-{args.preset}",
    }
    if preset.bpe is not None:
        own["bpe"] = preset.bpe
    if args.preset == "cpu":
        own["device"] = "cpu"
    return pretrain.arguments().parse_args([f"--{key}={value}" for key, value in own.items()] + rest)


def configuration(args: argparse.Namespace, method: str) -> Config:
    """The configuration of a method's runs, but for learning rate and seed."""
    setting = SETTINGS.get(method, Setting())
    options = dict(setting.options)
    if setting.refreshes:
        options.setdefault("update_proj_gap", args.update_proj_gap)
    optimizer, layers = ("adamw", method) if method in LAYERS else (method, "none")
    config = replace(pretrain.configuration(args, "adamw"), optimizer=optimizer, parametrization=layers)
    decay = config.weight_decay if setting.weight_decay is None else setting.weight_decay
    return replace(config, lr=setting.lr, rank=setting.rank, options=options, weight_decay=decay)


def chosen_methods(text: str | None) -> list[str]:
    names = text.split(",") if text else METHODS
    if wrong := [name for name in names if name not in METHODS]:
        raise RunError(f"there is no method {wrong[0]!r}; valid names are {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def complete(args: argparse.Namespace, methods: list[str], rest: list[str]) -> bool:
    """Whether these are results of the preset: its budget, and adamw, the unit of all others, in the same benchmark."""
    changed = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--dataset", "--text", "--device"}
    steps = args.steps in (None, PRESETS[args.preset].steps)
    return steps and not changed and args.seeds >= FEWEST_SEEDS and "adamw" in methods


SAME = ("rule", "trained_on", "longest_ladder", "seeds", "tokens", "threads_of_a_worker", "shared")
"""What results must have in common to stand in one table."""


def added(results: Any, earlier: Any) -> Any:
    """Results with the methods and runs of earlier ones (a whole JSON) that they do not have themselves.

    Raises:
        RunError: they cannot be compared; the message names what differs.
    """
    before = earlier["results"]
    for key in SAME:
        if before[key] != results[key]:
            raise RunError(f"not added to the earlier results: {key} is {results[key]} now and was {before[key]}")
    kept = {name: row for name, row in before["methods"].items() if name not in results["methods"]}
    kept = {name: {"environment": earlier["environment"], **row} for name, row in kept.items()}
    methods = kept | results["methods"]
    runs = [run for run in before["runs"] if run["method"] in kept] + results["runs"]
    in_order = [name for name in METHODS if name in methods] + [name for name in methods if name not in METHODS]
    return results | {"methods": {name: methods[name] for name in in_order}, "runs": runs}


def benchmark(args: argparse.Namespace, rest: list[str]) -> None:
    for name in ("steps", "seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RunError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    methods, preset = chosen_methods(args.methods), PRESETS[args.preset]
    preset = replace(preset, workers=args.workers or preset.workers)
    shared = pretrain_arguments(args, preset, rest)
    if pretrain.choose_device(shared).type == "cpu" and args.preset != "cpu" and "--device" not in " ".join(rest):
        raise RunError(f"--preset {args.preset} needs a GPU (or --device cpu and much patience)")
    source = pretrain.Source(shared)
    configs = {name: replace(configuration(shared, name), text_digest=source.digest) for name in methods}
    for config in configs.values():
        pretrain.check_optimizer(config)
    studies = [Study(name, SETTINGS.get(name, Setting()), args.seeds, preset.longest) for name in methods]
    with only_process(shared.out):
        if shared.bpe:
            source.tokenizer()  # made once, before the workers want it
        run_all(studies, shared, configs, preset)
        results = as_json(shared, preset, configs, studies)
        report(f"convergence-{args.preset}", shared.out, studies, results)
        if complete(args, methods, rest):
            path = RESULTS / f"convergence-{args.preset}.json"
            if path.exists() and methods != chosen_methods(None):
                results = added(results, json.loads(path.read_text(encoding="utf-8")))
            write(f"convergence-{args.preset}", results)


def report(title: str, out: Path, studies: list[Study], results: Any) -> None:
    """The table on the terminal and as Markdown, the plot, the JSON, all in the folder."""
    rows = table_rows([summarise(study) for study in studies])
    # rich takes a file to be 80 columns wide, and would cut the table.
    printer = console if console.is_terminal else Console(width=120)
    printer.print(rich_table(rows, title))
    write_atomically(out / "convergence.md", markdown(rows))
    content = {"environment": environment(), "results": results}
    write_atomically(out / "convergence.json", json.dumps(content, indent=2) + "\n")
    written = [out / "convergence.md", out / "convergence.json"]
    if shown := curves(studies, out):
        plot(shown, out / "convergence.png")
        written.append(out / "convergence.png")
    console.print("wrote " + ", ".join(map(str, written)))


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args, rest = parser.parse_known_args(argv)
    try:
        benchmark(args, rest)
    except (DataError, FolderError, RunError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except BrokenProcessPool:
        parser.exit(1, f"{parser.prog}: a worker was killed, perhaps for want of memory; the same command continues\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; the same command continues\n")


if __name__ == "__main__":
    main()
