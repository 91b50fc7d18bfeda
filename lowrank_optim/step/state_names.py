"""Names in the optimizer's state and groups that several parts read: where they are kept, and how long."""

HOST_STATE = ("step", "last_refresh", "gap", "overlaps", "turn", "micro_batches")
"""State that the host reads in every step, kept on the CPU wherever the parameter lives."""

ACCUMULATORS = ("grad_sum", "projected_sum", "sketch_sum", "squares_sum", "micro_batches")
"""State that a parameter has only between two micro-batches of one step."""

MEASURED = "grad_norms"
"""Key of the first param group: the norm of the last step's gradient and the last finite one, a tensor of two."""
