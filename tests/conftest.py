"""Shared set-up: one thread per test worker, so that `pytest -n` does not make processes fight for cores."""

import math
import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=("all", "pairs", "values"),
        default="all",
        help="of a test with several parametrizations: the whole product, each pair of values, or each value of a parameter once",
    )


def is_product(names: list[str], rows: Sequence[Any]) -> bool:
    """Whether the cases of one parametrization are most of the product of their values, and not a list of chosen ones."""
    if len(names) == 1:
        return True
    values = [getattr(row, "values", row) for row in rows]
    size = math.prod(len({id(row[place]) for row in values}) for place in range(len(names)))
    return 2 * len(rows) >= size


def factors(item: pytest.Item) -> list[tuple[str, object]]:
    """What a case of a test is chosen by, each with its value: parameters, and lists of chosen cases as one."""
    callspec: Any = getattr(item, "callspec", None)
    if callspec is None:
        return []
    found: list[tuple[str, object]] = []
    left = {name: id(value) for name, value in callspec.params.items()}
    for mark in item.iter_markers("parametrize"):
        given = mark.args[0]
        names = given.replace(" ", "").split(",") if isinstance(given, str) else list(given)
        own = [(name, left.pop(name)) for name in names if name in left]
        found += own if is_product(names, mark.args[1]) else [(",".join(names), tuple(own))]
    return [*found, *left.items()]


def needed(item: pytest.Item, cases: str) -> set[object]:
    """What this case has and some case of its test must have: its values, or pairs of them, or just itself."""
    callspec: Any = getattr(item, "callspec", None)
    test = item.nodeid.partition("[")[0]
    if callspec is None:
        return {item.nodeid}
    if cases == "values":
        return {(test, name, id(value)) for name, value in callspec.params.items()}
    own = factors(item)
    if len(own) <= 2 or item.path.parent.name == "kernels":  # where three values together decide which loop runs
        return {item.nodeid}
    return {(test, *pair) for pair in combinations(own, 2)}


def chosen(items: Sequence[pytest.Item], cases: str) -> set[pytest.Item]:
    """A few cases that have all that is needed: first those with the most that no other one has yet."""
    left = {item: needed(item, cases) for item in items if not item.get_closest_marker("full")}
    kept, seen = set(), set[object]()
    for most in range(max(map(len, left.values()), default=0), 0, -1):
        for item, own in left.items():
            if len(own - seen) >= most:
                kept.add(item)
                seen |= own
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (cases := config.getoption("cases")) != "all":
        kept = chosen(items, cases)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
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
