"""Which layers are trained in which period: pure functions of a seed and the number of the period.

Nothing here holds state or looks at torch's generators, so that every process and every resumed run draws the same.
"""

import math
from collections.abc import Sequence

import torch

from lowrank_optim.kernels.counter_rng import PURPOSE_LAYERS, choose, make_key, random_bits, uniform
from lowrank_optim.kernels.host import cpu_tensor

ORDERS = ("random", "ascending", "descending", "fixed")

_CPU = torch.device("cpu")


def draw_layers(
    seed: int, period: int, population: int, count: int, weights: Sequence[float] | None = None
) -> list[int]:
    """`count` distinct positions below `population` for the period of this number, ascending.

    Without weights every set is as probable as any other. With weights the positions are drawn one after another, each with a
    probability ∝ its weight among those that are left: the `count` first in a race of exponential clocks with these rates.

    Raises:
        ValueError: a weight is negative or not finite, or fewer than `count` are positive.
    """
    key = make_key(seed, 0, period, PURPOSE_LAYERS)
    if weights is None:
        return [int(i) for i in choose(key, population, count, _CPU)]
    if len(weights) != population or not all(0.0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"the weights of the layers are {[float(f'{weight:.4g}') for weight in weights]}; they must be {population} finite "
            "numbers of at least 0"
        )
    times = [
        -math.log(u) / weight if weight > 0.0 else math.inf
        for u, weight in zip(uniform(key, (population,), _CPU, torch.float64).tolist(), weights, strict=True)
    ]
    if sum(time < math.inf for time in times) < count:
        raise ValueError(
            f"only {sum(weight > 0.0 for weight in weights)} layers have a positive weight, {count} are drawn"
        )
    return sorted(sorted(range(population), key=times.__getitem__)[:count])


def block_of_visit(order: str, visit: int, population: int, start: int | None, seed: int) -> int:
    """The position of the block that is trained in visit number `visit`, from 0.

    "ascending" and "descending" go round from `start` (first; last); "fixed" stays at it (first). "random" is a new permutation for
    each round of all blocks, of which the first begins at `start` if there is one.
    """
    if order == "fixed":
        return start or 0
    if order == "ascending":
        return ((start or 0) + visit) % population
    if order == "descending":
        return ((population - 1 if start is None else start) - visit) % population
    cycle, position = divmod(visit, population)
    key = make_key(seed, 1, cycle, PURPOSE_LAYERS)
    permutation: list[int] = random_bits(key, cpu_tensor(range(population), torch.int64)).argsort(stable=True).tolist()
    if cycle == 0 and start is not None:
        permutation.remove(start)
        permutation.insert(0, start)
    return permutation[position]
