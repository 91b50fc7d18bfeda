"""What several processes change in the memory of one; formulas, not simulation.

FSDP2 splits every parameter along its first dimension, Shard(0): of W processes the first one has ⌈rows/W⌉ rows of each weight,
gradient and moment (`Block.share`), and of the bases that lie along the split side; other bases are on every process.

    per process    Σ ⌈rows/W⌉·(bytes of a row)    over weights, gradients, state
    besides        the weights of two layers (one computes, the next is fetched), the gradient of one before it is reduced,
                   and weights and gradients of all that is in no layer (embedding, head, final norm: the root group)

That is an upper bound of torch's own tensors: the optimizer's working copies count whole, and a device without streams gathers one
layer at a time. Buffers of messages under way come on top: gloo's and DDP's may be as large as the gradients.

DDP keeps everything on every process, and copies gradients into buckets: their bytes a second time.
"""

from collections.abc import Mapping


def overhead(parameters: Mapping[str, tuple[int, str, bool]], world_size: int, fsdp: bool) -> dict[str, int]:
    """Bytes that one of several processes needs besides its share: gathered weights, DDP's buckets.

    Args:
        parameters: (bytes, layer, whether it is trained) by name.
    """
    if world_size == 1:
        return {"gradients": 0, "temporaries": 0}
    if not fsdp:
        return {"gradients": sum(size for size, _, trained in parameters.values() if trained), "temporaries": 0}
    by_layer: dict[str, int] = {}
    for size, layer, _ in parameters.values():
        by_layer[layer] = by_layer.get(layer, 0) + size
    layers = [size for name, size in by_layer.items() if name.rpartition(".")[2].isdigit()]
    root = sum(by_layer.values()) - sum(layers)
    largest = max(layers, default=0)
    return {"gradients": largest + root, "temporaries": 2 * largest + root}
