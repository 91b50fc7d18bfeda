"""Docstrings here have a section "Example:"; the reference knows "Examples:" and shows it as code."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads one heading as the other."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute that was found."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
