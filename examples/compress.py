"""Compress a trained LLaMA without training it again: loss against size, for several methods and budgets.

    python examples/compress.py                                   # trains a small model first, minutes on a CPU
    python examples/compress.py --folder runs/compress/model      # a model that is there: any causal model of transformers
    python examples/compress.py --shares 0.3,0.6,0.9 --pairs 4,16 --out runs/other

The layers' weights are replaced by two factors: the best for the weights (svd), the same with ranks by one threshold for all layers
(svd, selected ranks), and the best for the outputs on some text (features). Beside these, 8-bit weights, alone and with a pair of
factors that makes up for their errors on the text (int8 + pair). The statistics come from training text, the loss from held-out
text. Sizes are those of a checkpoint in --dtype. Writes compress.json and compress.png, and the model that it trained.
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:  # before torch, see pretraining/__init__.py
    from pretraining.configs import build_model
    from pretraining.folder import write_atomically
    from pretraining.report import COLOURS, save_picture, size
except ModuleNotFoundError as error:
    sys.exit(f"compress.py: {error}; install what the example needs: pip install 'lowrank-optim[hf,plot]'")

import torch
from pretraining.data import BYTE_VOCABULARY, DataError, FileBatches, Text, read_text, standard_library, text_files
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text

VALIDATION_BATCHES = 8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Point:
    """One compressed model."""

    method: str
    setting: str
    bytes: int
    loss: float


# The model and its text ---------------------------------------------------------------------------------------------------------


def tokenized(text: Text, folder: Path | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Training and validation text as tokens: by the folder's tokenizer, or bytes."""
    if folder is not None and any(folder.glob("token*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        both = (part.decode("utf-8", errors="replace") for part in (text.train, text.validation))
        train, validation = (tokenizer(part, return_tensors="pt")["input_ids"][0] for part in both)
        return train, validation
    if vocabulary < BYTE_VOCABULARY:
        raise DataError(
            f"the model has {vocabulary} tokens, {folder} has no tokenizer, and bytes need {BYTE_VOCABULARY}"
        )
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.validation))
    return train, validation


def train(model: nn.Module, batches: FileBatches, steps: int, batch: int) -> None:
    """Train with GaLore, cosine schedule."""
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=0.25, weight_decay=0.1), lr=1.6e-2, update_proj_gap=50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 10 + 1), 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    began = time.perf_counter()
    for step in range(steps):
        ids = batches.batch(step, batch)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % max(1, steps // 8) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s")


@torch.no_grad()
def loss_of(model: nn.Module, batches: FileBatches, batch: int) -> float:
    """Nats per token on held-out text."""
    losses = [
        model(input_ids=ids, labels=ids).loss.item() for ids in batches.validation_batches(VALIDATION_BATCHES, batch)
    ]
    return sum(losses) / len(losses)


# The compressed models ----------------------------------------------------------------------------------------------------------


def bytes_of(model: nn.Module) -> int:
    """Bytes of a checkpoint; tied tensors count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def uniform_ranks(model: nn.Module, names: Iterable[str], share: float) -> dict[str, int]:
    """For each layer the rank whose factors have this share of its numbers."""
    ranks = {}
    for name in names:
        m, n = model.get_submodule(name).weight.shape
        ranks[name] = max(1, int(share * m * n / (m + n)))
    return ranks


def compressed(
    model: nn.Module, calibration: list[dict[str, Tensor]], shares: list[float], pairs: list[int]
) -> Iterator[tuple[str, str, nn.Module]]:
    """(method, setting, model) of each."""
    statistics = lo.nn.collect_statistics(model, calibration, side="input")
    for share in shares:
        ranks = uniform_ranks(model, statistics, share)
        setting = f"{100 * share:.0f} % of the layers' numbers"
        yield "svd", setting, lo.nn.factorize_(copy.deepcopy(model), ranks=ranks)
        selected = lo.nn.select_ranks(model, reduction=1 - share, budget="parameters", min_ratio=0.0)
        yield "svd, selected ranks", setting, lo.nn.factorize_(copy.deepcopy(model), ranks=selected)
        features = lo.nn.factorize_(copy.deepcopy(model), ranks=ranks, method="features", statistics=statistics)
        yield "features", setting, features
    yield "int8", "8 bits", lo.nn.quantize_weights_(copy.deepcopy(model))
    for rank in pairs:
        coded = lo.nn.quantize_weights_(copy.deepcopy(model))
        yield "int8 + pair", f"8 bits, rank {rank}", lo.nn.compensate_(coded, model, rank=rank, statistics=statistics)


# What a person sees -------------------------------------------------------------------------------------------------------------


def plot(points: list[Point], path: Path) -> None:
    """Loss over size, one line a method; the whole model as a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    whole, *others = points
    figure, axes = plt.subplots(figsize=(8, 5), dpi=140, layout="constrained")
    axes.axhline(whole.loss, color="black", linewidth=1, linestyle="--", label=f"the whole model, {size(whole.bytes)}")
    for colour, method in zip(COLOURS, dict.fromkeys(point.method for point in others), strict=False):
        line = sorted((point.bytes / 2**20, point.loss) for point in others if point.method == method)
        style = "o-" if len(line) > 1 else "o"
        axes.plot(*zip(*line, strict=True), style, color=colour, markersize=5, linewidth=1.6, label=method)
    axes.set_xlabel("size of the checkpoint (MiB)")
    axes.set_ylabel("loss on held-out text (nats per token)")
    axes.set_title("A trained model, compressed without further training", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    save_picture(figure, path)


def show(point: Point, whole: Point) -> None:
    print(
        f"{point.method:20} {point.setting:30} {point.bytes / 2**20:9.2f} MiB {100 * point.bytes / whole.bytes:5.1f} %"
        f"  loss {point.loss:.4f} ({round(point.loss - whole.loss, 4) + 0.0:+.4f})"  # no -0.0000
    )


def numbers(kind: type) -> Any:
    """`"1,2"` as a list."""

    def read(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",")]
        if any(value <= 0 or (kind is float and value >= 1) for value in found):
            raise ValueError
        return found

    read.__name__ = "shares between 0 and 1" if kind is float else "ranks"
    return read


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a model that transformers saved; without it, one is trained")
    parser.add_argument(
        "--text", nargs="+", type=Path, help="files or folders (default: the standard library's source)"
    )
    parser.add_argument("--steps", type=int, default=600, help="of training (default 600)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (default 16)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence (default 128)")
    parser.add_argument(
        "--calibration", type=int, default=8, help="batches of training text for statistics (default 8)"
    )
    parser.add_argument("--shares", type=numbers(float), default=[0.2, 0.35, 0.5, 0.7, 0.9], help="default 0.2 to 0.9")
    parser.add_argument("--pairs", type=numbers(int), default=[2, 4, 8, 16], help="ranks of pairs (default 2,4,8,16)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the compressed models (default bfloat16)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/compress"), help="folder (default runs/compress)")
    return parser


def load_or_train(args: argparse.Namespace, text: Text) -> tuple[nn.Module, FileBatches]:
    """The model in its type, and its text."""
    if args.folder is not None:
        if not (args.folder / "config.json").exists():
            raise DataError(f"--folder {args.folder}: there is no config.json; it must be a folder of save_pretrained")
        model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=DTYPES[args.dtype])
        tokens = tokenized(text, args.folder, model.config.vocab_size)
        return model.eval(), FileBatches(*tokens, args.length, args.seed)
    batches = FileBatches(*tokenized(text, None, BYTE_VOCABULARY), args.length, args.seed)
    model = build_model("cpu", BYTE_VOCABULARY, args.length, torch.device("cpu"), torch.float32, False, args.seed)
    train(model, batches, args.steps, args.batch)
    model.save_pretrained(args.out / "model")
    return model.to(DTYPES[args.dtype]).eval(), batches


def main(given: list[str] | None = None) -> list[Point]:
    accept_any_text()
    args = arguments().parse_args(given)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        text = read_text(text_files(args.text) if args.text else standard_library())
        model, batches = load_or_train(args, text)
    except DataError as error:
        sys.exit(f"compress.py: {error}")
    points = [Point("whole", args.dtype, bytes_of(model), loss_of(model, batches, args.batch))]
    show(points[0], points[0])
    # After the steps of training: other windows.
    calibration = [{"input_ids": batches.batch(args.steps + i, args.batch)} for i in range(args.calibration)]
    with warnings.catch_warnings():  # layers that stay as they are: the sizes tell
        warnings.simplefilter("ignore", UserWarning)
        for method, setting, small in compressed(model, calibration, args.shares, args.pairs):
            points.append(Point(method, setting, bytes_of(small), loss_of(small, batches, args.batch)))
            show(points[-1], points[0])
    result: Mapping[str, Any] = {"points": [asdict(point) for point in points], "torch": torch.__version__}
    write_atomically(args.out / "compress.json", json.dumps(result, indent=2) + "\n")
    plot(points, args.out / "compress.png")
    print(f"wrote {args.out / 'compress.json'} and {args.out / 'compress.png'}")
    return points


if __name__ == "__main__":
    main()
