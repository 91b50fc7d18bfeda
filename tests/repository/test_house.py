"""The layout of the package: imports run down, never in a circle, and no file is too long to read.

The floors, from the ground: a module imports modules of its own floor and of those below it. Imports within functions and for type
checking count as all others.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lowrank_optim

ROOT = Path(lowrank_optim.__file__).parent
PACKAGE = ROOT.name

FLOORS: list[set[str]] = [
    {"kernels"},
    {"quantization", "sharding"},
    {"projectors", "rules"},
    {"residuals", "groups"},
    {"step", "nn", "adapters"},
    {"optimizers"},
    {"in_backward", "distributed"},
    {"planner", "integrations", "testing"},
]
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
TOP = len(FLOORS)
"""Above all floors: the files beside the folders, which name the public parts."""

LONGEST = 400
TABLES = {
    "kernels/cpu/operations.py",
    "kernels/cuda/operations.py",
    "kernels/schemas.py",
    "kernels/selftest.py",
    "kernels/triton/coded_kernels.py",
    "kernels/triton/products.py",
}
"""Tables of kernels: one entry after the other, as many lines as there are operations."""


def module_name(file: Path) -> str:
    """The name that a file of the package is imported by."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def floor(module: str) -> int:
    """The floor of a module."""
    _, *path = module.split(".")
    inside = bool(path) and (ROOT / path[0]).is_dir()
    return FLOOR_OF[path[0]] if inside else TOP


def imports(tree: ast.AST, package: str, modules: set[str]) -> Iterator[tuple[str, int]]:
    """The modules that a syntax tree imports, with the line; `package` is what relative imports start from.

    `from package import name` imports the module `package.name` where there is one, else the package.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in modules or source in modules:
                    yield (whole if whole in modules else source), node.lineno


@cache
def graph() -> dict[str, dict[str, int]]:
    """For each module the modules of the package that it imports, with the line of the first import."""
    found: dict[str, dict[str, int]] = {}
    for module, file in MODULES.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        lines: dict[str, int] = {}
        for target, line in imports(ast.parse(file.read_text(encoding="utf-8")), package, set(MODULES)):
            if target != module:
                lines.setdefault(target, line)
        found[module] = lines
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that each reach each other, of two and more."""
    reach = {module: reached(module, edges) for module in edges}
    found = {frozenset(other for other in reach[module] if module in reach[other]) for module in edges}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def reached(module: str, edges: dict[str, set[str]]) -> set[str]:
    """What a module imports, what that imports, and so on."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for target in edges[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def test_every_folder_has_a_floor():
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and any(folder.rglob("*.py"))}
    assert folders == set(FLOOR_OF)


def test_imports_run_down():
    up = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}, {floor(target) - floor(module)} floors up"
        for module, lines in graph().items()
        for target, line in lines.items()
        if floor(target) > floor(module) and target != PACKAGE
    ]
    assert not up, "\n".join(up)


def test_only_the_top_imports_the_package_itself():
    """`import lowrank_optim` within the package would be an import of everything above."""
    guilty = [module for module, lines in graph().items() if PACKAGE in lines and floor(module) < TOP]
    assert not guilty, "\n".join(guilty)


def test_no_modules_import_each_other():
    edges = {module: set(lines) for module, lines in graph().items()}
    assert not circles(edges), "\n".join(" ↔ ".join(circle) for circle in circles(edges))


def lengths() -> dict[str, int]:
    return {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in MODULES.values()
    }


def test_no_file_is_too_long():
    long = {name: lines for name, lines in lengths().items() if lines > LONGEST and name not in TABLES}
    assert not long, f"above {LONGEST} lines: {long}"


def test_the_excepted_tables_exist():
    assert set(lengths()) >= TABLES


# The walk itself, on sources that are known.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import p.a", {"p.a"}),
        ("import p.a as b, os", {"p.a"}),
        ("from p import a", {"p.a"}),
        ("from p import name", {"p"}),
        ("from p.a import f, g", {"p.a"}),
        ("from . import c", {"p.b.c"}),
        ("from .c import f", {"p.b.c"}),
        ("from .. import a", {"p.a"}),
        ("from ..a import f", {"p.a"}),
        ("def f():\n    from p.a import g", {"p.a"}),
        ("if TYPE_CHECKING:\n    import p.b.c", {"p.b.c"}),
        ("import other\nfrom other import p", set()),
    ],
)
def test_the_walk_finds_every_form_of_import(source, found):
    modules = {"p", "p.a", "p.b", "p.b.c"}
    assert {target for target, _ in imports(ast.parse(source), "p.b", modules)} == found


def test_the_walk_finds_circles_of_any_length():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}, "g": {"a"}}
    assert circles(edges) == [["a", "b", "c"], ["e", "f"]]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("kernels.api", 0),
        ("sharding.dtensor", 1),
        ("rules", 2),
        ("groups.layers", 3),
        ("nn", 4),
        ("adapters.pairs", 4),
        ("optimizers.base", 5),
        ("in_backward.hooks", 6),
        ("planner.models", 7),
        ("cli", TOP),
        ("doctor", TOP),
    ],
)
def test_the_floor_of_a_module(module, expected):
    assert floor(f"{PACKAGE}.{module}") == expected
