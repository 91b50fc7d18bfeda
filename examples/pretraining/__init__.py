"""Parts of examples/pretrain.py: model sizes, text, checkpoints, the training run, and its reports."""
