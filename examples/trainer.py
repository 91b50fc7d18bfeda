"""GaLore in the Trainer of transformers: a tiny Llama, a checkpoint half way, and a resumed run that ends at the same loss.

    python examples/trainer.py --steps 60 --method galore --rank 16

The text is the source code of Python's standard library, as bytes. Nothing is downloaded.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text

CONTEXT = 64
HELD_OUT = 64


class ByteWindows(Dataset):
    """Windows of CONTEXT bytes; tokens are bytes."""

    def __init__(self, text: bytes) -> None:
        count = len(text) // CONTEXT
        self.windows = torch.frombuffer(bytearray(text[: count * CONTEXT]), dtype=torch.uint8).view(count, CONTEXT)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.windows[index].long()
        return {"input_ids": tokens, "labels": tokens}


def standard_library_text(size: int) -> bytes:
    """The first `size` bytes of the standard library's source files."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def tiny_llama(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same first weights in every run
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return LlamaForCausalLM(config)


def make_trainer(options: argparse.Namespace, train: Dataset, evaluation: Dataset) -> Trainer:
    args = TrainingArguments(
        options.out,
        max_steps=options.steps,
        save_steps=options.steps // 2,
        logging_steps=max(1, options.steps // 10),
        per_device_train_batch_size=16,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The factory makes the groups from the model, and takes learning rate, weight decay, betas and epsilon from `args`.
    low_rank = {"method": options.method, "rank": options.rank, "update_proj_gap": options.update_proj_gap}
    return Trainer(
        model=tiny_llama(options.hidden),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        optimizer_cls_and_kwargs=(lo.integrations.transformers.LowRank, low_rank),
    )


def last_train_loss(trainer: Trainer) -> float:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Train straight through, then from the checkpoint half way; returns the final (training, held-out) losses of both."""
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, even (default: %(default)s)")
    parser.add_argument("--method", default="galore", help=f"one of {', '.join(lo.METHODS)} (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--update-proj-gap", type=int, default=20, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: %(default)s)")
    parser.add_argument("--out", default="runs/trainer", help="folder for checkpoints (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps is {options.steps}; it must be even, so that there is a checkpoint half way")

    data = ByteWindows(standard_library_text(1 << 20))
    evaluation = torch.utils.data.Subset(data, range(HELD_OUT))
    train = torch.utils.data.Subset(data, range(HELD_OUT, len(data)))

    straight = make_trainer(options, train, evaluation)
    straight.create_optimizer()  # train() would do it; done here to show the groups first
    print(lo.describe(straight.optimizer))
    print(
        "optimizer state:",
        ", ".join(f"{kind} {size:,}" for kind, size in lo.state_bytes(straight.optimizer).items()),
        "bytes\n",
    )
    straight.train()
    losses = {"straight": (last_train_loss(straight), straight.evaluate()["eval_loss"])}

    resumed = make_trainer(options, train, evaluation)
    resumed.train(resume_from_checkpoint=f"{options.out}/checkpoint-{options.steps // 2}")
    losses["resumed"] = (last_train_loss(resumed), resumed.evaluate()["eval_loss"])

    print(f"\n{'run':<10}{'training loss':>16}{'held-out loss':>16}")
    for name, (train_loss, eval_loss) in losses.items():
        print(f"{name:<10}{train_loss:>16.6f}{eval_loss:>16.6f}")
    print("equal" if losses["straight"] == losses["resumed"] else "NOT EQUAL")
    return losses


if __name__ == "__main__":
    result = main()
    raise SystemExit(result["straight"] != result["resumed"])
