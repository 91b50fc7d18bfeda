"""Lightning: automatic and manual optimization, accumulation, clipping, checkpoints, and updates in backward."""

import pytest
import torch
from torch import nn

import lowrank_optim as lo

pytestmark = pytest.mark.integration
lightning = pytest.importorskip("lightning")

BATCHES, ROWS, WIDTH = 8, 4, 24
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def optimizer_for(model: nn.Module) -> lo.LowRankOptimizer:
    groups = lo.param_groups(model, rank=8, update_proj_gap=3, weight_decay=SETTINGS["weight_decay"])
    return lo.GaLoreAdamW(groups, lr=SETTINGS["lr"], betas=SETTINGS["betas"])


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(BATCHES)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch[:, :3])


class Module(lightning.LightningModule):
    """Lightning does the step."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.losses = network(), []

    def training_step(self, batch, index):
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = optimizer_for(self.network)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Module):
    """The module does the step, after two micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss / 2)
        if index % 2 == 1:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class InBackward(Module):
    """Automatic optimization, with the handle attached while it trains."""

    def __init__(self, **how) -> None:
        super().__init__()
        self.how, self.gradients = how, []

    def on_fit_start(self):
        self.handle = lo.update_in_backward(self.optimizers().optimizer, **self.how)

    def on_before_optimizer_step(self, optimizer):
        self.gradients += [p.grad for p in self.network.parameters() if p.grad is not None]

    def on_fit_end(self):
        self.handle.remove()


class ManualInBackward(InBackward):
    """The usual way with updates in backward: step() is called once in two micro-batches, and finishes what backward left."""

    def __init__(self) -> None:
        super().__init__(accumulate=2)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss / 2)
        if index % 2 == 1:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def fit(module: Module, out, resume=None, epochs: int = 1, **changes) -> Module:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=out, **quiet, **changes)
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None), ckpt_path=resume)
    return module


def plain(accumulate: int = 1, clip: float | None = None) -> tuple[nn.Module, list[float]]:
    """A loop without Lightning."""
    model = network()
    optimizer = optimizer_for(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=BATCHES)
    losses = []
    for index, batch in enumerate(data()):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model, losses


def assert_same(module: Module, reference: tuple[nn.Module, list[float]], atol: float = 0.0) -> None:
    model, losses = reference
    assert module.losses == pytest.approx(losses, rel=0, abs=atol)
    for (name, p), q in zip(module.network.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)


def test_automatic_optimization_is_the_plain_loop(tmp_path):
    module = fit(Module(), tmp_path, enable_checkpointing=False)
    assert_same(module, plain())
    assert module.losses[-1] < module.losses[0]


def test_accumulation_and_clipping_are_those_of_the_plain_loop(tmp_path):
    module = fit(Module(), tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.3, enable_checkpointing=False)
    assert_same(module, plain(accumulate=2, clip=0.3), atol=1e-6)


def test_manual_optimization_is_the_plain_loop(tmp_path):
    assert_same(fit(Manual(), tmp_path, enable_checkpointing=False), plain(accumulate=2, clip=0.3), atol=1e-6)


def test_a_checkpoint_resumes_to_the_bit(tmp_path):
    straight = fit(Module(), tmp_path, epochs=2, enable_checkpointing=False)
    saved = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="half")
    fit(Module(), tmp_path, callbacks=[saved])
    resumed = fit(Module(), tmp_path, resume=tmp_path / "half.ckpt", epochs=2, enable_checkpointing=False)
    assert resumed.losses == straight.losses[BATCHES:]
    for (name, p), q in zip(straight.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_updates_in_backward_in_automatic_optimization_keep_no_gradients(tmp_path):
    module = fit(InBackward(), tmp_path, enable_checkpointing=False)
    assert_same(module, plain())
    assert module.gradients == []
    assert not module.handle.active


def test_updates_in_backward_with_accumulation_in_manual_optimization(tmp_path):
    module = fit(ManualInBackward(), tmp_path, enable_checkpointing=False)
    assert module.losses[-1] < module.losses[0]
    # But for the first bases, which come from the first micro-batch alone.
    assert module.losses[:2] == plain(accumulate=2)[1][:2]
    assert module.losses == pytest.approx(plain(accumulate=2)[1], rel=0.05)
    assert all(p.grad is None for p in module.network.parameters())


def test_updates_in_backward_with_lightnings_accumulation(tmp_path):
    module = fit(InBackward(accumulate=2), tmp_path, accumulate_grad_batches=2, enable_checkpointing=False)
    manual = fit(ManualInBackward(), tmp_path, enable_checkpointing=False)
    assert_same(module, (manual.network, manual.losses), atol=1e-6)
    assert module.gradients == []
