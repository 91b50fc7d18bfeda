"""A training step on tensors without numbers, and the memory that it takes."""
