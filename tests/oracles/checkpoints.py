"""What tests of resumed runs share: a checkpoint through a file, and whether two runs ended on the same bits."""

import io
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def resume(saved: Optimizer, params: Iterable[Tensor], resumed: Optimizer, others: Iterable[Tensor]) -> None:
    """Give an optimizer and its parameters the state and weights of a saved one, by a file."""
    file = io.BytesIO()
    torch.save({"optimizer": saved.state_dict(), "weights": [param.detach() for param in params]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        for param, weight in zip(others, loaded["weights"], strict=True):
            param.copy_(weight)
    resumed.load_state_dict(loaded["optimizer"])


def assert_same_run(a: Optimizer, params: Iterable[Tensor], b: Optimizer, others: Iterable[Tensor]) -> None:
    """Weights, and state with its types, of two optimizers are equal to the bit; NaN equals NaN."""
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        assert a.state[param].keys() == b.state[other].keys()
        for name, value in a.state[param].items():
            assert value.dtype == b.state[other][name].dtype, name
            assert torch.equal(value.nan_to_num(-1.0), b.state[other][name].nan_to_num(-1.0)), name


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are then those of every machine and process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_fresh_process(module: str, function: str, *arguments: object) -> str:
    """What a call of a test module's function prints in a new interpreter of one thread, with hashes of its own.

    It has to end well. `arguments` are numbers, strings and paths.
    """
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path, PosixPath, WindowsPath; import torch; torch.set_num_threads(1)\n"
        f"from {module} import {function}; {function}(*{arguments!r})"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def resumed_runs(module: str, folder: Path, resumes: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """(options, checkpoint of the whole run, that of the run resumed in a fresh process) for each of `resumes`.

    `run_resumes(mode, folder)` of the test module writes them: mode "first" up to a checkpoint after 10 steps, "second" from there,
    "whole" without a break. Weights, groups and state are equal to the bit, as are the layers that were awake in each step.
    """
    run = sys.modules[module].run_resumes
    for mode in ("first", "whole"):
        with one_thread():
            run(mode, folder)
    in_fresh_process(module, "run_resumes", "second", folder)
    for number, options in enumerate(resumes):
        whole, resumed = (torch.load(folder / f"{mode}-{number}", weights_only=True) for mode in ("whole", "second"))
        assert resumed["awake"] == whole["awake"][10:]
        for name, tensor in whole["model"].items():
            assert torch.equal(tensor, resumed["model"][name]), (options, name)
        assert whole["optimizer"]["param_groups"] == resumed["optimizer"]["param_groups"]
        assert whole["optimizer"]["state"].keys() == resumed["optimizer"]["state"].keys()
        for key, state in whole["optimizer"]["state"].items():
            assert all(torch.equal(value, resumed["optimizer"]["state"][key][name]) for name, value in state.items())
        yield options, whole, resumed
