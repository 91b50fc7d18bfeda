"""The planner's only exception, and what its messages say of a name that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


class PlanError(ValueError):
    """Nothing can be planned with what was given; the message says what to change."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.4) -> str:
    """A question with the nearest of the known names, to stand before more words; empty where none is near."""
    near = get_close_matches(name, known, n=most, cutoff=cutoff)
    return f"did you mean {', '.join(near)}? " if near else ""
