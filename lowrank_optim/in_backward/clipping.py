"""Clipping where no gradient of another parameter is known: factors that stay on the device, and the record of the norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

CLIPS = ("previous", "tensor", "subspace")


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """min(1, limit/‖G‖), 0-d, as `torch.nn.utils.clip_grad_norm_` computes it."""
    return (limit / (norm + 1e-6)).clamp_max(1.0)


def on_device(number: Tensor, device: torch.device) -> Tensor:
    """A number on another device. Only an accelerator may get it later: the host would read what has not arrived yet."""
    return number.to(device, non_blocking=device.type != "cpu")


def scale_(tensor: Tensor, factor: Tensor | None, wait: bool) -> None:
    """Multiply in place. `wait` says that the host may look at the factor, and leave out a pass that changes nothing."""
    if factor is not None and not (wait and float(factor) == 1.0):
        tensor.mul_(on_device(factor, tensor.device))


def record_norms(norms: Sequence[Tensor], before: Tensor | None) -> Tensor:
    """The norm of a step from the norms of its parameters, and the last finite one; nothing waits.

    Args:
        norms: ‖G‖ of every parameter, 0-d, at least one.
        before: the record of the step before.
    """
    first = norms[0]
    total = torch.linalg.vector_norm(torch.stack([norm.to(first.device, first.dtype) for norm in norms]))
    finite = torch.full_like(total, torch.nan) if before is None else before[1].to(total.device, total.dtype)
    return torch.stack([total, torch.where(torch.isfinite(total), total, finite)])
