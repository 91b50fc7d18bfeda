"""The peak of a deep model from two shallow ones, and of long batches from two short ones.

The layers of a transformer are equal, so at a given point of a step (the forward pass of the last layer, say) the bytes in memory are
linear in the number of layers, and, with attention that keeps no scores, in the number of tokens and in the rank. Between points the
maximum changes hands, so every point is extrapolated for itself, and the largest is the peak. Points are the moments of the timeline,
with layers counted from both ends: layers in between lie between them, as what is in memory changes evenly from layer to layer.

Exact where layers are equal; `tests/planner/test_planner_prediction.py` compares it with full simulations.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lowrank_optim.planner.simulation import sharding
from lowrank_optim.planner.simulation.allocator import Rules
from lowrank_optim.planner.simulation.simulate import Run
from lowrank_optim.planner.simulation.timeline import KINDS, Moment

Point = tuple[str, str, str]
"""(step, pass, layer), repeated layers as "+0", "+1" (from the first) or "-1" (from the last)."""


@dataclass(frozen=True)
class Probe:
    """Bytes at every point of one simulated run, in total and by kind."""

    totals: dict[Point, float]
    kinds: dict[Point, dict[str, float]]
    state: float

    def combine(self, other: "Probe", factor: float) -> "Probe":
        """self + factor·(other − self), point by point, for points that both have."""

        def mixed(a: float, b: float) -> float:
            return a + factor * (b - a)

        points = self.totals.keys() & other.totals.keys()
        return Probe(
            {p: mixed(self.totals[p], other.totals[p]) for p in points},
            {p: {k: mixed(self.kinds[p][k], other.kinds[p][k]) for k in KINDS} for p in points},
            mixed(self.state, other.state),
        )

    @property
    def peak(self) -> tuple[Point, float]:
        """The point at which most is in memory, and its bytes."""
        return max(self.totals.items(), key=lambda item: item[1])


def probe(run: Run, rules: Rules, layers: int, depth: int, world_size: int = 1, fsdp: bool = False) -> Probe:
    """What one run says of every point; `depth` layers from either end are points of their own."""
    split = world_size if fsdp else 1
    extra = sharding.overhead(run.parameters, world_size, fsdp)
    fixed = {"gradients": extra["gradients"], "temporaries": extra["temporaries"] + rules.workspace}
    totals: dict[Point, float] = {}
    at: dict[Point, int] = {}
    for moment, (size, index) in run.timeline.peaks(rules.block, split).items():
        point = point_of(moment, layers, depth)
        if size + sum(fixed.values()) > totals.get(point, -1.0):
            totals[point], at[point] = size + sum(fixed.values()), index
    snapshots = run.timeline.kinds_at(sorted(at.values()), rules.block, split)
    kinds = {point: {k: snapshots[index][k] + fixed.get(k, 0) for k in KINDS} for point, index in at.items()}
    return Probe(totals, {point: dict(sizes) for point, sizes in kinds.items()}, float(sum(run.state.values())))


def point_of(moment: Moment, layers: int, depth: int) -> Point:
    """The point that a moment belongs to, in a model with this many repeated layers."""
    head, _, last = moment.layer.rpartition(".")
    if not last.isdigit():
        return (moment.step, moment.phase, moment.layer)
    number = int(last)
    name = f"+{number}" if number < depth else f"-{layers - number}" if layers - number <= depth else "between"
    return (moment.step, moment.phase, f"{head}.{name}")


def deep(
    run_with: Callable[[int], Run], rules: Rules, layers: int, depth: int, world_size: int = 1, fsdp: bool = False
) -> Probe:
    """The probe of a model with `layers` layers, from runs with 2·depth and one more (from one of its own where that is less)."""
    few = 2 * depth
    if layers <= few + 1:
        return probe(run_with(layers), rules, layers, depth, world_size, fsdp)
    small, large = (probe(run_with(n), rules, n, depth, world_size, fsdp) for n in (few, few + 1))
    return small.combine(large, float(layers - few))
