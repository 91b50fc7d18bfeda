"""An installed package at work, and nothing else of this repository: `python -I tests/smoke.py [--library] [--no-compiler]`.

Runs the first complete example of the README that the package brings, steps in backward, and a checkpoint. Exit status 1, with the
reason, if something is not as it should be. With `--library` the C++ library has to be there, else it must not; with `--no-compiler`
no compiler may be on the path.
"""

import contextlib
import io
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

import lowrank_optim as lo
from lowrank_optim.kernels import Loaded, dispatch

COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc")


def check(holds: bool, otherwise: str) -> None:
    """End with a reason, unless it holds."""
    if not holds:
        sys.exit(f"smoke test: {otherwise}")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def build() -> tuple[torch.nn.Module, lo.LowRankOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    return model, lo.GaLoreAdamW8bit(lo.param_groups(model, rank=16), lr=1e-2)


def main(library: bool) -> None:
    place = Path(lo.__file__).resolve()
    check(
        Path(sys.prefix).resolve() in place.parents, f"lowrank_optim was imported from {place}, outside of {sys.prefix}"
    )
    if "--no-compiler" in sys.argv:
        found = [name for name in COMPILERS if shutil.which(name)]
        check(not found, f"there are compilers on the path: {', '.join(found)}")
    backend = dispatch.backends()["cpu"]
    check(isinstance(backend, Loaded) is library, f"the C++ library: {backend}")
    check(library or "--no-binary lowrank-optim" in str(backend), f"the reason does not say what to do: {backend}")

    text = str(metadata.metadata("lowrank-optim").get_payload())  # the README
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "import torch" in code)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(example, {})

    model, optimizer = build()
    first = train(model, optimizer, 1)
    handle = lo.update_in_backward(optimizer)
    last = train(model, optimizer, 60)
    check(last < 0.7 * first, f"the loss went from {first} to {last}")
    handle.remove()
    other = build()[1]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    print(f"ok: {place.parent}, cpu backend {'loaded' if library else 'absent'}, loss {first:.3f} to {last:.3f}")


if __name__ == "__main__":
    main(library="--library" in sys.argv)
