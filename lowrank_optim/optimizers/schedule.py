"""When a subspace is refreshed: a pure function of the step, so that nothing but the step has to be saved."""


def stagger_offset(ordinal: int, count: int, gap: int) -> int:
    """How many steps before a multiple of the gap the low-rank parameter number `ordinal` of `count` is refreshed: in [0, gap)."""
    return ordinal * gap // max(count, 1)


def latest_refresh(step: int, gap: int, offset: int) -> int:
    """The last step at or before `step` (counted from 0) for which a refresh is scheduled.

    Refreshes are scheduled for step 0, when every parameter needs its first basis, and for all later steps s with
    s + offset ≡ 0 (mod gap). A refresh is due while the last successful one is older than the last scheduled one; so one that fails
    is tried again on the next step.
    """
    return max(step - (step + offset) % gap, 0)
