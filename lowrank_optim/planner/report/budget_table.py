"""The table of what fits, for a terminal: plain text, no dependency."""

from collections.abc import Sequence

from lowrank_optim.planner.memory_plan import MemoryPlan, counted
from lowrank_optim.planner.search import RECIPES, SLACK, Question, Row
from lowrank_optim.planner.simulation.allocator import GIB, format_bytes


def table(question: Question, rows: Sequence[Row]) -> str:
    """One line for each recipe, those that fit first, the first of them marked."""
    above = ("", "", "", "", "largest", "longest", "largest", "GiB at the peak:", "", "", "")
    heads = ("", "", "rank", "needs", "batch", "sequence", "rank", "weights", "gradients", "state", "rest")
    lines = [_cells(row, marked=row is rows[0]) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    widths[4:7] = [max(width, len("largest")) for width in widths[4:7]]
    top = "  ".join([*(c.rjust(w) for c, w in zip(above[:7], widths, strict=False)), above[7]])
    text = [top, _joined(heads, widths)]
    text.append("─" * max(map(len, [*text, *(_joined(line, widths) for line in lines)])))
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if number and rows[number - 1].fits and not row.fits:
            text.append(f"   more than {format_bytes(question.budget)}:")
        text.append(_joined(line, widths))
    return "\n".join(text)


def _cells(row: Row, marked: bool) -> tuple[str, ...]:
    mark = "→" if marked and row.fits else " " if row.fits else "✗"
    sizes = (row.parts["weights"], row.parts["gradients"], row.parts["optimizer_state"])
    rest = row.parts["activations"] + row.parts["temporaries"]
    return (
        *(mark, row.title, "" if row.rank is None else str(row.rank), f"{row.needed / GIB:.1f} GiB"),
        *(f"{count:,}" if count else "–" for count in (row.largest_batch, row.longest_sequence)),
        "" if row.largest_rank is None else f"{row.largest_rank:,}" if row.largest_rank else "–",
        *(f"{size / GIB:.1f}" for size in (*sizes, rest)),
    )


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = enumerate(zip(cells, widths, strict=True))
    return "  ".join(c.ljust(w) if column < 2 else c.rjust(w) for column, (c, w) in pairs).rstrip()


def heading(question: Question, name: str, parameters: int, sample: str | None = None) -> str:
    """What was asked, in one or two lines; `sample` is what the model reads, None for sequences."""
    size = f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.0f} million"
    checkpointing = "activation checkpointing" if question.activation_checkpointing else "no activation checkpointing"
    sample = sample or f"sequence of {question.sequence_length:,} tokens"
    spread = f", {'FSDP2' if question.fsdp else 'DDP'} on {question.world_size} GPUs" if question.world_size > 1 else ""
    return (
        f"Training {name} ({size} parameters) within {format_bytes(question.budget)}\n"
        f"{counted(question.batch_size, sample)}, {question.dtype}, {checkpointing}{spread}"
    )


def advice(question: Question, rows: Sequence[Row], confirmed: MemoryPlan | None) -> str:
    """What to do: the code of the winner, or, where nothing fits, the smallest and what to change."""
    winner = rows[0]
    if not winner.fits:
        return _nothing_fits(question, rows)
    lines = [f"→ {winner.title}: of those that fit, the one that gives up least ({winner.gives_up})."]
    if confirmed is not None:
        spare = question.budget - confirmed.needed_bytes
        lines.append(
            f"  Simulated with all layers: {format_bytes(confirmed.peak_bytes)} at the peak ({confirmed.when}),"
            f"\n  {format_bytes(confirmed.needed_bytes)} with allocator and CUDA context; {format_bytes(spare)} to spare."
        )
    return "\n".join([*lines, "", *(f"    {line}".rstrip() for line in code(question, winner))])


def code(question: Question, row: Row) -> list[str]:
    """The lines that train this way."""
    recipe = next(recipe for recipe in RECIPES if recipe.title == row.title)
    options = dict(recipe.options)
    rank = options.pop("rank", row.rank)
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    lines = ["import lowrank_optim as lo", ""] if row.optimizer not in ("adamw", "adamw_8bit") else []
    if question.activation_checkpointing:
        lines.append('model.gradient_checkpointing_enable({"use_reentrant": False})')
    if row.weight_bits == 8:
        lines.append("model = lo.nn.quantize_weights_(model)")
    if recipe.parametrization is not None:
        name, made = recipe.parametrization
        given = "".join(f", {key}={value!r}" for key, value in {"rank": rank, **made}.items())
        lines.append(f"model = lo.nn.{name}_(model{given})")
    classes = {
        "adamw": "torch.optim.AdamW(model.parameters())",
        "adamw_8bit": "bitsandbytes.optim.AdamW8bit(model.parameters())",
        "galore_8bit": f"lo.GaLoreAdamW8bit(lo.param_groups(model, rank={rank}){arguments})",
        "fira": f"lo.FiraAdamW(lo.param_groups(model, rank={rank}){arguments})",
        "alice": f"lo.AliceAdamW(lo.param_groups(model, rank={rank}){arguments})",
        "qgalore": f"lo.QGaLoreAdamW8bit(lo.param_groups(model, rank={rank}){arguments})",
        "apollo_mini": f"lo.APOLLOMiniAdamW(lo.param_groups(model, rank={rank}){arguments})",
        "LowRankOptimizer": f"lo.LowRankOptimizer(lo.param_groups(model, rank=None){arguments})",
        "lisa": f"lo.LISAAdamW(lo.layer_groups(model){arguments})",
    }
    lines.append(f"optimizer = {classes[row.optimizer]}")
    return [*lines, "lo.update_in_backward(optimizer)"] if row.in_backward else lines


def _nothing_fits(question: Question, rows: Sequence[Row]) -> str:
    smallest = min(rows, key=lambda row: row.needed)
    lines = [
        f"Nothing fits {format_bytes(question.budget)}. The smallest is {smallest.title}, which needs "
        f"{format_bytes(smallest.needed)}."
    ]
    held = max(rows, key=lambda row: row.longest_sequence or 0)
    changes = []
    if held.longest_sequence:
        changes.append(f"shorter sequences: one of {held.longest_sequence:,} tokens fits with {held.title}")
    ranked = max(rows, key=lambda row: row.largest_rank or 0)
    if ranked.largest_rank:
        changes.append(f"a lower rank: {ranked.largest_rank} fits with {ranked.title}")
    if not question.activation_checkpointing:
        changes.append("activation checkpointing (leave out --no-checkpointing)")
    if question.batch_size > 1:
        changes.append("a smaller --batch-size")
    fixed = smallest.parts["weights"] + smallest.parts["optimizer_state"]
    if fixed > question.budget:
        changes.append(f"a smaller model: weights and state alone are {format_bytes(fixed)}")
    if question.world_size == 1:
        changes.append("several GPUs (--fsdp N)")
    return "\n".join([*lines, "What would help:", *(f"  · {change}" for change in changes)])


def footnotes(question: Question) -> str:
    """What the columns mean and what was assumed."""
    ddp = question.world_size > 1 and not question.fsdp
    of_each = (
        "" if question.sequence_length is None else f": of {question.sequence_length:,} tokens each; sequence: alone"
    )
    context = f"unused parts of the allocator's segments ({SLACK:.0%}), and 512 MiB of CUDA context"
    lines = [
        "needs     peak of a step" + (f", {context}" if question.device != "cpu" else ""),
        f"largest   batch{of_each}; rank: at this batch",
        "rest      activations, logits, working copies; attention keeps no scores (flash)",
    ]
    if ddp:
        lines.append(
            "Several processes: of one of them. DDP does not go with updates in backward; FSDP2 (--fsdp N) does."
        )
    else:
        lines.append("All but the two AdamWs update in backward: a gradient is freed as soon as it is used.")
    if question.fsdp:
        lines.append("Several processes: of one of them; int8 weights are not sharded, and left out.")
    return "\n".join(lines)
