"""Slow and obvious float64 versions of the methods, in numpy: the judges of the fast code.

Written from the papers' equations (and, for the `Released…` one, from those of the released code), without a line of the package.
One object holds the state of one matrix; `step(weight, grad)` returns the new weight and modifies nothing else. `lr` may be changed
between steps.

A subspace is a pair (left, right) of matrices with orthonormal columns, or None for a side that is not projected:

    project(G) = leftᵀ G right        lift(N) = left N rightᵀ        None is the identity

s counts the steps that have been taken before this one; the subspace is renewed at s = 0, T, 2T, … from the gradient of that step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# --- subspaces -----------------------------------------------------------------------------------------------------------------


def sides(proj_type: str, rows: int, cols: int) -> tuple[bool, bool]:
    """Whether (left, right) are projected. `std` takes the short side, and right where the matrix is square."""
    tall = rows >= cols
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


@dataclass
class Subspace:
    """A pair of bases; see the module."""

    left: Array | None
    right: Array | None

    def project(self, grad: Array) -> Array:
        if self.left is not None:
            grad = self.left.T @ grad
        if self.right is not None:
            grad = grad @ self.right
        return grad

    def lift(self, core: Array) -> Array:
        if self.left is not None:
            core = self.left @ core
        if self.right is not None:
            core = core @ self.right.T
        return core


def top_singular_vectors(grad: Array, rank: int, proj_type: str) -> Subspace:
    """The leading singular vectors of the gradient on the projected sides."""
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    left, right = sides(proj_type, *grad.shape)
    return Subspace(u[:, :rank] if left else None, vt[:rank].T if right else None)


def aligned(new: Subspace, old: Subspace) -> Subspace:
    """`new` with every basis vector flipped that points away from the old vector of its column."""

    def align(a: Array | None, b: Array | None) -> Array | None:
        if a is None or b is None:
            return None
        columns = [-x if x @ y < 0 else x for x, y in zip(a.T, b.T, strict=True)]
        return np.stack(columns, axis=1)

    return Subspace(align(new.left, old.left), align(new.right, old.right))


def carry(moment: Array, new: Subspace, old: Subspace, power: int = 1) -> Array:
    """A low-rank matrix in the coordinates of `old`, in those of `new`; entries of P_newᵀ P_old are raised to `power` first."""
    if new.left is not None:
        moment = (new.left.T @ old.left) ** power @ moment
    if new.right is not None:
        moment = moment @ (old.right.T @ new.right) ** power
    return moment


# --- AdamW ---------------------------------------------------------------------------------------------------------------------


@dataclass
class AdamW:
    """torch.optim.AdamW on a dense array: decay first, epsilon after the bias correction.

    W ← (1 − ηλ) W − η m̂ / (√v̂ + ε)
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    t: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0

    def direction(self, grad: Array) -> Array:
        """m̂ / (√v̂ + ε) after the moments have seen `grad`."""
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad**2
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)

    def step(self, weight: Array, grad: Array) -> Array:
        return (1 - self.lr * self.weight_decay) * weight - self.lr * self.direction(grad)

    def reset(self) -> None:
        """Forget the moments; bias correction starts again with them."""
        self.t, self.m, self.v = 0, 0.0, 0.0

    def rotate(self, new: Subspace, old: Subspace) -> None:
        """M' = C M,  V' = |(1−β₂ᵗ) [(C∘C)(V̂ − M̂∘M̂) + (C M̂)∘(C M̂)]|,  C = P_newᵀ P_old, t the steps taken so far (LDAdam)."""
        bc1, bc2 = 1 - self.betas[0] ** self.t, 1 - self.betas[1] ** self.t
        m_hat, v_hat = self.m / bc1, self.v / bc2
        self.m = carry(self.m, new, old)
        self.v = np.abs(bc2 * (carry(v_hat - m_hat**2, new, old, power=2) + carry(m_hat, new, old) ** 2))


# --- Adafactor -----------------------------------------------------------------------------------------------------------------


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


@dataclass
class Adafactor:
    """Adafactor on one matrix: factored second moment, clipped updates, steps relative to the size of the weights.

    t counts the steps of the second moment (a reset restarts it), `schedule_t` all steps, which the relative step size follows.
    """

    lr: float | None = None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    warmup_init: bool = False
    t: int = 0
    schedule_t: int = 0
    row: Array | float = 0.0
    col: Array | float = 0.0
    average: Array | float = 0.0

    def step_size(self, weight: Array) -> float:
        """[max(ε₂, RMS(W))] · (η, or min(10⁻² or 10⁻⁶ t, 1/√t) where no η is given)."""
        t = self.schedule_t
        size = self.lr if self.lr is not None else min(1e-6 * t if self.warmup_init else 1e-2, 1 / np.sqrt(t))
        return size * max(self.eps[1], rms(weight)) if self.scale_parameter else size

    def direction(self, grad: Array, size: float) -> Array:
        """The step (its size included) after the moments have seen `grad`."""
        self.t += 1
        beta2 = 1 - self.t**self.decay_rate
        square = grad**2 + self.eps[0]
        self.row = beta2 * self.row + (1 - beta2) * square.mean(axis=1)
        self.col = beta2 * self.col + (1 - beta2) * square.mean(axis=0)
        update = grad / np.sqrt(np.outer(self.row, self.col) / self.row.mean())
        update = size * update / max(1.0, rms(update) / self.clip_threshold)
        if self.beta1 is None:
            return update
        self.average = self.beta1 * self.average + (1 - self.beta1) * update
        return self.average

    def reset(self) -> None:
        self.t, self.row, self.col, self.average = 0, 0.0, 0.0, 0.0

    def rotate(self, new: Subspace, old: Subspace) -> None:
        """The average like any first moment; V by the squares of C, and factored again."""
        if self.beta1 is not None:
            self.average = carry(self.average, new, old)
        moved = carry(np.outer(self.row, self.col) / self.row.mean(), new, old, power=2)
        self.row, self.col = moved.mean(axis=1), moved.mean(axis=0)


# --- GaLore --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Projected:
    """What the projected optimizers share: the subspace and what happens to the moments when it is renewed."""

    rank: int
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    on_refresh: str = "keep"
    align_signs: bool = True
    s: int = 0
    subspace: Subspace | None = None

    def project(self, grad: Array, moments: AdamW | Adafactor) -> Array:
        """leftᵀ G right; on a refresh step the new subspace is used at once."""
        if self.s % self.update_proj_gap == 0:
            old, self.subspace = self.subspace, top_singular_vectors(grad, self.rank, self.proj_type)
            if old is not None:
                if self.align_signs:
                    self.subspace = aligned(self.subspace, old)
                if self.on_refresh == "reset":
                    moments.reset()
                elif self.on_refresh == "rotate":
                    moments.rotate(self.subspace, old)
        self.s += 1
        return self.subspace.project(grad)


@dataclass
class GaLoreAdamW(_Projected):
    """GaLore (Zhao et al., 2024) with the conventions of torch.optim.AdamW.

    W ← (1 − ηλ) W − η α lift(m̂ / (√v̂ + ε)),  moments of project(G)
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    moments: AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.moments = AdamW(betas=self.betas, eps=self.eps)

    def step(self, weight: Array, grad: Array) -> Array:
        direction = self.moments.direction(self.project(grad, self.moments))
        return (1 - self.lr * self.weight_decay) * weight - self.lr * self.scale * self.subspace.lift(direction)


@dataclass
class ReleasedGaLoreAdamW(_Projected):
    """GaLore as its released code computes it: ε on the uncorrected √v, decay of the weight that is already updated, free signs.

    W ← W − η √(1−β₂ᵗ)/(1−β₁ᵗ) α lift(m / (√v + ε));  W ← W − η λ W
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    align_signs: bool = False
    moments: AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.moments = AdamW(betas=self.betas)

    def step(self, weight: Array, grad: Array) -> Array:
        moments = self.moments
        moments.direction(self.project(grad, moments))
        direction = moments.m / (np.sqrt(moments.v) + self.eps)
        size = self.lr * np.sqrt(1 - self.betas[1] ** moments.t) / (1 - self.betas[0] ** moments.t)
        weight = weight - size * self.scale * self.subspace.lift(direction)
        return weight - self.lr * self.weight_decay * weight


@dataclass
class GaLoreAdafactor(_Projected):
    """Adafactor on the projected gradient: W ← (1 − λ ρ) W − α lift(step), ρ the step size."""

    moments: Adafactor = field(default_factory=Adafactor)

    def step(self, weight: Array, grad: Array) -> Array:
        projected = self.project(grad, self.moments)
        self.moments.schedule_t += 1
        size = self.moments.step_size(weight)
        update = self.moments.direction(projected, size)
        return (1 - self.moments.weight_decay * size) * weight - self.scale * self.subspace.lift(update)
