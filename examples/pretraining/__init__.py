"""Parts of examples/pretrain.py: model sizes, text, the output folder, checkpoints, the training run, and its reports."""

import os

# Before torch is imported, for that is when OpenMP reads it. Threads that wait for each other sleep instead of spinning: next to
# other busy processes a step on two cores is about ten times faster, and the numbers stay the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
