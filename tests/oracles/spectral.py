"""Sparse Spectral Training in float64, from its equations and the dense gradient G = ∂L/∂W, which the package never makes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, float], Tensor]


class Adam:
    """AdamW's change of one parameter, with the state of that parameter."""

    def __init__(self, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.lr, self.weight_decay, self.betas, self.count = lr, weight_decay, betas, 0
        self.first = self.second = 0.0

    def __call__(self, value: Tensor, grad: Tensor, share: float) -> Tensor:
        """The new value; `share` multiplies the learning rate."""
        self.count += 1
        b1, b2 = self.betas
        self.first = b1 * self.first + (1 - b1) * grad
        self.second = b2 * self.second + (1 - b2) * grad * grad
        mean, square = self.first / (1 - b1**self.count), self.second / (1 - b2**self.count)
        lr = share * self.lr
        return value * (1 - lr * self.weight_decay) - lr * mean / (square.sqrt() + 1e-8)


class SGD:
    """Plain gradient descent."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, value: Tensor, grad: Tensor, share: float) -> Tensor:
        return value - share * self.lr * grad


class DenseSpectral:
    """One weight as U Σ Vᵀ: `step` takes its dense gradient.

    Args:
        weight: where it starts.
        active: the triplets whose vectors are trained, in descending order of Σ.
        make: kind of parameter ("sigma", "vectors") → its optimizer.
    """

    def __init__(self, weight: Tensor, active: Iterable[int], make: Callable[[str], Step]) -> None:
        self.make = make
        self.decompose(weight)
        self.draw(active)

    @property
    def weight(self) -> Tensor:
        return self.u @ torch.diag(self.sigma) @ self.v.mT

    def decompose(self, weight: Tensor) -> None:
        self.u, self.sigma, right = torch.linalg.svd(weight, full_matrices=False)
        self.v = right.mT
        self.on_sigma = self.make("sigma")

    def draw(self, active: Iterable[int]) -> None:
        self.active = list(active)
        self.on_u, self.on_v = self.make("vectors"), self.make("vectors")

    def step(
        self,
        grad: Tensor,
        *,
        share: float = 1.0,
        share_sigma: float = 1.0,
        enhanced: bool = True,
        tangent: bool = False,
    ) -> None:
        own = self.active
        u, v = self.u[:, own], self.v[:, own]
        of_sigma = torch.stack([self.u[:, i] @ grad @ self.v[:, i] for i in range(len(self.sigma))])
        of_u, of_v = grad @ v, grad.mT @ u
        if not enhanced:
            of_u, of_v = of_u * self.sigma[own], of_v * self.sigma[own]
        if tangent:
            of_u = torch.stack([g - w * (w @ g) for w, g in zip(u.mT, of_u.mT, strict=True)], 1)
            of_v = torch.stack([g - w * (w @ g) for w, g in zip(v.mT, of_v.mT, strict=True)], 1)
        self.sigma = self.on_sigma(self.sigma, of_sigma, share_sigma).clamp(min=0)
        u, v = self.on_u(u, of_u, share), self.on_v(v, of_v, share)
        self.u[:, own] = u / u.square().sum(0).sqrt()
        self.v[:, own] = v / v.square().sum(0).sqrt()
