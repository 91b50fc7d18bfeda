"""Full-parameter fine-tuning of a causal language model on chats: plan the memory, train with updates in backward, resume.

    python examples/finetune.py --model FOLDER --data examples/data/chats.jsonl --rank 128 --memory 24GiB

FOLDER is what `save_pretrained` wrote: config, weights and a tokenizer with a chat template. Each line of the data is
{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}. TRL trains where it is installed; without it,
the loop in this file does, on the same tokens and with the same optimizer. Nothing is downloaded.
"""

import argparse
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text
from lowrank_optim.planner.simulation.allocator import parse_bytes

IGNORED = -100
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# Data ---------------------------------------------------------------------------------------------------------------------------


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """The messages of each line; SystemExit names the first line that has none."""
    chats = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            if not all({"role", "content"} <= set(message) for message in messages) or not messages:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise SystemExit(
                f'{path}:{number} is no chat; a line is {{"messages": [{{"role": "user", "content": "…"}}, …]}}'
            ) from None
        chats.append(messages)
    if not chats:
        raise SystemExit(f"{path} is empty; it needs one chat on each line")
    return chats


def marks_answers(tokenizer: Any) -> bool:
    """Whether the chat template says which tokens the assistant wrote, so that only they are learned."""
    if not tokenizer.chat_template:
        raise SystemExit(
            "the tokenizer has no chat template; take an instruction-tuned model, or set one and save it again"
        )
    return "generation" in tokenizer.chat_template.replace("add_generation_prompt", "")


def tokenize(tokenizer: Any, chats: list[list[dict[str, str]]], length: int) -> list[dict[str, list[int]]]:
    """Tokens and labels of the chats that have something to learn within `length` tokens."""
    answers_only, rows = marks_answers(tokenizer), []
    for messages in chats:
        made = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=answers_only, truncation=True, max_length=length
        )
        tokens = made["input_ids"]
        learned = made["assistant_masks"] if answers_only else [1] * len(tokens)
        if any(learned[1:]):
            labels = [token if learn else IGNORED for token, learn in zip(tokens, learned, strict=True)]
            rows.append({"input_ids": tokens, "labels": labels})
    if not rows:
        raise SystemExit(f"no chat has an answer within its first {length} tokens; raise --length")
    return rows


def collate(rows: list[dict[str, list[int]]], padding: int) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": padded("input_ids", padding), "labels": padded("labels", IGNORED), "attention_mask": mask}


# Both trainers ------------------------------------------------------------------------------------------------------------------


def check_memory(options: argparse.Namespace, device: torch.device) -> None:
    """Print what the run will need; SystemExit if that is above --memory."""
    memory = lo.plan(
        str(Path(options.model, "config.json")),
        (options.method, {"rank": options.rank}),
        batch_size=options.batch,
        sequence_length=options.length,
        dtype=options.dtype,
        in_backward=True,
        activation_checkpointing=True,
        accumulate=options.accumulate,
        device=device,
    )
    print(memory)
    if options.memory and not memory.fits(parse_bytes(options.memory)):
        raise SystemExit(
            f"the plan does not fit {options.memory}: lower --length, --batch or --rank, or take --method galore_8bit"
        )


def low_rank_options(options: argparse.Namespace) -> dict[str, Any]:
    """Of the optimizer. bfloat16 has steps too coarse for small updates, so that they are rounded at random."""
    rounding = {"stochastic_rounding": True} if options.dtype == "bfloat16" else {}
    return {"rank": options.rank, "update_proj_gap": options.update_proj_gap} | rounding


def latest_checkpoint(out: Path) -> Path | None:
    """The folder checkpoint-N of the largest N."""
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def train_with_trl(
    options: argparse.Namespace, model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], resume: Path | None
) -> list[float]:
    """TRL's SFTTrainer, with the factory and the callback of this package; returns the logged losses."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        max_length=options.length,
        assistant_only_loss=marks_answers(tokenizer),
        bf16=False,  # the weights are bfloat16 themselves: no autocast
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_steps=options.save_every,
        save_total_limit=2,
        seed=options.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"messages": messages} for messages in chats]),
        processing_class=tokenizer,
        callbacks=[lo.integrations.transformers.InBackward()],
        optimizer_cls_and_kwargs=(
            lo.integrations.transformers.LowRank,
            {"method": options.method, **low_rank_options(options)},
        ),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The loop -----------------------------------------------------------------------------------------------------------------------


def micro_batch(rows: list[Any], number: int, size: int, seed: int) -> list[Any]:
    """Rows of a micro-batch: every pass has an order of its own, which depends on nothing but the seed."""
    chosen = []
    for position in range(number * size, (number + 1) * size):
        turn, place = divmod(position, len(rows))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + turn))
        chosen.append(rows[int(order[place])])
    return chosen


def train_with_loop(
    options: argparse.Namespace, model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], resume: Path | None
) -> list[float]:
    """Warm-up, cosine, clipping, accumulation and checkpoints; returns the losses of all steps."""
    rows = tokenize(tokenizer, chats, options.length)
    device = next(model.parameters()).device
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()

    groups = lo.param_groups(model, weight_decay=options.weight_decay, **low_rank_options(options))
    optimizer = lo.by_name(options.method)(groups, lr=options.lr)
    handle = lo.update_in_backward(optimizer, options.accumulate, options.clip or None)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            1.0 if options.warmup == 0 else step / options.warmup,
            0.5 + 0.5 * math.cos(math.pi * max(step - options.warmup, 0) / max(options.steps - options.warmup, 1)),
        ),
    )
    losses: list[float] = []
    if resume is not None:
        saved = torch.load(resume / "training.pt", weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        losses = saved["losses"]

    for step in range(len(losses), options.steps):
        total = 0.0
        for part in range(options.accumulate):
            chosen = micro_batch(rows, step * options.accumulate + part, options.batch, options.seed)
            batch = {name: value.to(device) for name, value in collate(chosen, tokenizer.pad_token_id).items()}
            loss = model(**batch).loss / options.accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        print(f"step {step + 1}: loss {total:.4f}, gradient norm {float(optimizer.last_grad_norm):.3f}")
        if (step + 1) % options.save_every == 0:
            save_checkpoint(options.out, model, optimizer, schedule, losses)
    handle.remove()
    return losses


def save_checkpoint(out: Path, model: Any, optimizer: Any, schedule: Any, losses: list[float]) -> None:
    """checkpoint-N, complete or not there at all; of the older ones, the last stays."""
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    folder = out / f"checkpoint-{len(losses)}"
    unfinished = out / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.save({**states, "losses": losses}, unfinished / "training.pt")
    before = latest_checkpoint(out)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for old in out.glob("checkpoint-*"):
        if old not in (folder, before):
            shutil.rmtree(old)


# Command ------------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="config, weights and tokenizer")
    parser.add_argument("--data", required=True, type=Path, metavar="JSONL", help="a chat on each line")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="default: %(default)s")
    parser.add_argument(
        "--trainer", choices=("auto", "trl", "loop"), default="auto", help="auto: TRL where it is installed"
    )
    parser.add_argument("--method", default="galore_8bit", choices=sorted(lo.METHODS), help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--update-proj-gap", type=int, default=200, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-5, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument(
        "--clip", type=float, default=1.0, help="largest gradient norm, 0 for any (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="chats in a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=8, help="micro-batches in a step (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a chat that are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--memory", metavar="SIZE", help="of the card, such as 24GiB: stop if the plan does not fit")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    for name in ("rank", "update_proj_gap", "steps", "batch", "accumulate", "length", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if not (options.model / "config.json").exists():
        parser.error(f"--model is {options.model}, which has no config.json; give a folder that save_pretrained wrote")
    if not options.data.exists():
        parser.error(f"--data is {options.data}, which does not exist")
    if options.trainer == "trl" and importlib.util.find_spec("trl") is None:
        parser.error("--trainer is trl, which is not installed: pip install trl, or take --trainer loop")
    return options


def main(argv: list[str] | None = None) -> list[float]:
    """Plan, train, save; returns the losses."""
    accept_any_text()
    options = parse(argv)
    resume = latest_checkpoint(options.out)
    if resume is not None and not options.resume:
        raise SystemExit(
            f"{options.out} has {resume.name} of another run: give --resume to continue it, or another --out"
        )
    if resume is None and options.resume:
        raise SystemExit(f"--resume, but {options.out} has no checkpoint; leave it out to begin")
    chats = read_chats(options.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_memory(options, device)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(device)
    by_trl = options.trainer == "trl" or (options.trainer == "auto" and importlib.util.find_spec("trl") is not None)
    losses = (train_with_trl if by_trl else train_with_loop)(options, model, tokenizer, chats, resume)
    model.save_pretrained(options.out / "final")
    tokenizer.save_pretrained(options.out / "final")
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; the model is in {options.out / 'final'}")
    return losses


if __name__ == "__main__":
    main()
