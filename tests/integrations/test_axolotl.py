"""axolotl: the plugin of the page in a run of its own command line: what its trainer builds, updates in backward, a resumed run."""

import json

import pytest
import torch

from tests.oracles import chat
from tests.repository.pages import blocks

pytestmark = pytest.mark.integration
pytest.importorskip("axolotl")
cli = pytest.importorskip("axolotl.cli.train")

PLUGIN = next(
    block.code for block in blocks("docs/integrations/other_trainers.md", "python") if "BasePlugin" in block.code
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains with the plugin and returns what its last checkpoint holds: weights, and groups of the optimizer."""
    for name, value in {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "lowrank_plugin.py").write_text(PLUGIN.replace('"rank": 128', '"rank": 8'))
    monkeypatch.syspath_prepend(tmp_path)
    chat.model().save_pretrained(tmp_path / "model")
    chat.tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": f"hello world number {number % 7}, how are you today?"}) for number in range(64)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")

    def train(folder, **options):
        config = {
            "base_model": str(tmp_path / "model"),
            "datasets": [
                {"path": str(tmp_path / "text.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}
            ],
            "plugins": ["lowrank_plugin.LowRankPlugin"],
            "optimizer": "adamw_torch",
            "learning_rate": 0.01,
            "lr_scheduler": "cosine",
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_steps": 6,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 1.0,
            "sequence_len": 64,
            "save_steps": 3,
            "logging_steps": 1,
            "val_set_size": 0,
            "seed": 1,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / folder),
            **options,
        }
        path = tmp_path / f"{folder}.yaml"
        path.write_text(json.dumps(config))  # which is YAML, too
        cli.do_cli(str(path))
        last = tmp_path / folder / "checkpoint-6"
        from safetensors.torch import load_file

        return load_file(last / "model.safetensors"), torch.load(last / "optimizer.pt", weights_only=True), last

    return train


def test_the_plugin_trains_with_the_settings_of_the_config_and_resumes_to_the_bit(run, tmp_path):
    weights, optimizer, last = run("whole")
    low = [group for group in optimizer["param_groups"] if group["rank"] == 8]
    assert low
    assert {(group["weight_decay"], tuple(group["betas"])) for group in low} == {(0.1, (0.9, 0.95))}
    assert any(entry["exp_avg"].shape[-1] == 8 for entry in optimizer["state"].values())
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    before = chat.model().state_dict()
    assert all(not torch.equal(before[name], new) for name, new in weights.items())
    resumed, state, _ = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(weights[name], new) for name, new in resumed.items())
    for number, entry in optimizer["state"].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][number][key]))
            for key, value in entry.items()
        )
