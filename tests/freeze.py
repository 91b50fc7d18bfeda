"""Checkpoints that later versions have to load: `python -m tests.freeze` writes those that are missing into tests/frozen.

A file has the optimizer's state dict and the weights after BEFORE steps, and the weights after AFTER more, as the version that wrote
it trained them. The tests load each file with the version at hand and take the same steps. Files of a released version stay as they
are: where the state changes, `lowrank_optim/optimizers/migrations.py` gets a function, and new files stand in a folder of the new
format. Before the first release, delete a file to have it made anew.
"""

import contextlib
import gzip
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.groups.complete import STATE_FORMAT
from lowrank_optim.optimizers.lora import PRECONDITIONERS
from lowrank_optim.quantization import coded_moments

FOLDER = Path(__file__).parent / "frozen"
BEFORE, AFTER = 7, 6
GAP = 4  # every matrix is refreshed before and after the checkpoint
RANK = 3
SHAPES = {"tall": (12, 8), "wide": (8, 12), "table": (9, 8), "vector": (8,)}
DENSE = ("table", "vector")
METHODS = lo.METHODS | lo.FULL_RANK_METHODS | lo.LAYERWISE_METHODS


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [−1, 1] from integer arithmetic: every machine and version of torch has the same bits."""
    count = torch.Size(shape).numel()
    mixed = torch.arange(1, count + 1) * 40503 + seed * 69069
    for _ in range(3):
        mixed = (mixed * 1103515245 + 12345) % 2**31
        mixed = mixed ^ (mixed >> 15)
    return ((mixed % 65537).double() / 32768 - 1).view(shape)


def gradient(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    """Of a matrix three directions that turn slowly, well apart, and noise: subspaces are the same on every machine."""
    noise = 0.02 * numbers(shape, 1000 * step + number + 1)
    if len(shape) < 2:
        return noise
    rows, columns = (numbers((size, RANK), 7 * number + side) for side, size in enumerate(shape))
    turned = rows + 0.05 * step * numbers(rows.shape, 7 * number + 2)
    return noise + turned @ torch.diag(torch.tensor([3.0, 1.0, 0.3]).double()) @ columns.T


class Model(nn.Module):
    """A parameter of each shape, whose gradients are `gradient(shape, number, step)`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter((0.25 * numbers(shape, 500 + number)).to(dtype)))

    def forward(self, step: int) -> Tensor:
        return sum((p * gradient(tuple(p.shape), i, step).to(p.dtype)).sum() for i, p in enumerate(self.parameters()))


@dataclass(frozen=True)
class Case:
    """A run: an optimizer; what its group of matrices says, or the group of each matrix, or the rule of each pair; and its options.

    Few bits are used for matrices of any size. `tolerance`: how far the weights may be off, of the way that they go in AFTER steps.
    """

    method: str
    matrices: Mapping[str, Any] | None = None
    each: tuple[Mapping[str, Any], ...] = ()
    pairs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    tolerance: float = 1e-3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.pairs:
            return {
                f"{side}{i}": shape for i in range(len(self.pairs)) for side, shape in (("A", (3, 8)), ("B", (12, 3)))
            }
        return {f"m{i}": (12, 8) if i % 2 else (8, 12) for i in range(len(self.each))} if self.each else SHAPES

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        if self.pairs:
            params = [param for _, param in named]
            triples = [(a, b, 2.0) for a, b in zip(params[::2], params[1::2], strict=True)]
            rules = [PRECONDITIONERS[name]() for name in self.pairs]
            return [{**lo.lora_pairs([pair])[0], "rule": rule} for pair, rule in zip(triples, rules, strict=True)]
        if self.each:
            return [{"params": [pair], **says} for pair, says in zip(named, self.each, strict=True)]
        if self.method in lo.LAYERWISE_METHODS:
            return [
                {"params": [pair], "layer": layer, "rank": None if pair[0] in DENSE else RANK}
                for layer, pair in enumerate(named)
            ]
        rule = {name: says for name, says in METHODS[self.method].matrix_options.items() if name == "rule"}
        low, dense = ([pair for pair in named if (pair[0] in DENSE) is side] for side in (False, True))
        return [{"params": low, **(self.matrices or rule or {"rank": RANK})}, {"params": dense, "rank": None}]

    def build(self) -> tuple[Model, lo.LowRankOptimizer, Any]:
        """Model and optimizer as they begin, and the handle of updates in backward."""
        model = Model(self.shapes(), self.dtype)
        kind = METHODS.get(self.method, lo.LoRAOptimizer if self.pairs else lo.LowRankOptimizer)
        gap = {} if self.method in lo.LAYERWISE_METHODS else {"update_proj_gap": GAP}
        optimizer = kind(self.groups(model), **{"lr": 1e-2, **gap, **self.options})
        handle = lo.update_in_backward(optimizer, accumulate=self.accumulate) if self.accumulate > 1 else None
        return model, optimizer, handle

    def train(self, model: Model, optimizer: lo.LowRankOptimizer, first: int, last: int) -> None:
        """Backward passes `first` to `last`, each of which is a step, or one of `accumulate`."""
        for number in range(first, last):
            model(number).backward()
            if (number + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


BF16 = torch.bfloat16
CASES: dict[str, Case] = {name: Case(name) for name in METHODS}
CASES |= {
    "frugal": Case("frugal", {"density": 0.5}),
    "frugal_sgd": Case("frugal_sgd", options={"momentum": 0.9, "lr": 1e-3}),
    "galore_8bit": Case("galore_8bit", tolerance=0.05),
    "qgalore": Case("qgalore", tolerance=0.05),
    "lisa": Case("lisa", options={"active_layers": 2, "period": 3, "sleeping_state": "cpu"}),
    "badam": Case("badam", options={"period": 3}),
    "sara_shrink": Case(
        "sara", {"density": 1.0}, options={"threshold": 0.12, "shrink_at": GAP, "low_rank_weight": 0.1}
    ),
    "halfway": Case("galore", accumulate=2),
    "lazy": Case("galore", options={"overlap_threshold": 0.5, "on_refresh": "rotate", "proj_type": "full"}),
    "rules": Case(
        "",
        each=(
            *({"rank": RANK, "rule": rule} for rule in (lo.Adafactor(), lo.Lion(), lo.SGD(0.9), lo.RMSprop())),
            *({"rule": rule} for rule in (lo.Muon(), lo.NorMuon(), lo.RowNorm(0.9), lo.Sinkhorn(), lo.SAGE())),
        ),
        options={"rule": lo.Adam(), "lr": 1e-3},
    ),
    "projectors": Case(
        "",
        each=(
            *(
                {"rank": RANK, "projector": name}
                for name in ("svd", "random", "power_iteration", "dct", "randomized_svd:complement")
            ),
            *({"density": 0.5, "projector": f"coordinate:{name}"} for name in ("rows", "columns", "entries")),
            *({"density": 0.5, "projector": "blocks:random", "on_refresh": "reset"} for _ in range(2)),
        ),
        options={"rule": lo.Adam()},
    ),
    "residuals": Case(
        "",
        each=tuple(
            {"rank": RANK, "residual": name}
            for name in ("sgd", "sign", "error_feedback", "norm_scaled", "gradient_scaled", "complement_scaled")
        ),
        options={"rule": lo.Adam(), "lr": 1e-3},
    ),
    "few_bits": Case(
        "",
        each=tuple(
            {"rank": rank, "state_bits": bits, **({"basis_bits": bits} if rank else {})}
            for bits in (16, 8, 4)
            for rank in (RANK, None)
        ),
        options={"rule": lo.Adam(), "stochastic_rounding": True},
        dtype=BF16,
        tolerance=0.1,
    ),
    "error_bits": Case(
        "",
        each=tuple(
            {"rank": rank, "weight_error_bits": bits, "cautious": rank is None}
            for bits in (8, 16)
            for rank in (RANK, None)
        ),
        options={"rule": lo.Adam(), "lr": 1e-3},
        dtype=BF16,
        tolerance=0.02,
    ),
    "adapters": Case("", pairs=tuple(PRECONDITIONERS), options={"lr": 1e-3}),
    "masters": Case("badam", options={"period": 3, "master_weights": True}, dtype=BF16, tolerance=0.02),
}


@contextlib.contextmanager
def coded_at_any_size() -> Iterator[None]:
    """Few bits also for tensors of fewer elements than usual."""
    before = coded_moments.MIN_CODED
    coded_moments.MIN_CODED = 16
    try:
        yield
    finally:
        coded_moments.MIN_CODED = before


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def freeze(case: Case) -> dict[str, Any]:
    """What the file of a case holds."""
    with coded_at_any_size():
        model, optimizer, _ = case.build()
        case.train(model, optimizer, 0, BEFORE)
        saved = {"torch": str(torch.__version__), "optimizer": optimizer.state_dict(), "weights": weights(model)}
        state = saved["optimizer"]["state"]
        saved["optimizer"]["state"] = {k: {n: t.clone() for n, t in own.items()} for k, own in state.items()}
        case.train(model, optimizer, BEFORE, BEFORE + AFTER)
        return {**saved, "after": weights(model)}


def read(path: Path) -> dict[str, Any]:
    """What `freeze` returned."""
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def write(path: Path, contents: dict[str, Any]) -> None:
    """Save it; the same contents make the same bytes."""
    file = io.BytesIO()
    torch.save(contents, file)
    path.write_bytes(gzip.compress(file.getvalue(), mtime=0))


def main() -> None:
    """Write the files that are missing."""
    torch.set_num_threads(1)
    folder = FOLDER / f"format_{STATE_FORMAT}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        path = folder / f"{name}.pt.gz"
        if not path.exists():
            write(path, freeze(case))
            sys.stdout.write(f"{path} ({path.stat().st_size:,} bytes)\n")


if __name__ == "__main__":
    main()
