"""The tables of README and docs, from the JSON in results/.

    python benchmarks/tables.py        # writes each table anew, between its marks `<!-- table: NAME -->` and `<!-- end -->`

A benchmark that ran again changes its JSON; this puts the new numbers where people read them. `tests/repository/test_numbers.py`
compares the pages with the JSON, and so do the sentences that have numbers.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", flags=re.DOTALL)

FEW = (
    "AdamW",
    "8-bit AdamW (bitsandbytes, by formula)",
    "GaLore 8-bit, in backward",
    "APOLLO-Mini, in backward",
    "Q-GaLore, int8 weights, in backward",
)
MANY = (
    "AdamW",
    "8-bit AdamW (bitsandbytes, by formula)",
    "GaLore, bfloat16 state",
    "GaLore 8-bit, in backward",
    "GaLore 8-bit, 4-bit basis, in backward",
    "Q-GaLore, int8 weights, in backward",
    "APOLLO-Mini, in backward",
    "SinkGD, in backward",
    "SCALE, in backward",
    "SCALE, int8 weights, in backward",
    "LISA, 2 layers, in backward",
    "SLTrain 8-bit, in backward",
)


def results(name: str) -> Any:
    """What a benchmark has measured."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown: words in the first column, numbers in the others."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' + '---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _memory(names: Iterable[str], kinds: dict[str, str]) -> str:
    rows = results("plan_7b")["7b"]
    gib = ([name, *(f"{rows[name][kind] / 2**30:.1f}" for kind in kinds.values())] for name in names)
    return table(["GiB", *kinds], gib)


def memory_7b_short() -> str:
    """Of the README."""
    return _memory(FEW, {"gradients": "gradients", "optimizer state": "optimizer_state", "card needs": "needed"})


def memory_7b() -> str:
    """Of docs/memory.md."""
    kinds = {"weights": "weights", "gradients": "gradients", "state": "optimizer_state"}
    kinds |= {"activations": "activations", "temporaries": "temporaries", "peak": "peak", "card needs": "needed"}
    return _memory(MANY, kinds)


def seven_b_measured() -> str:
    """Runs of benchmarks/seven_b_cpu.py beside their plans."""
    names = {
        "adamw": "AdamW, the largest LLaMA that fits",
        "apollo_mini": "APOLLO-Mini",
        "qgalore": "Q-GaLore, int8 weights",
    }
    rows = []
    for name, title in names.items():
        run = results(f"seven_b_cpu_{name}")
        planned, measured, losses = run["planned_bytes"], run["peak_resident_bytes"], run["losses"]
        gib = [f"{size / 2**30:.2f}" for size in (planned, measured)]
        rows.append([f"{title} ({run['model']})", *gib, f"{run['error_of_plan']:+.1%}".replace("-", "−")])
        rows[-1] += [str(run["length"]), str(len(losses)), f"{losses[0]:.2f} → {losses[-1]:.2f}"]
    return table(["GiB at the peak", "planned", "measured", "error of the plan", "tokens", "steps", "loss"], rows)


def seven_b_parts() -> str:
    """Seconds by part of ordinary steps and refreshes, and how many times their floor they are."""
    parts = ("basis", "project", "finite", "direct", "apply")
    rows = []
    for shape, found in results("seven_b_parts")["matrices"].items():
        kinds, floors = found["seconds"], found["floors"]

        def cell(seconds: float, floor: float | None) -> str:
            return f"{seconds:.3f} ({seconds / floor:.1f}×)" if floor else "—"

        ordinary = kinds["ordinary"]
        row = [shape, *(cell(ordinary[part], floors.get(part)) for part in parts), f"{kinds['columns']['columns']:.3f}"]
        row.append(cell(kinds["first"]["refresh"], floors.get("first refresh")))
        row.append(cell(kinds.get("refresh", {}).get("refresh", 0.0), floors.get("refresh")))
        total = sum(floors.get(part, 0.0) for part in parts)
        rows.append([*row, cell(ordinary["whole"], total)])
    return table(["seconds (of the floor)", *parts, "columns", "first refresh", "later refresh", "ordinary step"], rows)


def distributed() -> str:
    """MiB sent in a step."""
    heads = {
        "AdamW, GaLore under DDP": "galore ddp",
        "GaLore, DDP with the hook": "galore ddp hook",
        "`fully_shard`, left": "fully_shard left",
        "`fully_shard`, right": "fully_shard right",
    }
    sent = results("distributed")["7B"]["bytes"]

    def mebibytes(size: float) -> str:
        return f"{size / 2**20:,.0f}" if size > 2**20 else f"{size / 2**20:.3f}"

    rows = ([f"{int(p):,}", *(mebibytes(sent[p][k]["between"]) for k in heads.values())] for p in ("8", "64", "1024"))
    return table(["processes", *heads], rows)


def planner_processes() -> str:
    """Peaks of one of two processes, planned and measured."""
    names = {"adamw": "AdamW", "galore": "GaLore", "galore_8bit": "GaLore 8-bit", "apollo": "APOLLO"}
    rows = []
    for row in results("planner_processes")["rows"]:
        sizes = [row["planned"][kind] for kind in ("weights", "state", "peak")]
        sizes += [row["measured"][kind] for kind in ("least peak", "peak")]
        title = f"{row['how']}, {names[row['optimizer']]}" + (", in backward" if row["in_backward"] else "")
        rows.append([title, *(f"{size / 2**20:.2f}" for size in sizes)])
    return table(["MiB", "weights", "state", "peak, planned", "measured, least", "measured, most"], rows)


def bytes_in_words(size: float) -> str:
    """MiB, KiB or bytes, whichever is readable."""
    if size >= 2**20:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / 2**10:.0f} KiB" if size >= 2**10 else f"{size:.0f} bytes"


def three_digits(value: float) -> str:
    """One decimal below 10, none above."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


TEN = (
    *("muon_adamw", "frugal", "subtrack", "alice", "fira", "foam", "galore_8bit", "apollo", "sltrain", "sinkgd"),
    "adamw",
)
"""Beside AdamW the methods that a reader chooses among."""


def convergence_ten() -> str:
    """Validation losses of the methods that matter."""
    methods = results("convergence-cpu")["methods"]
    rows = sorted((methods[name] for name in TEN), key=lambda row: row["val_loss"])
    return table(
        ["optimizer", "validation loss", "state ÷ adamw"],
        ([row["method"], f"{row['val_loss']:.3f}", f"{row['over_adamw']['state_bytes']:.2f}"] for row in rows),
    )


def convergence() -> str:
    """Validation losses of every method."""
    methods = results("convergence-cpu")["methods"]
    rows = sorted(methods.values(), key=lambda row: row["val_loss"])
    return table(
        ["optimizer", "validation loss", "÷ adamw", "best lr", "state", "÷ adamw"],
        (
            [
                row["method"],
                f"{row['val_loss']:.4f} ± {row['spread']:.4f}",
                f"{row['over_adamw']['val_loss']:.3f}",
                f"{row['lr']:g}",
                bytes_in_words(row["state_bytes"]),
                f"{row['over_adamw']['state_bytes']:.2f}",
            ]
            for row in rows
        ),
    )


def sltrain() -> str:
    """Bytes and time of one linear layer in four forms."""
    kinds = ("weights", "gradients", "state", "peak", "all")
    rows = [row for row in results("sltrain")["layers"] if row["dtype"] == "float32"]
    return table(
        ["layer", *kinds, "time ÷ dense"],
        (
            [
                f"{row['shape'][0]}×{row['shape'][1]} {row['form']}",
                *(f"{row['bytes'][kind] / 2**20:.1f}" for kind in kinds),
                f"{row['seconds']['pass_over_dense']:.2f}",
            ]
            for row in rows
        ),
    )


def step_time(part: str) -> str:
    """A step: of "dense" parameters, of "matrices" in subspaces, or of many "small" ones."""
    rows = results("step_time")[part]
    return table(
        ["optimizer", "÷ fused AdamW", "milliseconds", "state"],
        (
            [
                name,
                three_digits(row["over_fused_adamw"]),
                three_digits(1e3 * row["seconds"]),
                bytes_in_words(row["state_bytes"]),
            ]
            for name, row in rows.items()
        ),
    )


def torch_path() -> str:
    """A step of dense parameters without a compiler."""
    rows = results("torch_path")["dense"]["steps"]
    return table(["optimizer", "÷ fused AdamW"], ([name, three_digits(row["over_base"])] for name, row in rows.items()))


def range_finder() -> str:
    """A refresh beside the exact SVD."""
    return table(
        ["matrix", "rank", "first refresh, × faster", "later ones, × faster", "energy, first", "energy, later"],
        (
            [
                row["shape"].replace("x", " × "),
                str(row["rank"]),
                *(f"{row[f'speedup_{kind}']:.1f}" for kind in ("cold", "warm")),
                *(f"{row[f'energy_{kind}']:.2%}" for kind in ("cold", "warm")),
            ]
            for row in results("range_finder")
        ),
    )


def galore_step() -> str:
    """A steady step beside the products that it cannot avoid."""
    return table(
        ["rank", "÷ two products", "the same, with weight decay", "÷ galore-torch, with a refresh every 200 steps"],
        (
            [
                str(row["rank"]),
                f"{row['steady_over_floor']:.2f}",
                f"{row['steady_over_floor_with_decay']:.2f}",
                f"{row['amortised_over_galore_torch']:.2f}",
            ]
            for row in results("galore_step")
        ),
    )


def in_backward() -> str:
    """Time of steps inside backward."""
    rows = results("in_backward")["time"]
    return table(["method", "÷ ordinary steps"], ([row["optimizer"], f"{row['ratio']:.2f}"] for row in rows))


def sweep() -> str:
    """The main job at each learning rate."""
    return table(
        ["optimizer", "learning rate", "validation loss"],
        ([run["optimizer"], f"{run['lr']:g}", f"{run['val_loss']:.3f}"] for run in results("pretrain_sweep")["runs"]),
    )


def rule_step() -> str:
    """A dense step of each rule."""
    rows = results("rule_step")["over_fused_adamw"]
    return table(["rule", "÷ fused AdamW"], ([f"`{name}`", f"{ratio:.2f}"] for name, ratio in rows.items()))


def lora_step() -> str:
    """A step of each rule of adapter pairs, with one thread and with all."""
    found = results("lora_step")
    rows = [
        [f"`{name}`", f"{ratio:.2f}", f"{found['all_cores']['over_fused_adamw'][name]:.2f}"]
        for name, ratio in found["over_fused_adamw"].items()
    ]
    return table(["rule", "÷ fused AdamW, one thread", f"{found['all_cores']['threads']} threads"], rows)


def gpu_kernels() -> str:
    """What the kernels of a 7B step take of a GPU, by their machine code: the most of any variant, the least for occupancy."""
    rows = []
    for capability, found in sorted(results("gpu_static")["architectures"].items()):
        for kernel in sorted({row["kernel"] for row in found["triton"]}):
            variants = [row for row in found["triton"] if row["kernel"] == kernel]
            counts = [sum(row["tensor_core"].values()) for row in variants]
            rows.append(
                [
                    f"sm_{capability}\u00a0`{kernel.removesuffix('_kernel')}`",
                    str(len(variants)),
                    *(f"{max(row[key] for row in variants):g}" for key in ("registers", "spilled_bytes", "shared_kib")),
                    f"{min(row['occupancy'] for row in variants):.0%}",
                    str(min(counts)),
                ]
            )
    heads = ["variants", "registers", "bytes spilled", "shared KiB", "occupancy", "tensor-core instructions"]
    return table(["kernel", *heads], rows)


def gpu_estimate() -> str:
    """Estimated seconds of a 7B step on two GPUs."""
    found = results("gpu_static")["architectures"]
    first, second = (found[key] for key in ("89", "90"))
    rows = []
    for name, row in first["estimates"].items():
        other = second["estimates"][name]
        rows.append(
            [
                name,
                f"{row['kernel_launches']:,}",
                f"{row['torch_operations']:,}",
                f"{row['bytes'] / 1e9:,.0f}",
                f"{row['flops'] / 1e12:,.1f}",
                f"{1e3 * row['host_seconds']:,.0f}",
                *(f"{1e3 * each['device_seconds']:,.0f}" for each in (row, other)),
            ]
        )
    names = (f"{each['gpu']['name']}, ms (estimate)" for each in (first, second))
    return table(["step", "our kernels", "torch's", "GB", "Tflop", "host, ms", *names], rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory-7b-short": memory_7b_short,
    "memory-7b": memory_7b,
    "seven-b-measured": seven_b_measured,
    "seven-b-parts": seven_b_parts,
    "distributed": distributed,
    "planner-processes": planner_processes,
    "convergence": convergence,
    "convergence-ten": convergence_ten,
    "sltrain": sltrain,
    "step-time-dense": partial(step_time, "dense"),
    "step-time-matrices": partial(step_time, "matrices"),
    "step-time-small": partial(step_time, "small"),
    "torch-path": torch_path,
    "range-finder": range_finder,
    "galore-step": galore_step,
    "in-backward": in_backward,
    "sweep": sweep,
    "rule-step": rule_step,
    "lora-step": lora_step,
    "gpu-kernels": gpu_kernels,
    "gpu-estimate": gpu_estimate,
}


def pages() -> list[Path]:
    """README and docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables as the JSON has them."""
    return MARK.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
