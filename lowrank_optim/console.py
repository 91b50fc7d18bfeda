"""Printing on consoles that lack characters: cp1252, cp932, ASCII, pipes on Windows.

A command calls `accept_any_text` before it prints. Characters that the stream's encoding lacks are then spelled with plain ones
(→ as >, … as three dots) instead of raising UnicodeEncodeError; a stream of UTF-8 is written as before.

What functions return for users to print, and what goes to logs, is ASCII in the source: the package does not know where it ends, and
processes compare `describe`.
"""

import codecs
import sys
from io import TextIOWrapper

SPELLED = {
    "×": "x",
    "→": ">",
    "↑": "^",
    "✗": "x",
    "─": "-",
    "–": "-",
    "−": "-",
    "·": "*",
    "…": "...",
    "÷": "/",
    "±": "+-",
    "≈": "~",
    "≥": ">=",
    "≤": "<=",
    "²": "^2",
    "√": "sqrt ",
    "‖": "||",
    "⊙": "*",
    "µ": "u",
    "α": "alpha",
    "β": "beta",
    "ε": "eps",
    "ρ": "rho",
    "φ": "phi",
}
"""What is written for a character that the encoding lacks; characters that tables are drawn with keep their width."""

ERRORS = "lowrank_optim.spelled"
"""The name of the error handler, for `errors=` of `str.encode` and of streams."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(
        SPELLED.get(char) or char.encode("ascii", "backslashreplace").decode() for char in lacking
    ), error.end


codecs.register_error(ERRORS, _spell)


def accept_any_text() -> None:
    """Let stdout and stderr spell what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a notebook's stream, or none at all, has nothing to set
            stream.reconfigure(errors=ERRORS)
