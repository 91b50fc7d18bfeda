"""Names of parameters: patterns that match them, and short forms for tables and messages."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

Pattern: TypeAlias = str | re.Pattern[str]


def matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
    return pattern in name


def names_itself(pattern: Pattern, name: str) -> bool:
    """Whether a pattern contains (part of) the tensor's own name: `lm_head` of `model.lm_head.weight`, `A_log` of `mixer.A_log`."""
    parts = name.split(".")
    own = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    text = re.sub(r"\\[A-Za-z]", " ", pattern.pattern) if isinstance(pattern, re.Pattern) else pattern
    return any(word in own or own in word for word in re.findall(r"\w\w+", text))


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile, FSDP, checkpointing and DistributedDataParallel put into it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def star_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def collapse_names(names: list[str]) -> str:
    """One name for tensors whose names differ in numbers only: a number that varies becomes `*`."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts) + f" x{len(names)}"


def list_patterns(names: Iterable[str], limit: int = 12) -> str:
    """Names as a list, those that differ in numbers only as one."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(star_numbers(name), []).append(name)
    shown = [collapse_names(alike) for alike in by_pattern.values()]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is too long; both ends of a parameter name matter."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
