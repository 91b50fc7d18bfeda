"""DistributedDataParallel that sends R in place of G."""

import torch
from torch import Tensor, distributed

from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.sharding.agreement import check_lines, describe


class LowRankHook:
    """A communication hook that averages projected gradients: R, r/min(m, n) of the traffic of G.

    Between two refreshes, a matrix in a subspace is averaged as R = G B, and its gradient becomes lift(R): the same on all processes,
    and all that the method would have used of it, so that clipping, GradScaler and the optimizer's step work as ever. On its own
    refresh step a matrix is averaged whole (staggering makes those few in any one step), and so is every dense parameter.

        mean over processes of (G B) = (mean of G) B

    Args:
        optimizer: an optimizer of this package over the model's parameters, of a method that uses no more of the gradient than R:
            GaLore, or any with residual "none".
        process_group: the one that DistributedDataParallel was given; None for the default one.

    Raises:
        TypeError: the optimizer is not of this package.
        ValueError: the method needs the whole gradient; parameters are sharded; the processes have built different optimizers.

    Cost: besides the projection of the step itself, one of every gradient and one lift. Gradients of bfloat16 carry lift(R) in
    bfloat16, and R is sent in it.

    It is registered with the model:

        model = DistributedDataParallel(model)
        optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=128), lr=1e-2)
        model.register_comm_hook(None, LowRankHook(optimizer))
    """

    def __init__(self, optimizer: LowRankOptimizer, process_group: "distributed.ProcessGroup | None" = None) -> None:
        if not hasattr(optimizer, "trained"):
            raise TypeError(f"LowRankHook needs an optimizer of this package, got {type(optimizer).__name__}")
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        plans = [optimizer.plan_of(param) for param in self._params]
        for residual in {plan.residual for plan in plans if plan.space is not None and plan.residual.uses_gradient}:
            raise ValueError(
                f"residual={residual.name!r} ({type(optimizer).__name__}) needs the whole gradient in every step, of which "
                'only R would be averaged: use GaLoreAdamW (or residual "none"; error_feedback=False for LDAdamW), or '
                "DistributedDataParallel without this hook"
            )
        self.__name__ = self.__qualname__ = type(self).__name__  # DistributedDataParallel looks at both
        self._optimizer = optimizer
        group = process_group or distributed.group.WORLD
        if group is None:
            raise ValueError("LowRankHook needs a process group: call torch.distributed.init_process_group first")
        self._group: distributed.ProcessGroup = group
        for param, plan in zip(self._params, plans, strict=True):
            if hasattr(param, "device_mesh"):
                raise ValueError(
                    f"{plan.name} {tuple(param.shape)} is a DTensor; LowRankHook is for "
                    "DistributedDataParallel, and fully_shard with proj_type='right' sends no gradients of matrices at all"
                )
        device = self._params[0].device
        check_lines(describe(optimizer), [self._group], device)

    def __call__(self, state: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Average one bucket: its dense gradients as they are, those of matrices projected, in one message."""
        with torch.no_grad():
            buffer, world = bucket.buffer(), self._group.size()
            pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
            sent = [self._projected(param, grad) for param, grad in pairs]
            message = torch.cat([part.reshape(-1).to(buffer.dtype) for part in sent]).div_(world)
        work = distributed.all_reduce(message, group=self._group, async_op=True)
        assert work is not None

        @torch.no_grad()
        def receive(future: "torch.futures.Future[list[Tensor]]") -> Tensor:
            received: Tensor = future.value()[0]
            for (param, grad), part, mean in zip(
                pairs, sent, received.split([part.numel() for part in sent]), strict=True
            ):
                if part is grad:
                    grad.copy_(mean.view(grad.shape))
                else:
                    self._lift_(param, grad, mean.view(part.shape).to(part.dtype))
            whole: Tensor = buffer
            return whole

        return work.get_future().then(receive)  # type: ignore[no-any-return]

    def _projected(self, param: Tensor, grad: Tensor) -> Tensor:
        """What is sent of a gradient: R, or itself."""
        if not self._optimizer.is_trained(param):  # a stranger, or a layer that sleeps
            return grad
        trained = self._optimizer.trained(param)
        if trained.plan.space is None or trained.refresh_is_due:
            return grad
        return trained.basis().project(trained.plan.view(grad))

    def _lift_(self, param: Tensor, grad: Tensor, reduced: Tensor) -> None:
        """Make a gradient the one in the subspace that R is the projection of."""
        trained = self._optimizer.trained(param)
        view = trained.plan.view(grad)
        trained.basis().lift_(view, reduced)
        if view.data_ptr() != grad.data_ptr():  # a convolution whose strides allow no matrix view
            grad.copy_(view.view(grad.shape))
