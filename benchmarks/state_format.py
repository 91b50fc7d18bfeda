"""Which 8-bit and 4-bit format the moments of a low-rank optimizer should have, measured on the gradients of a real model.

Trains the small LLaMA of examples/pretraining with GaLoreAdamW. The moments of every candidate format are kept beside the float32
ones, from the same projected gradients, and what is reported is the error of the direction N = m̂/(√v̂ + ε) that Adam would take from
them. The best formats then train the model themselves. About an hour on one core; `--only` runs and replaces a part.

    python benchmarks/state_format.py                     # everything, writes benchmarks/results/state_format.json
    python benchmarks/state_format.py --only small --steps 100
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, write
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from pretraining.configs import SIZES, Size, build_model
from pretraining.data import BYTE_VOCABULARY, FileBatches, read_text, standard_library

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.quantization import column_scale, pack_basis, packed_basis_bytes, unpack_basis

CPU = torch.device("cpu")
EPS = 1e-8
SIZES["wide"] = Size(1024, 1024, 1, 8, 128)  # one layer whose low-rank rows have 256 elements


# Code maps ----------------------------------------------------------------------------------------------------------------------


@cache
def code_map(name: str, bits: int, signed: bool) -> Tensor:
    """The values in [−1, 1] or [0, 1] that codes stand for, ascending."""
    if name == "dynamic":
        return dynamic_map(bits, signed)
    count = 2 ** (bits - 1) - 1 if signed else 2**bits
    steps = torch.arange(1, count + 1, dtype=torch.float32) / count
    if name.startswith("power"):
        steps = steps ** float(name.removeprefix("power"))
    elif name.startswith("log"):  # a factor of 2 takes so many steps
        steps = torch.exp2((steps - 1.0) * count / float(name.removeprefix("log")))
    elif name != "linear":
        raise ValueError(name)
    return torch.cat([-steps.flip(0), torch.zeros(1), steps]) if signed else steps


def dynamic_map(bits: int, signed: bool) -> Tensor:
    """The dynamic map of bitsandbytes: 0, 1, and the middles of the 2ⁱ (signed: of each sign) or 2ⁱ⁺¹ parts of decade i."""
    values, decades = [torch.tensor([0.0, 1.0])], bits - 1
    for i in range(decades):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - decades + 1)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def code(
    x: Tensor, name: str, bits: int, signed: bool, block: int, column: Tensor | None, rounding: str, step: int
) -> Tensor:
    """Encode and decode (…, rows, cols)."""
    cols = x.shape[-1]
    y = x if column is None else x / column
    width = min(block, cols)
    blocks = nn.functional.pad(y, (0, -cols % width)).unflatten(-1, (-1, width))
    scale = blocks.abs().amax(-1, keepdim=True)
    unit = blocks / scale.clamp_min(1e-30)
    noise = None
    if rounding == "stochastic":
        noise = torch.rand_like(unit)
    elif rounding == "golden":
        noise = (phases(unit.shape) + step * GOLDEN % 1.0).frac_()
    if name == "linear":  # the same as below, in closed form
        levels = 2 ** (bits - 1) - 1 if signed else 2**bits
        unit = unit.mul_(levels)
        unit = unit.round_() if noise is None else unit.add_(noise).floor_()
        rounded = unit.clamp_(-levels if signed else 1, levels).mul_(1.0 / levels)
    else:
        values = code_map(name, bits, signed)
        upper = torch.bucketize(unit, values).clamp_(1, len(values) - 1)
        low, high = values[upper - 1], values[upper]
        up = unit - low > (high - unit if noise is None else noise * (high - low))
        rounded = torch.where(up, high, low)
    y = (rounded * scale).flatten(-2)[..., :cols]
    return y if column is None else y * column


GOLDEN = (5**0.5 - 1) / 2


@cache
def phases(shape: tuple[int, ...]) -> Tensor:
    """Where every element starts its own walk of golden-ratio steps through [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# Formats ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How both moments are stored."""

    bits: int
    m: str = "linear"
    v: str = "linear"  # of the root of v, unless `v_power` is 1
    v_power: float = 0.5
    block: int = 256
    # None; a power of the root mean square of the columns of R at the refresh; or fitted to √v, see `fit`.
    column: str = "fitted"
    m_rounding: str = "nearest"
    v_rounding: str = "nearest"
    ratio: bool = False  # code m/√v instead of m

    @property
    def name(self) -> str:
        root = "√v" if self.v_power == 0.5 else "v"
        short = {"nearest": "", "stochastic": "~", "golden": "≈"}
        first = f"{'m/√v' if self.ratio else 'm'} {self.m}{short[self.m_rounding]}"
        second = f"{root} {self.v}{short[self.v_rounding]}"
        return f"{self.bits} bit, {first}, {second}, block {self.block}, column {self.column}"

    def store(self, m: Tensor, v: Tensor, column: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The moments as they come back from storage."""

        def moment(x: Tensor, name: str, signed: bool, divisor: Tensor | None, rounding: str) -> Tensor:
            return code(x, name, self.bits, signed, self.block, divisor, rounding, step)

        if self.v_power == 0.5:
            root = moment(v.sqrt(), self.v, False, column, self.v_rounding)
        else:
            squares = None if column is None else column.square()
            root = moment(v, self.v, False, squares, self.v_rounding).sqrt()
        if not self.ratio:
            return moment(m, self.m, True, column, self.m_rounding), root.square()
        ratio = m / v.sqrt().clamp_min(1e-30)
        return moment(ratio, self.m, True, None, self.m_rounding) * root, root.square()

    def column_scale(self, reduced: Tensor) -> Tensor | None:
        """From the projected gradient of a refresh, (…, rows, r)."""
        if self.column in ("none", "fitted"):
            return None
        rms = reduced.square().mean(-2, keepdim=True).sqrt()
        rms = rms.clamp_min(2.0**-20 * rms.amax(-1, keepdim=True)).clamp_min(2.0**-60)
        return rms ** float(self.column.removeprefix("rms^"))


# The chosen formats: what lowrank_optim.quantization does.
EIGHT = Format(8, ratio=True, v_rounding="golden")
FOUR = replace(EIGHT, bits=4)
BNB = Format(8, "dynamic", "dynamic", 1.0, column="none")
TORCHAO = Format(4, "dynamic", "linear", 1.0, 128, "none")
PLAIN = Format(8, column="none")

SMALL = [
    BNB,
    PLAIN,
    replace(EIGHT, column="none"),
    replace(EIGHT, column="rms^0.5"),
    EIGHT,
    replace(EIGHT, v_rounding="nearest"),
    replace(EIGHT, v_rounding="stochastic"),
    replace(EIGHT, v="power2"),
    TORCHAO,
    replace(FOUR, v_rounding="nearest"),
    replace(FOUR, v="log5"),
    FOUR,
]
WIDE = [replace(form, block=block) for form in (EIGHT, FOUR) for block in (64, 128, 256)] + [BNB, TORCHAO]
WIDE += [replace(EIGHT, column="rms^0.5"), replace(EIGHT, column="none")]


# Shadow moments -----------------------------------------------------------------------------------------------------------------


class Shadow:
    """Moments of a stack of equal matrices: the float32 ones, and those of every format."""

    def __init__(self, formats: list[Format], betas: tuple[float, float]) -> None:
        self.formats, (self.beta1, self.beta2) = formats, betas
        self.exact: tuple[Tensor, Tensor] | None = None
        self.steps = 0
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.columns: list[Tensor | None] = []

    def update(self, reduced: Tensor, refreshed: Tensor | None) -> None:
        """One step with R (k, rows, cols); `refreshed` (k,) says which matrices have a new basis, None that there are none."""
        if self.exact is None:
            self.exact = torch.zeros_like(reduced), torch.zeros_like(reduced)
            self.stored = [self.exact] * len(self.formats)
            self.columns = [None if refreshed is None else f.column_scale(reduced) for f in self.formats]
            self.since = torch.zeros(len(reduced), 1, 1, dtype=torch.int64)
        elif refreshed is not None and refreshed.any():
            for i, (form, old) in enumerate(zip(self.formats, self.columns, strict=True)):
                new = form.column_scale(reduced)
                if new is None or old is None:
                    continue
                self.columns[i] = torch.where(refreshed[:, None, None], new, old)
        if refreshed is not None:
            self.since[refreshed] = 0
        self.steps, self.since = self.steps + 1, self.since + 1
        self.exact = self._moments(*self.exact, reduced)
        self.last = [self._moments(*pair, reduced) for pair in self.stored]
        for i, form in enumerate(self.formats):
            if form.column == "fitted":
                self.columns[i] = self.fit(self.last[i][1], self.columns[i])
        self.stored = [
            f.store(*pair, column, self.steps)
            for f, pair, column in zip(self.formats, self.last, self.columns, strict=True)
        ]

    def fit(self, v: Tensor, old: Tensor | None) -> Tensor:
        """The scale of the columns of √v, measured anew 1, 2, 4, 8, … steps after a refresh."""
        rows = v.double().sum(-1, keepdim=True)
        new = column_scale(torch.where(rows > 0, v / rows, 0.0).pow(4).sum(-2, keepdim=True))
        return new if old is None else torch.where(self.since & (self.since - 1) == 0, new, old)

    def _moments(self, m: Tensor, v: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor]:
        return m.lerp(reduced, 1 - self.beta1), (v * self.beta2).addcmul_(reduced, reduced, value=1 - self.beta2)

    def errors(self, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each format: ‖N' − N‖/‖N‖ and the cosine of each matrix, and the largest |N'| of all entries."""
        bc1, bc2 = 1 - self.beta1**step, 1 - self.beta2**step

        def direction(m: Tensor, v: Tensor) -> Tensor:
            return ((m / bc1) / ((v / bc2).sqrt() + EPS)).flatten(1)

        assert self.exact is not None
        exact = direction(*self.exact)
        found = []
        for pair in self.last:
            other = direction(*pair)
            cosine = nn.functional.cosine_similarity(other, exact, dim=1)
            found.append(((other - exact).norm(dim=1) / exact.norm(dim=1), cosine, other.abs().max()))
        return found


# Training -----------------------------------------------------------------------------------------------------------------------


@cache
def batches(length: int, seed: int = 0) -> FileBatches:
    text = read_text(standard_library())
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.validation))
    return FileBatches(train, validation, length, seed)


@dataclass(frozen=True)
class Setup:
    model: str
    steps: int
    batch: int
    betas: tuple[float, float]
    gap: int = 200
    lr: float = 1.6e-2  # the best of benchmarks/results/pretrain_sweep.json
    seed: int = 0  # of initial weights, order of the data and the optimizer

    def factor(self, step: int) -> float:
        """Linear warm-up for a tenth, then a cosine to a tenth."""
        warmup = max(self.steps // 10, 1)
        if step < warmup:
            return (step + 1) / warmup
        progress = torch.tensor((step - warmup) / max(self.steps - warmup, 1))
        return float(0.1 + 0.45 * (1.0 + torch.cos(torch.pi * progress)))

    def train(self, bits: int = 32) -> Iterator[tuple[Any, Any, int, float]]:
        """Model, optimizer (GaLore with moments in so many bits), step and loss after each step, with the gradients still there."""
        data = batches(SIZES[self.model].length, self.seed)
        model = build_model(self.model, BYTE_VOCABULARY, data.length, CPU, torch.float32, False, seed=self.seed)
        groups = lo.param_groups(model, rank=0.25, weight_decay=0.1)
        options = {"lr": self.lr, "betas": self.betas, "scale": 0.25, "update_proj_gap": self.gap, "seed": self.seed}
        optimizer = lo.GaLoreAdamW(groups, state_bits=bits, **options)
        for step in range(1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.factor(step - 1)
            tokens = data.batch(step, self.batch)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield model, optimizer, step, float(loss)
            optimizer.zero_grad()


def validate(model: nn.Module, count: int = 16, size: int = 16) -> float:
    model.eval()
    with torch.no_grad():
        found = [float(model(input_ids=t, labels=t).loss) for t in batches(128).validation_batches(count, size)]
    return sum(found) / len(found)


def directions(setup: Setup, formats: list[Format], report_at: list[int]) -> dict[str, Any]:
    """Errors of the direction of every format, for low-rank and dense matrices, at some steps of one training run."""
    shadows: dict[tuple[int, ...], Shadow] = {}
    refreshes: dict[nn.Parameter, int] = {}
    result: dict[str, Any] = {}
    for _, optimizer, step, loss in setup.train():
        stacks: dict[tuple[int, ...], list[tuple[Tensor, bool]]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                if "basis" in state:
                    side = "right" if p.shape[0] >= p.shape[1] else "left"
                    reduced = kernels.project(p.grad, state["basis"], side)
                    refreshed = refreshes.get(p) != int(state["last_refresh"])
                    refreshes[p] = int(state["last_refresh"])
                    stacks.setdefault((0, *reduced.shape), []).append((reduced, refreshed))
                elif p.dim() == 2:
                    stacks.setdefault((1, *p.shape), []).append((p.grad.clone(), False))
        for key, stack in stacks.items():
            shadow = shadows.setdefault(key, Shadow(formats, setup.betas))
            refreshed = None if key[0] else torch.tensor([r for _, r in stack])
            shadow.update(torch.stack([r for r, _ in stack]), refreshed)
        if step in report_at:
            for dense, kind in enumerate(("low_rank", "dense")):
                found = [shadow.errors(step) for key, shadow in shadows.items() if key[0] == dense]
                for form, parts in zip(formats, zip(*found, strict=True), strict=True):
                    error, cosine = (torch.cat([part[i] for part in parts]) for i in (0, 1))
                    result.setdefault(form.name, {}).setdefault(kind, {})[step] = {
                        "mean_error": round(float(error.mean()), 5),
                        "worst_error": round(float(error.max()), 5),
                        "min_cosine": round(float(cosine.min()), 5),
                        "largest_entry": round(float(max(part[2] for part in parts)), 2),
                    }
            print(f"  step {step}, training loss {loss:.3f}", flush=True)
    return result


def losses(setup: Setup, bits: int) -> dict[str, float]:
    """Train with moments of the package in so many bits."""
    steps = list(setup.train(bits))
    recent = [loss for *_, loss in steps]
    return {
        "val_loss": validate(steps[-1][0]),
        "train_loss": sum(recent[-50:]) / 50,
        "largest_train_loss": max(recent[len(recent) // 10 :]),
    }


# Bases --------------------------------------------------------------------------------------------------------------------------


def bases(setup: Setup) -> list[dict[str, Any]]:
    """How far from orthonormal packed bases of real gradients are, and what they take, for several groups."""
    found = [state["basis"] for state in list(setup.train())[-1][1].state.values() if "basis" in state]
    rows = []
    for bits in (8, 4):
        for span in (1, 4, 16):  # whole rows in a group
            error, orthonormality, size = 0.0, 0.0, 0.0
            for basis in found:
                d, r = basis.shape
                grouped = basis.reshape(d // span, span * r)
                back = unpack_basis(*pack_basis(grouped, bits, group=span * r), bits, span * r).view(d, r)
                error = max(error, float((back - basis).norm() / basis.norm()))
                gram = back.mT @ back - torch.eye(r)
                orthonormality = max(orthonormality, float(torch.linalg.matrix_norm(gram, 2)))
                size = packed_basis_bytes(tuple(grouped.shape), bits, span * r) / basis.numel()
            rows.append(
                {
                    "bits": bits,
                    "rows_in_a_group": span,
                    "columns": found[0].shape[1],
                    "bytes_per_element": round(size, 4),
                    "worst_error": round(error, 5),
                    "worst_distance_from_orthonormal": round(orthonormality, 5),
                }
            )
    return rows


# Report -------------------------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any], step: int) -> None:
    print(f"{'':66} low rank: mean  worst  min cos  largest | dense: mean  worst")
    for name, kinds in results.items():
        low, dense = kinds["low_rank"][step], kinds["dense"][step]
        print(
            f"{name:72} {low['mean_error']:8.4f} {low['worst_error']:7.3f} {low['min_cosine']:7.4f} {low['largest_entry']:8.1f} |"
            f" {dense['mean_error']:8.4f} {dense['worst_error']:7.3f}"
        )


TRAINED = [(0.9, 0.999), (0.9, 0.95)]
SEEDS = 4
"""Any change of the last bit sends a training another way: losses of single runs differ by half a percent and more."""


def save(name: str, result: Any) -> None:
    """Replace one part of the JSON."""
    path = RESULTS / "state_format.json"
    before = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    write("state_format", before | {name: result})


PARTS = ("small", "wide", "train", "bases")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=1000, help="fewer for a trial, which writes no JSON")
    parser.add_argument("--beta2", type=float, help="train with this one only")
    args = parser.parse_args()
    torch.manual_seed(0)
    keep = save if args.steps == 1000 else (lambda name, result: None)
    began = time.perf_counter()
    if "small" in args.only:
        for betas, steps in (((0.9, 0.999), args.steps), ((0.9, 0.95), args.steps // 4)):
            found = directions(Setup("cpu", steps, 16, betas), SMALL, [steps // 5, steps // 2, steps])
            keep(f"direction, hidden 128, rank 32, {steps} steps, betas {betas}", found)
            print(f"betas {betas}, step {steps}, {time.perf_counter() - began:.0f} s")
            table(found, steps)
    if "wide" in args.only:
        steps = args.steps // 10
        found = directions(Setup("wide", steps, 4, (0.9, 0.999), gap=steps // 2, lr=4e-3), WIDE, [steps // 2, steps])
        keep(f"direction, hidden 1024, rank 256, {steps} steps, betas (0.9, 0.999)", found)
        print(f"rows of 256, step {steps}, {time.perf_counter() - began:.0f} s")
        table(found, steps)
    if "train" in args.only:
        for betas in TRAINED if args.beta2 is None else [(0.9, args.beta2)]:
            runs: dict[str, Any] = {}
            for seed in range(SEEDS):
                setup = Setup("cpu", args.steps // 2, 16, betas, gap=100, seed=seed)
                for bits in (32, 8, 4):
                    runs.setdefault(f"{bits} bit", {"seeds": []})["seeds"].append(losses(setup, bits))
                    print(f"seed {seed}, {bits} bits, {time.perf_counter() - began:.0f} s", flush=True)
            for name, run in runs.items():
                run["val_loss"] = mean(each["val_loss"] for each in run["seeds"])
                run["val_loss_over_float32"] = ratio = run["val_loss"] / runs["32 bit"]["val_loss"]
                print(f"{name} {run['val_loss']:.4f}  ×{ratio:.4f}", flush=True)
            keep(f"training, {args.steps // 2} steps, {SEEDS} seeds, betas {betas}", runs)
    if "bases" in args.only:
        rows = bases(Setup("cpu", 50, 16, (0.9, 0.999)))
        keep("bases", rows)
        for row in rows:
            print(row)


if __name__ == "__main__":
    main()
