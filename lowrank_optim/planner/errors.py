"""The planner's only exception."""


class PlanError(ValueError):
    """Nothing can be planned with what was given; the message says what to change."""
