"""examples/finetune.py on a tiny random model and the chats beside it: plan, loop, checkpoints, resume; with TRL in test_trl.py."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracles import chat

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
CHATS = ROOT / "examples" / "data" / "chats.jsonl"
FAST = ["--rank", "8", "--length", "128", "--steps", "6", "--save-every", "2", "--update-proj-gap", "2", "--lr", "2e-2"]
SMALL = [*FAST, "--accumulate", "2", "--batch", "2", "--warmup", "1", "--dtype", "float32"]


def example():
    spec = importlib.util.spec_from_file_location("finetune_example", ROOT / "examples" / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat.save(tmp_path_factory.mktemp("model"))


def run(folder: Path, out: Path, *more: str, trainer: str = "loop") -> list[float]:
    given = ["--model", str(folder), "--data", str(CHATS), "--out", str(out), "--trainer", trainer]
    return example().main([*given, *SMALL, *more])


def assert_resumes(folder: Path, out: Path, trainer: str) -> None:
    """A run that is continued from two thirds of its way ends at the same losses and weights."""
    straight = run(folder, out, trainer=trainer)
    assert straight[-1] < straight[0] - 0.3
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    first = AutoModelForCausalLM.from_pretrained(out / "final")
    shutil.rmtree(out / "checkpoint-6")
    assert run(folder, out, "--resume", trainer=trainer) == straight
    second = AutoModelForCausalLM.from_pretrained(out / "final")
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not any(torch.equal(p, q) for p, q in zip(first.parameters(), chat.model().parameters(), strict=True))


def test_the_loop_learns_and_a_continued_run_is_the_same(folder, tmp_path, capsys):
    assert_resumes(folder, tmp_path, "loop")
    printed = capsys.readouterr().out
    assert "optimizer state" in printed  # of the plan
    assert printed.count("step 5: loss") == 2


def test_bfloat16_weights_learn(folder, tmp_path):
    losses = run(folder, tmp_path, "--dtype", "bfloat16")
    assert losses[-1] < losses[0] - 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto").dtype == torch.bfloat16


def test_only_what_the_assistant_wrote_is_learned():
    tokenizer = chat.tokenizer()
    (row,) = example().tokenize(tokenizer, [chat.chats(8)[7]["messages"]], 128)
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == "14.<|im_end|>"
    assert len(row["labels"]) == len(row["input_ids"])
    with pytest.raises(SystemExit, match="no chat has an answer within its first 10 tokens; raise --length"):
        example().tokenize(tokenizer, [chat.chats(8)[7]["messages"]], 10)
    tokenizer.chat_template = None
    with pytest.raises(SystemExit, match="the tokenizer has no chat template"):
        example().tokenize(tokenizer, [], 10)


def test_every_chat_is_seen_once_in_each_pass():
    rows = list(range(6))
    seen = [row for number in range(6) for row in example().micro_batch(rows, number, 2, seed=3)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == rows
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memory", "1MiB"], "the plan does not fit 1MiB: lower --length"),
        (["--resume"], "has no checkpoint; leave it out to begin"),
        (["--data", "nowhere.jsonl"], "--data is nowhere.jsonl, which does not exist"),
        (["--model", "nowhere"], "has no config.json"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
    ],
)
def test_bad_input_says_what_to_do(more, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path, *more)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not any(tmp_path.iterdir())


def test_a_folder_with_another_run_is_not_written_to(folder, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(SystemExit, match="checkpoint-2 of another run: give --resume"):
        run(folder, tmp_path)


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"messages": []}', '{"messages": [{"role": "user"}]}', "no json"])
def test_a_line_that_is_no_chat_is_named(line, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat.chats(1)[0]) + "\n" + line + "\n" if line else "\n")
    with pytest.raises(SystemExit, match="is empty" if not line else r"chats.jsonl:2 is no chat"):
        example().read_chats(path)
