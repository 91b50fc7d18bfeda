"""One trained parameter, as hooks see it: project its gradient, step it, ask for its subspace."""

from dataclasses import dataclass

from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import Basis
from lowrank_optim.step.batching import Step, alone
from lowrank_optim.step.dense import dense_step
from lowrank_optim.step.low_rank import low_rank_step
from lowrank_optim.step.param_step import ParamStep
from lowrank_optim.step.refresh import refresh_if_due


@dataclass
class TrainedParam(ParamStep):
    """What `LowRankOptimizer.trained` returns; it is good for one step."""

    def begin(self, norm: Tensor | None = None, squares: Tensor | None = None) -> Step:
        """The step from the gradient in `param.grad`, not yet run.

        `norm`, where it is known already, is finite where the gradient is; of a sharded parameter, it is that of the whole. `squares`
        are those of its lines (`Rule.lines_to_measure`).
        """
        self.squares = squares
        return dense_step(self, norm) if self.plan.space is None else low_rank_step(self, norm)

    @kernels.no_autograd_no_autocast
    def step(self, norm: Tensor | None = None) -> None:
        """Update the parameter from the gradient in `param.grad`."""
        alone(self.begin(norm))

    @kernels.no_autograd_no_autocast
    def step_projected(self, reduced: Tensor) -> None:
        """Update a matrix from R alone, in the subspace that stands; for residuals that use no more of the gradient."""
        alone(low_rank_step(self, reduced=reduced))

    @kernels.no_autograd_no_autocast
    def project(self) -> tuple[Tensor, Basis, Tensor]:
        """G, its subspace (the one that stands, or a new one where one is due) and R, for the gradient of a matrix."""
        grad = self.local_grad()
        if self.refresh_is_due:
            with self:
                refresh_if_due(self, grad, None)
        basis = self.basis()
        return grad, basis, basis.project(grad)
