"""The README's code runs as it stands."""

import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_complete_loop_runs_and_learns():
    code = next(block for block in BLOCKS if "manual_seed" in block and "GaLore" in block)
    scope: dict = {}
    exec(code, scope)
    assert scope["loss"].item() < 0.5
    assert "low-rank" in lo.describe(scope["groups"])


def test_the_lines_of_sltrain_convert_train_and_merge():
    (code,) = (block for block in BLOCKS if "sltrain_(" in block)
    before, _, merge = code.partition("lo.nn.merge_")
    scope: dict = {}
    exec(before, scope)
    assert scope["loss"].item() < 0.5
    model, x = scope["model"], scope["x"]
    assert isinstance(model[0], lo.nn.SparseLowRankLinear)
    expected = model(x)
    exec("lo.nn.merge_" + merge, scope)
    assert [type(module) for module in model] == [torch.nn.Linear, torch.nn.GELU, torch.nn.Linear]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_the_one_line_and_the_composed_methods_run():
    codes = [block for block in BLOCKS if "param_groups(model" in block and "manual_seed" not in block]
    codes = [block for block in codes if "register_comm_hook" not in block]
    assert len(codes) == 4
    for code in codes:
        model = torch.nn.Sequential(OrderedDict(qkv=torch.nn.Linear(256, 66), down=torch.nn.Linear(66, 256)))
        scope = {"lo": lo, "model": model}
        exec(code, scope)
        model(torch.randn(8, 256)).square().mean().backward()
        before = model[0].weight.detach().clone()
        scope["optimizer"].step()
        assert not torch.equal(model[0].weight, before)


def test_the_lines_of_the_ddp_hook_run(tmp_path):
    (code,) = (block for block in BLOCKS if "register_comm_hook" in block)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(256, 160), torch.nn.Linear(160, 256))
        scope = {"lo": lo, "model": model, "DistributedDataParallel": DistributedDataParallel}
        exec(code, scope)
        before = model[0].weight.detach().clone()
        scope["model"](torch.randn(8, 256)).square().mean().backward()
        scope["optimizer"].step()
        assert not torch.equal(model[0].weight, before)
    finally:
        torch.distributed.destroy_process_group()


def test_the_lines_that_save_gradients_run():
    codes = [block for block in BLOCKS if "sltrain_(" not in block]
    in_backward, layers = (block for block in codes if "update_in_backward(" in block or "layer_groups(" in block)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(6)))
    scope = {"lo": lo, "model": model, "optimizer": lo.GaLoreAdamW(lo.param_groups(model, rank=8), lr=1e-2)}
    exec(in_backward, scope)
    before = model[0][0].weight.detach().clone()
    for _ in range(4):
        model(torch.randn(8, 64)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
    scope["optimizer"].step()
    assert not torch.equal(model[0][0].weight, before)
    scope["handle"].remove()
    exec(layers, scope)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2


def test_every_name_of_the_readme_exists():
    for name in re.findall(r"\blo\.(\w+)", README):
        assert hasattr(lo, name), name
