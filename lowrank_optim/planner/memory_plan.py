"""The answer of the planner: peak memory, what it is made of, and when it occurs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_optim.planner.simulation.allocator import format_bytes
from lowrank_optim.planner.simulation.timeline import KINDS


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one training set-up on one device; all sizes in bytes.

    The five parts are those of the moment at which most is allocated, and add up to `peak_bytes`; each tensor is rounded up as the
    device's allocator does.

    Attributes:
        weights_bytes: parameters and buffers.
        gradients_bytes: gradients alive at the peak, with DDP also its buckets.
        optimizer_state_bytes: see `state` for its parts.
        activations_bytes: what forward passes keep for backward.
        temporaries_bytes: everything else that is alive for a moment: logits and their gradients, working copies, the workspace of
            cuBLAS, with FSDP gathered weights.
        peak_bytes: comparable with `torch.cuda.max_memory_allocated`.
        reserved_bytes: comparable with `torch.cuda.max_memory_reserved`: what the caching allocator takes from the device, which is
            what a limit (`torch.cuda.set_per_process_memory_fraction`) counts. Equal to the peak on the CPU.
        context_bytes: CUDA context outside of the allocator (a constant, `planner.allocator.CUDA_CONTEXT`).
        when: the moment of the peak: which step, which pass, which layer.
        state: the optimizer state of a whole step in parts: moments, basis, scales, other.
        phases: the most bytes in each pass of each step.
        layers: for each layer, bytes of each of the five kinds at the peak, where asked for.
        setting: what was planned: model, optimizer, batch size, …
        assumptions: what the numbers rest on, in words.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    reserved_bytes: int
    context_bytes: int
    when: str
    state: dict[str, int]
    phases: dict[str, int]
    setting: dict[str, Any]
    layers: dict[str, dict[str, int]] | None = None
    assumptions: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are allocated at once."""
        return sum(self.parts().values())

    @property
    def total_bytes(self) -> int:
        """What the card must hold: the peak and the context."""
        return self.peak_bytes + self.context_bytes

    @property
    def needed_bytes(self) -> int:
        """What a limited process takes at most: segments of the allocator and the context; `fits` compares it with the budget."""
        return max(self.reserved_bytes, self.peak_bytes) + self.context_bytes

    def parts(self) -> dict[str, int]:
        """The five kinds of bytes at the peak, by name."""
        return {kind: getattr(self, f"{kind}_bytes") for kind in KINDS}

    def fits(self, budget: int) -> bool:
        """Whether it runs within `budget` bytes."""
        return self.needed_bytes <= budget

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        computed = {name: getattr(self, name) for name in ("peak_bytes", "total_bytes", "needed_bytes")}
        return {**asdict(self), **computed, "assumptions": list(self.assumptions)}

    def __str__(self) -> str:
        return describe_plan(self)


def describe_plan(plan: MemoryPlan, budget: int | None = None) -> str:
    """A plan for a person: where the bytes go, when, and whether it fits."""
    setting = plan.setting
    lines = [title(setting), ""]
    names = {"optimizer_state": "optimizer state"}
    width = max(plan.parts().values()) or 1
    for kind, size in plan.parts().items():
        bar = "#" * round(28 * size / width)
        lines.append(f"  {names.get(kind, kind):<16}{format_bytes(size):>12}  {bar}".rstrip())
    lines.append(f"  {'peak':<16}{format_bytes(plan.peak_bytes):>12}  {plan.when}")
    if plan.context_bytes:
        segments = plan.needed_bytes - plan.total_bytes
        lines.append(f"  {'allocator':<16}{format_bytes(segments):>12}  unused parts of its segments")
        lines.append(f"  {'CUDA context':<16}{format_bytes(plan.context_bytes):>12}  assumed")
        lines.append(f"  {'needed':<16}{format_bytes(plan.needed_bytes):>12}")
    parts = [f"{name} {format_bytes(size)}" for name, size in plan.state.items() if size]
    lines += ["", f"  optimizer state: {', '.join(parts) or 'none'}"]
    if budget is not None:
        rest = budget - plan.needed_bytes
        over = f"does not fit: {format_bytes(-rest)} too much"
        verdict = f"fits, {format_bytes(rest)} to spare" if plan.fits(budget) else over
        lines.append(f"  budget {format_bytes(budget)}: {verdict}")
    if plan.layers is not None:
        lines += ["", layer_table(plan.layers)]
    return "\n".join(lines)


def title(setting: Mapping[str, Any]) -> str:
    """One line that says what was planned."""
    size = "the example batch"
    if setting["sequence_length"]:
        size = f"{setting['batch_size']} x {setting['sequence_length']} tokens"
    elif setting.get("sample"):
        size = counted(setting["batch_size"], setting["sample"])
    words = [f"{setting['model']} with {setting['optimizer']}"]
    words += [f"{name} {value}" for name, value in setting["options"].items() if name in ("rank", "density")]
    if (layers := setting.get("parametrization")) is not None:
        words.append(" ".join([layers["name"], *(f"{k} {layers[k]}" for k in ("rank", "density") if k in layers)]))
    words += [size, setting["dtype"]]
    words += ["int8 weights"] if setting["weight_bits"] == 8 else []
    words += ["updates in backward"] if setting["in_backward"] else []
    words += ["activation checkpointing"] if setting["activation_checkpointing"] else []
    if setting["world_size"] > 1:
        words.append(f"{'FSDP2' if setting['fsdp'] else 'DDP'} on {setting['world_size']}")
    return ", ".join(words)


def counted(count: int, sample: str) -> str:
    """3 and "image of 4 x 4" as "3 images of 4 x 4"."""
    word, _, rest = sample.partition(" ")
    return f"{count:,} {word}{'s' * (count != 1)} {rest}"


def layer_table(layers: Mapping[str, Mapping[str, int]]) -> str:
    """Layer × kind in MiB at the peak."""
    width = max([5, *map(len, layers)])
    head = f"  {'MiB at the peak':<{width}}" + "".join(f"{kind.replace('optimizer_', ''):>13}" for kind in KINDS)
    rows = [
        f"  {name or '(other)':<{width}}" + "".join(f"{sizes[kind] / 2**20:>13.1f}" for kind in KINDS)
        for name, sizes in layers.items()
    ]
    return "\n".join([head, *rows])
