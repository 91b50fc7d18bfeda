"""SaRA's masked variant in float64 with numpy: AdamW on all of W, of which the entries outside of the mask are put back."""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def masked_adamw(
    weight: Array,
    gradient: Callable[[int, Array], Array],
    steps: int,
    *,
    threshold: float,
    shrink_at: int | None = None,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Array, list[Array], Array, Array]:
    """W after the steps, the mask of each step, and both moments.

    `gradient(step, W)` is asked once a step. The mask is [|W| < threshold] at first; in step number `shrink_at` (from 0), what has
    grown leaves it.
    """
    weight, masks = weight.astype(np.float64).copy(), []
    mask = np.abs(weight) < threshold
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(steps):
        if step == shrink_at:
            mask = mask & (np.abs(weight) < threshold)
        masks.append(mask)
        grad = gradient(step, weight)
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        bc1, bc2 = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
        new = weight * (1 - lr * weight_decay) - lr * (m / bc1) / (np.sqrt(v / bc2) + eps)
        weight = np.where(mask, new, weight)
    return weight, masks, m, v
