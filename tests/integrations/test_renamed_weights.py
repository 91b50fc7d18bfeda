"""Families whose weights transformers renames in its files (Mixtral, ViT): a run that the Trainer resumes, AdamW beside GaLore.

Its Trainer loads the file by the model's own names and leaves what it does not find as it was. A model that `from_pretrained` has
read from the checkpoint goes on to the bit.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from lowrank_optim.integrations.transformers import LowRank
from tests.integrations.test_model_families import FAMILIES, LR, RANK

pytestmark = pytest.mark.long

OPTIMIZERS = {"adamw": {}, "galore": {"optimizer_cls_and_kwargs": (LowRank, {"method": "galore", "rank": RANK})}}


def train(model: nn.Module, family: str, optimizer: str, folder: str, resume: str | None = None) -> dict:
    """Four steps, the checkpoint after two; the weights at the end."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    batch = FAMILIES[family].batch()
    data = [{name: values[number % 2] for name, values in batch.items()} for number in range(16)]
    args = TrainingArguments(
        folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=LR, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, **OPTIMIZERS[optimizer])
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["mixtral", "vit"])
def test_a_model_read_from_the_checkpoint_goes_on_to_the_bit(family, optimizer, tmp_path):
    whole = train(FAMILIES[family].build(), family, optimizer, str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    model = getattr(transformers, FAMILIES[family].model).from_pretrained(checkpoint)
    resumed = train(model, family, optimizer, str(tmp_path / "resumed"), checkpoint)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
