"""What the step of one parameter works on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.quantization import scale_is_due
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.rules import Rule
from lowrank_optim.sharding.dtensor import local
from lowrank_optim.sharding.param_sharding import HERE
from lowrank_optim.step.layout import Layout


@dataclass(frozen=True)
class Job:
    """One parameter in one step.

    state: the optimizer's state of the parameter, as it is stored.
    moments: the rule's tensors in the compute type: the state itself, or, where it is coded, decoded when they are asked for.
    """

    param: Tensor
    group: Mapping[str, Any]
    layout: Layout
    state: dict[str, Tensor]
    moments: dict[str, Tensor] | CodedMoments

    @property
    def weight(self) -> Tensor:
        """What is updated: the parameter, or its master copy where the state has one."""
        return self.state.get("master", local(self.param))

    @property
    def in_place(self) -> bool:
        """Whether an operation on the moments changes the state itself, so that nothing has to be coded after it."""
        return not isinstance(self.moments, CodedMoments) or self.moments.codes() is not None

    def fit_columns(self, grad: Tensor, rule: Rule, steps: int, ok: Tensor | None) -> None:
        """Measure the column scales of coded moments where that is due, `steps` steps after they began or changed their basis."""
        if not isinstance(self.moments, CodedMoments) or "col_scale" not in self.state or not scale_is_due(steps):
            return
        share, spread = rule.gradient_share(self.group), self.layout.shards.reduced
        rows = spread.sum(self.moments.row_sums(grad, share), -1)
        columns = spread.sum(self.moments.column_sums(grad, share, rows), -2)
        self.moments.rescale_(columns, int(self.state["step"]), ok)

    @contextmanager
    def whole(self, grad: Tensor) -> Iterator[tuple["Job", Tensor]]:
        """The job and the gradient with everything gathered, where the moments are kept whole although the weights are not."""
        weight, spread = self.weight, self.layout.shards.matrix
        dims = range(-weight.dim(), 0)
        gathered = spread.gather(weight, *dims)
        state = {name: tensor for name, tensor in self.state.items() if name != "master"}
        yield (
            replace(self, param=gathered, layout=replace(self.layout, shards=HERE), state=state),
            spread.gather(grad, *dims),
        )
        weight.copy_(spread.part(gathered))

    def dense_parts(
        self, grad: Tensor, elementwise: bool
    ) -> Iterator[tuple[Tensor, Tensor, Mapping[str, Tensor], int]]:
        """(weights, gradient, moments, position of the first element) of the whole parameter, or of chunks of it in order.

        Chunks where the rule treats every element for itself and all tensors lie in memory in the same order.
        """
        weight, first = self.weight, self.layout.shards.matrix.start
        moments = {name: tensor for name, tensor in self.moments.items() if tensor.shape == weight.shape}
        parted = elementwise and not hasattr(weight, "codes")  # of a quantised weight, parts would be copies
        if not parted or not all(tensor.is_contiguous() for tensor in (weight, grad, *moments.values())):
            yield weight, grad, self.moments, first
            return
        for chunk in kernels.row_chunks(weight.numel(), 1):
            parts = {name: tensor.view(-1)[chunk] for name, tensor in moments.items()}
            yield weight.view(-1)[chunk], grad.view(-1)[chunk], parts, first + chunk.start
