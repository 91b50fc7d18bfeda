"""README and the pages in docs/: their blocks of code, and what the code of a section presupposes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

NOT_RUN = "*Not run in the tests: "
"""How the line above a block begins that does not run; the reason follows, and `.*`."""

_BLOCK = re.compile(
    rf"(?:^{re.escape(NOT_RUN)}(?P<reason>[^\n]*)\.\*\n\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line of code, its section (`##`), and why it does not run, or None."""

    page: str
    line: int
    section: str
    language: str
    code: str
    not_run: str | None

    def execute(self, scope: dict[str, Any]) -> None:
        """Run it; errors name page and line."""
        exec(compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec"), scope)


def text(page: str) -> str:
    """A page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> Iterator[Block]:
    """The blocks of a page in one language, from the top."""
    whole = text(page)
    for found in _BLOCK.finditer(whole):
        if found["language"] == language:
            above = whole[: found.start("code")]
            section = (re.findall(r"^## (.*)$", above, flags=re.MULTILINE) or [""])[-1]
            yield Block(page, above.count("\n") + 1, section, language, found["code"], found["reason"])


class Layer(nn.Module):
    """A layer of `Decoder`: a fused matrix that is nearly square, and a wide and a tall one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """The reader's model: tokens in, logits out. Its matrices have more than 128 rows and columns, the rank of most examples."""

    def __init__(self, width: int = 144) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def presupposed() -> dict[str, Any]:
    """What the code of every section may use without saying where it comes from."""
    torch.manual_seed(0)
    model = Decoder()
    scope: dict[str, Any] = {"torch": torch, "lo": lo, "model": model, "tokens": torch.randint(64, (8, 12))}
    scope["optimizer"] = lo.GaLoreAdamW(lo.param_groups(model, rank=16), lr=1e-3)
    scope["matrices"] = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    chosen = {id(p) for p in scope["matrices"]}
    scope["others"] = [p for p in model.parameters() if id(p) not in chosen]
    return scope


def presupposed_by_a_trainer() -> dict[str, Any]:
    """What stands before a Trainer is built: a model, arguments and data."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    tokens = torch.arange(12)
    return {
        "Trainer": Trainer,
        "model": LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)),
        "args": TrainingArguments("runs/pages", max_steps=2, per_device_train_batch_size=2, **quiet),
        "data": [{"input_ids": tokens, "labels": tokens}] * 4,
    }


def presupposed_by_chats() -> dict[str, Any]:
    """What stands before a model is trained on chats: the model and its tokenizer, chats, and answers of which one is better."""
    from datasets import Dataset

    from tests.oracles import chat

    chats = chat.chats()
    wrong = [{"role": "assistant", "content": "I do not know."}]
    preferences = [
        {"prompt": each["messages"][:1], "chosen": each["messages"][1:], "rejected": wrong} for each in chats
    ]
    return {
        "model": chat.model(),
        "reference": chat.model(),
        "tokenizer": chat.tokenizer(),
        "chats": Dataset.from_list(chats),
        "preferences": Dataset.from_list(preferences),
    }


def presupposed_by_processes() -> dict[str, Any]:
    """What stands before a model is given to several processes; there is one here."""
    from torch.distributed import init_device_mesh

    return {"DistributedDataParallel": DistributedDataParallel, "mesh": init_device_mesh("cpu", (1,))}


def step_changes_weights(scope: dict[str, Any]) -> bool:
    """Whether a step of the scope's optimizer changes the weights of the reader's model."""
    model, optimizer, tokens = (scope[name] for name in ("model", "optimizer", "tokens"))
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
    optimizer.step()
    return any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def is_readers(model: nn.Module) -> bool:
    """Whether this is the model of `presupposed`, wrapped or not, and none that the page has made."""
    return isinstance(getattr(model, "module", model), Decoder)
