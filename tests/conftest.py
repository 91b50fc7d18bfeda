"""Shared set-up: one thread per test worker, so that `pytest -n` does not make processes fight for cores."""

import os
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-value",
        action="store_true",
        help="run only as many cases of a test as it takes for each value of each parameter to appear (no product of values)",
    )


def adds_a_value(item: pytest.Item, seen: set[tuple[str, str, int]]) -> bool:
    """Whether this case has a value of a parameter that no case of this test had before; `seen` is brought up to date."""
    callspec: Any = getattr(item, "callspec", None)
    if callspec is None:
        return True
    test = item.nodeid.partition("[")[0]
    new = {(test, name, id(value)) for name, value in callspec.params.items()} - seen
    seen |= new
    return bool(new)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("each_value"):
        seen: set[tuple[str, str, int]] = set()
        kept = [item for item in items if adds_a_value(item, seen)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    # Files with long tests come first, so that no worker has one left when the others have nothing.
    long = {
        item.path for item in items if {"long", "slow"} & set(item.keywords) or item.path.parent.name == "distributed"
    }
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))
