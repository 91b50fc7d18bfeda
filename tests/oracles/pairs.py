"""Methods for pairs of factors, written from their equations for one pair in float64, each in the form of its paper.

Where the package keeps no bases, takes Gram matrices and turns moments at the end of a step, these keep orthonormal bases from a QR
decomposition and turn at the start of the next; where it never forms G, these solve the least-squares problem for it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(A, B) → (g_A, g_B)."""


def golden_pair() -> tuple[Tensor, Tensor]:
    """A (2×8) and B (6×2)."""
    a = torch.tensor(
        [[0.2 * math.sin(0.9 * i + 0.4 * j + 0.1) for j in range(8)] for i in range(2)], dtype=torch.float64
    )
    b = torch.tensor([[0.1 * math.cos(1.3 * i + 0.7 * k) for k in range(2)] for i in range(6)], dtype=torch.float64)
    return a, b


def golden_data() -> tuple[Tensor, Tensor]:
    """Two inputs (2×8) and their targets (2×6)."""
    x = torch.tensor([[math.sin(0.37 * (t + 1) * (j + 2)) for j in range(8)] for t in range(2)], dtype=torch.float64)
    y = torch.tensor([[math.cos(0.3 * t + 0.5 * i) for i in range(6)] for t in range(2)], dtype=torch.float64)
    return x, y


def golden_weight() -> Tensor:
    """W₀ (6×8)."""
    return torch.tensor([[math.cos(i + 2 * j + 0.3 * i * j) for j in range(8)] for i in range(6)], dtype=torch.float64)


def golden_loss(a: Tensor, b: Tensor, scaling: float = 2.0) -> Tensor:
    """Of a linear layer of 8 to 6 with an adapter, on two inputs."""
    x, y = golden_data()
    return 0.5 * (x @ (golden_weight() + scaling * b @ a).mT - y).square().sum() / 12.0


def _inverse_root(matrix: Tensor, shift: float, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    roots = (values.clamp_min(0.0) + shift).sqrt() + eps
    counts = values + shift > matrix.shape[0] * torch.finfo(torch.float64).eps * (values[-1] + shift)
    return vectors @ torch.diag(torch.where(counts, 1.0 / roots, 0.0)) @ vectors.mT


def rite(
    a: Tensor,
    b: Tensor,
    gradients: Gradients,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    escape: bool = False,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """LoRA-RITE with stored orthonormal bases."""
    rank = a.shape[0]
    tall = [a.mT.clone(), b.clone()]  # A's side, B's side
    moment = [torch.zeros(rank, rank, dtype=a.dtype) for _ in tall]
    momentum = [torch.zeros_like(each) for each in tall]
    old = [torch.zeros_like(tall[1]), torch.zeros_like(tall[0])]  # Q of the dual side
    floor = [0.0, 0.0]
    for t in range(1, steps + 1):
        grad_a, grad_b = gradients(tall[0].mT, tall[1])
        factors = [torch.linalg.qr(each) for each in tall]
        decayed = [beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas]
        changes = []
        for side, grad in enumerate((grad_a.mT, grad_b)):
            q, r = factors[1 - side]
            seen = grad @ torch.linalg.pinv(r)
            turn = q.mT @ old[side]
            before, after = moment[side], turn @ moment[side] @ turn.mT
            if escape:
                lost = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh((after + after.mT) / 2)
                lost = min(max(float(lost.max()), 0.0), max(float((before - after).trace()), 0.0))
                floor[side] = decayed[1] * (floor[side] + lost)
            moment[side] = decayed[1] * after + (1 - decayed[1]) * seen.mT @ seen / len(grad)
            scaled = seen @ _inverse_root(moment[side], floor[side], eps)
            momentum[side] = decayed[0] * momentum[side] @ turn.mT + (1 - decayed[0]) * scaled
            old[side] = q
            changes.append(momentum[side] @ torch.linalg.pinv(r).mT)
        tall = [(1 - lr * decay) * each - lr * change for each, change in zip(tall, changes, strict=True)]
    return tall[0].mT.contiguous(), tall[1]


def lora_pro_changes(a: Tensor, b: Tensor, grad: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The (γ_A, γ_B) with the least ‖s(Bγ_A + γ_B A) − G‖, and of those the nearest to (sBᵀG, sGAᵀ), by dense least squares."""
    rank, n = a.shape
    m = b.shape[0]
    eye_m, eye_n = torch.eye(m, dtype=a.dtype), torch.eye(n, dtype=a.dtype)
    # row-major: vec(B γ_A) = (B ⊗ I) vec γ_A, vec(γ_B A) = (I ⊗ Aᵀ) vec γ_B
    system = scaling * torch.cat([torch.kron(b, eye_n), torch.kron(eye_m, a.mT.contiguous())], 1)
    near = torch.cat([(scaling * b.mT @ grad).flatten(), (scaling * grad @ a.mT).flatten()])
    step = torch.linalg.pinv(system) @ (grad.flatten() - system @ near)
    found = near + step
    return found[: rank * n].view(rank, n), found[rank * n :].view(m, rank)


def lora_pro(
    a: Tensor,
    b: Tensor,
    gradient: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
    scaling: float,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """LoRA-Pro from the gradient G of the whole matrix; `full` puts Adam on its projection between."""
    first, second = (torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype) for _ in range(2))
    for t in range(1, steps + 1):
        grad = gradient(a, b)
        if full:
            onto_b, onto_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
            projected = onto_b @ grad + (grad - onto_b @ grad) @ onto_a
            first, second = 0.9 * first + 0.1 * projected, 0.999 * second + 0.001 * projected.square()
            grad = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        change_a, change_b = lora_pro_changes(a, b, grad, scaling)
        a, b = a - lr * change_a, b - lr * change_b
    return a, b


def altlora(
    a: Tensor,
    b: Tensor,
    gradients: Gradients,
    steps: int,
    lr: float,
    scaling: float,
    beta: float = 0.9,
    plus: bool = False,
) -> tuple[Tensor, Tensor]:
    """AltLoRA with the other factor stored beside each momentum; `plus` divides by Adam's root of running squares."""
    momentum, known = [torch.zeros_like(a), torch.zeros_like(b)], [b.clone(), a.clone()]
    squares = [torch.zeros_like(a), torch.zeros_like(b)]
    turns = [0, 0]

    def moved(side: int, grad: Tensor) -> Tensor:
        step = momentum[side] / (1 - beta ** turns[side])
        if not plus:
            return step
        squares[side] = 0.999 * squares[side] + 0.001 * grad.square()
        return step / ((squares[side] / (1 - 0.999 ** turns[side])).sqrt() + 1e-8)

    for t in range(1, steps + 1):
        grad_a, grad_b = gradients(a, b)
        if t % 2:
            inverse = torch.linalg.pinv(a @ a.mT)
            projected = grad_b @ inverse / scaling**2
            momentum[1] = beta * momentum[1] @ known[1] @ a.mT @ inverse + (1 - beta) * projected
            known[1], turns[1] = a.clone(), turns[1] + 1
            b = b - lr * moved(1, projected)
        else:
            inverse = torch.linalg.pinv(b.mT @ b)
            projected = inverse @ grad_a / scaling**2
            momentum[0] = beta * inverse @ b.mT @ known[0] @ momentum[0] + (1 - beta) * projected
            known[0], turns[0] = b.clone(), turns[0] + 1
            a = a - lr * moved(0, projected)
    return a, b
