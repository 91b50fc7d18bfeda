"""`lowrank-optim plan`: will it fit?"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowrank_optim.planner.choices import names, resolve_optimizer
from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.memory_plan import MemoryPlan, describe_plan, title
from lowrank_optim.planner.models import resolve_model
from lowrank_optim.planner.parametrizations import PARAMETRIZATIONS
from lowrank_optim.planner.planning import DTYPES, check_sizes, plan
from lowrank_optim.planner.report import budget_table as show
from lowrank_optim.planner.report import picture
from lowrank_optim.planner.report.progress import Report, progress
from lowrank_optim.planner.search import RECIPES, Question, Row, asked, what_fits
from lowrank_optim.planner.simulation.allocator import parse_bytes

EXAMPLES = """
examples:
  lowrank-optim plan --model llama-7b --budget 24GiB
  lowrank-optim plan --model llama-7b --budget 24GiB --plot plan.png
  lowrank-optim plan --model my/config.json --budget 16GiB --sequence-length 512
  lowrank-optim plan --model llama-7b --optimizer galore_8bit --rank 1024 --in-backward --per-layer
  lowrank-optim plan --model mixtral-8x7b --budget 80GiB --fsdp 8
  lowrank-optim plan --model dit-xl-2 --batch-size 32
  lowrank-optim plan --model llama-7b --parametrization sltrain --rank 1024 --density 0.05 --option state_bits=8 --in-backward
"""


FORMAT = 1
"""Of what --json writes; docs/memory.md says what is in it. A key that goes or changes its meaning raises it, a new one does not."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `lowrank-optim`."""
    parser = subparsers.add_parser(
        "plan",
        help="will it fit? peak memory of training, before a byte is allocated",
        description="Peak memory of training a model, simulated: needs neither the memory nor a GPU. With --optimizer, that one; "
        "else a table of what fits --budget.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a name (llama-7b, qwen3-8b, gemma-3-4b, mixtral-8x7b, gpt-oss-20b, vit-b-16, dit-xl-2, …), or the path of a "
        "config.json or of a folder with one",
    )
    parser.add_argument("--budget", help="memory of the card, such as 24GiB (default with a table: 24GiB)")
    parser.add_argument("--optimizer", help=f"plan this one only: {', '.join(names())}, or one of torch.optim")
    parser.add_argument(
        "--parametrization",
        choices=tuple(PARAMETRIZATIONS),
        help="plan layers of this kind in the place of plain ones, with Adam unless --optimizer says another",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        help="of low-rank optimizers (default: a quarter of the hidden size), or of the layers of --parametrization",
    )
    parser.add_argument("--density", type=float, help="with --parametrization: of the sparse part (default 0.03)")
    parser.add_argument(
        "--in-backward", action="store_true", help="with --optimizer: update each parameter inside backward"
    )
    parser.add_argument(
        "--weight-bits", type=int, choices=(16, 8), default=16, help="with --optimizer: 8 for int8 weights"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="with --optimizer: an option of it"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences, images or latents at once (default 1)")
    parser.add_argument("--sequence-length", type=int, help="of language models: tokens in a sequence (default 2048)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of weights and arithmetic")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations instead of computing them again"
    )
    parser.add_argument("--world-size", type=int, default=1, help="processes; the plan is that of one (default 1)")
    parser.add_argument(
        "--fsdp",
        nargs="?",
        type=int,
        const=True,
        default=False,
        metavar="N",
        help="FSDP2 instead of DDP, on N processes or on those of --world-size",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what it will run on (need not be here)"
    )
    parser.add_argument("--per-layer", action="store_true", help="with --optimizer: list the memory of each layer")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of where memory goes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print; returns 0 if it fits (or no budget was named), 1 if not, 2 for input that means nothing."""
    try:
        args.fsdp, args.world_size = processes(args.fsdp, args.world_size)
        check_sizes(batch_size=args.batch_size, sequence_length=args.sequence_length, world_size=args.world_size)
        if args.plot is not None:
            picture.check_library()
        return _one(args) if args.optimizer or args.parametrization else _table(args)
    except (PlanError, ValueError) as error:
        sys.stderr.write(f"lowrank-optim plan: {error}\n")
        return 2


def processes(fsdp: int | bool, world_size: int) -> tuple[bool, int]:
    """Whether FSDP2 splits, and over how many processes.

    Raises:
        PlanError: --fsdp N and --world-size name different numbers, or --fsdp has one process only.
    """
    if isinstance(fsdp, bool):
        if fsdp and world_size == 1:
            raise PlanError("--fsdp splits over several processes: write --fsdp 4, or --world-size 4 --fsdp")
        return fsdp, world_size
    if fsdp < 2:
        raise PlanError(f"--fsdp {fsdp}: it must be at least 2; leave it out for one process")
    if world_size not in (1, fsdp):
        raise PlanError(
            f"--fsdp {fsdp} and --world-size {world_size} are different numbers of processes: leave one out"
        )
    return True, fsdp


def _rank(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the optimizer."""
    options: dict[str, Any] = {} if args.rank is None or args.parametrization else {"rank": args.rank}
    if not args.optimizer:
        options["rule"] = "adam"
    for text in args.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise PlanError(f"--option {text}: write KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _layers(args: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """The parametrization and its options."""
    if args.parametrization is None:
        if args.density is not None:
            raise PlanError("--density needs --parametrization; for an optimizer write --option density=…")
        return None
    given = {"rank": args.rank, "density": args.density}
    return args.parametrization, {name: value for name, value in given.items() if value is not None}


def _plan(
    args: argparse.Namespace,
    in_backward: bool,
    weight_bits: int,
    report: Report,
    **how: Any,
) -> MemoryPlan:
    """`how` is the optimizer, and the parametrization where there is one."""
    return plan(
        args.model,
        **how,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=args.dtype,
        in_backward=in_backward,
        activation_checkpointing=not args.no_checkpointing,
        device=args.device,
        world_size=args.world_size,
        fsdp=args.fsdp,
        weight_bits=weight_bits,
        per_layer=args.per_layer,
        progress=lambda step: report(f"all layers, {step}"),
    )


def _one(args: argparse.Namespace) -> int:
    """One optimizer, with all layers."""
    budget = parse_bytes(args.budget) if args.budget else None
    with progress() as report:
        optimizer = (args.optimizer or "LowRankOptimizer", _options(args))
        how = {"optimizer": optimizer, "parametrization": _layers(args)}
        result = _plan(args, args.in_backward, args.weight_bits, report, **how)
        baseline = None if args.plot is None else _plan(args, False, 16, report, optimizer="adamw")
    fits = budget is None or result.fits(budget)
    if args.json:
        sys.stdout.write(json.dumps({"format": FORMAT} | result.to_dict() | {"budget": budget}, indent=2) + "\n")
    else:
        sys.stdout.write(describe_plan(result, budget) + "\n")
        if not fits:
            for change in _changes(args, result.setting["sequence_length"] is not None):
                sys.stdout.write(f"    · {change}\n")
    if baseline is not None:
        bars = [(p.setting["optimizer"], p.parts(), p.needed_bytes) for p in (baseline, result)]
        picture.draw(bars, budget, title(result.setting), args.plot)
        sys.stderr.write(f"wrote {args.plot}\n")
    return 0 if fits else 1


def _changes(args: argparse.Namespace, tokens: bool) -> list[str]:
    """What would take less memory than this set-up."""
    ours = not args.optimizer or resolve_optimizer(args.optimizer).updates_in_backward
    return [
        *([] if args.in_backward or not ours else ["--in-backward: one gradient at a time"]),
        *([] if ours else ["a low-rank optimizer, such as --optimizer galore_8bit --in-backward"]),
        *(["leave out --no-checkpointing"] if args.no_checkpointing else []),
        *(["a smaller --batch-size"] if args.batch_size > 1 else []),
        *(["a shorter --sequence-length"] if tokens else []),
        "a lower --rank",
        *(["--weight-bits 8"] if args.weight_bits == 16 and not args.fsdp else []),
        "without --optimizer: a table of what fits",
    ]


def _table(args: argparse.Namespace) -> int:
    """Every recipe, and the winner confirmed with all layers."""
    _layers(args)
    ignored = [("--in-backward", args.in_backward), ("--option", args.option), ("--per-layer", args.per_layer)]
    if given := [name for name, value in [*ignored, ("--weight-bits", args.weight_bits == 8)] if value]:
        raise PlanError(f"{', '.join(given)} needs --optimizer; without one, a table of all recipes is made")
    if isinstance(args.rank, float):
        raise PlanError(f"--rank is {args.rank}; a table needs an int")
    question = Question(
        args.model,
        parse_bytes(args.budget or "24GiB"),
        args.batch_size,
        args.sequence_length,
        args.rank,
        args.dtype,
        not args.no_checkpointing,
        args.device,
        args.world_size,
        args.fsdp,
    )
    model = resolve_model(args.model)
    question = asked(question, model)
    with progress() as report:
        rows = what_fits(question, progress=report)
        rows, confirmed = confirm(args, question, rows, report)
    parameters = sum(p.numel() for p in model.build(None, None).parameters())
    heading = show.heading(question, model.name, parameters, model.sample)
    if args.json:
        content = {
            "format": FORMAT,
            "question": asdict(question),
            "parameters": parameters,
            "winner": rows[0].title if rows[0].fits else None,
            "confirmed": None if confirmed is None else confirmed.to_dict(),
            "rows": [row.to_dict() for row in rows],
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        advice = show.advice(question, rows, confirmed)
        parts = [heading, show.table(question, rows), advice, show.footnotes(question)]
        sys.stdout.write("\n\n".join(parts) + "\n")
    if args.plot is not None:
        baselines = sorted((row for row in rows if not row.in_backward), key=lambda row: -row.needed)
        bars = [(row.title, row.parts, row.needed) for row in (*baselines, *(row for row in rows if row.in_backward))]
        picture.draw(bars, question.budget, heading, args.plot)
        sys.stderr.write(f"wrote {args.plot}\n")
    return 0 if rows[0].fits else 1


def confirm(
    args: argparse.Namespace, question: Question, rows: list[Row], report: Report
) -> tuple[list[Row], MemoryPlan | None]:
    """The first row that a simulation of all layers, allocator included, finds to fit, on top; with that simulation."""
    for number, row in enumerate(rows):
        if not row.fits:
            break
        recipe = next(recipe for recipe in RECIPES if recipe.title == row.title)
        report(f"{row.title} with all layers")
        result = _plan(args, row.in_backward, recipe.weight_bits, report, **recipe.at_rank(row.rank))
        if result.fits(question.budget):
            return sorted(rows, key=lambda row: not row.fits), result
        rows[number] = replace(row, fits=False)
    return sorted(rows, key=lambda row: not row.fits), None
