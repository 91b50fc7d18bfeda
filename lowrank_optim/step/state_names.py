"""Names in the optimizer's state and groups that several parts read: where they are kept, and how long."""

STEP_STATE = {
    **dict.fromkeys(("step", "last_refresh", "gap", "overlaps", "micro_batches"), "host"),
    **dict.fromkeys(("master", "weight_error", "weight_error_low"), "param"),
    "grad_sum": "param",
    "col_scale": "column scale",
}
"""Where the state of the step itself lies: "host" is read by the host in every step, and kept on the CPU."""

WEIGHT_ERROR = ("weight_error", "weight_error_low")
"""What rounding drops from bfloat16 weights (`kernels.WeightError`)."""

ACCUMULATORS = ("grad_sum", "projected_sum", "sketch_sum", "squares_sum", "micro_batches")
"""State that a parameter has only between two micro-batches of one step."""

MEASURED = "grad_norms"
"""Key of the first param group: the norm of the last step's gradient and the last finite one, a tensor of two."""
