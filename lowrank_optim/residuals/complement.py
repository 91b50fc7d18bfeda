"""Alice's residual: the gradient outside the subspace, every channel in units of its own running size there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors import GradientTerm, SubspaceSpec
from lowrank_optim.residuals.base import ResidualInput, Update
from lowrank_optim.residuals.scaled import Limited, growth_of, outside_squares


@dataclass(frozen=True)
class ComplementScaled(Limited):
    """The gradient outside the subspace, every row (or column) divided by its root mean square there (Alice).

        p_j ← β p_j + (1−β) ‖g_j − P r_j‖²,   C_j = √(d−r) (g_j − P r_j) / √p_j
        W ← (1 − ηλ) W − η α (lift(N) + α_c C / ℓ)

    g_j is a row of tall matrices and a column of wide ones, d its length, r the rank. In the d − r dimensions that the subspace
    leaves C has elements of size 1, as Adam's N has. ℓ ≥ 1 keeps ‖C‖ from growing by more than the factor `limiter` in a step. With
    ‖g_j − P r_j‖² = ‖g_j‖² − ‖r_j‖² no m×n matrix is formed. Where that is rounding only, C_j is 0: it would be divided by its own
    size.

    p_j begins with the first ‖g_j − P r_j‖² above 0. `match_reference` begins with 0, as in the paper, where C is √(1/(1−β)) too long
    in the first step, and the limiter remembers that.

    Public implementations (pytorch_optimizer before 4.1) took the elementwise product with a matrix that is 0 off its diagonal for
    the product with Diag(p)^(−1/2), which leaves one element of each channel. They also fill the subspace from a QR decomposition,
    where the paper samples the complement: `RandomizedSVD(explore="complement")`.

    Args:
        limiter: γ, the largest growth of ‖C‖ in a step; None does not limit.
        complement_scale: α_c, how much C counts beside N.
        complement_beta: β, the decay rate of p; None takes the first of the rule's `betas`, 0.9 for rules that have none.

    Memory: 4 bytes for each row of R (8 in float64), and one number for each matrix.

    Paper: Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a Low-Rank Extension",
    ICLR 2026, arXiv:2502.07752.
    """

    name: ClassVar[str] = "complement_scaled"
    needs_orthonormal: ClassVar[bool] = True
    state_lies: ClassVar[Mapping[str, str]] = {**Limited.state_lies, "complement_power": "rows"}
    complement_scale: float = 0.4
    complement_beta: float | None = None

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not options["complement_scale"] >= 0.0:
            raise ValueError(f"complement_scale is {options['complement_scale']!r}; it must be at least 0")
        if options["complement_beta"] is not None and not 0.0 <= options["complement_beta"] < 1.0:
            raise ValueError(f"complement_beta is {options['complement_beta']!r}; it must be None or in [0, 1)")

    def init(self, space: SubspaceSpec, device: torch.device) -> dict[str, Tensor]:
        shape = space.sharding.sharding_of("rows", space.side).local_shape(space.reduced_shape[:-1])
        return {
            **super().init(space, device),
            "complement_power": torch.zeros(shape, dtype=space.dtype, device=device),
        }

    def sums(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        assert step.squares is not None
        outside = outside_squares(step)
        noise = 64.0 * torch.finfo(step.space.dtype).eps
        outside = torch.where(outside > noise * step.squares, outside, 0.0)
        before = state["complement_power"].unsqueeze(-1).to(outside.dtype)
        beta = options["complement_beta"]
        power = torch.lerp(outside, before, float(options.get("betas", (0.9,))[0] if beta is None else beta))
        if not options["match_reference"]:
            power = torch.where(before > 0, power, outside)
        # Dimensions outside: none at full rank, where φ is 0.
        length = (step.space.basis_rows - step.space.rank) ** 0.5
        phi = torch.where((power > 0) & (outside > 0), power.rsqrt().mul_(length), 0.0)
        step.kept.update(power=power.squeeze(-1), phi=phi)
        return phi.square().mul_(outside).double().sum((-2, -1))[None]

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        assert step.sums is not None
        power, phi = step.kept["power"], step.kept["phi"]
        last = state["complement_power"]
        last.copy_(power if step.ok is None else torch.where(step.ok, power, last))
        norm = step.sums[0].sqrt().to(phi.dtype)
        phi = phi / growth_of(norm, state, options, step.ok) * (float(options["complement_scale"]) * step.unit)
        core = torch.addcmul(step.direction, phi, step.projected, value=-1.0)
        return Update(core, options["scale"], GradientTerm(step.grad, phi, step.ok, by_channel=True))
