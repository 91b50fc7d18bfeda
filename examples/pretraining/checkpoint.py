"""A checkpoint is one file, written so that there is a whole one at any moment."""

import os
import random
from pathlib import Path
from typing import Any

import torch

from pretraining.folder import TEMPORARY


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file beside its place, push it to the disk, then put it in place in one step."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "nt":  # folders cannot be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Tensors and plain containers only: nothing in the file is executed. A tensor is read when it is copied, but on Windows."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")


def random_state() -> dict[str, Any]:
    """The states of the generators that a run uses."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
