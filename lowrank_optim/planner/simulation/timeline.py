"""What was in memory when: the record of a simulated run, and what it says of its peak. Pure bookkeeping, no torch.

A run is a sequence of events: a block is made, or freed. What a block is (weight, gradient, state) is often known only later, so
kinds are written onto blocks at any time, and questions are answered when the run is over.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

KINDS = ("weights", "gradients", "optimizer_state", "activations", "temporaries")
PARTS = ("moments", "basis", "scales", "other")
"""Parts of the optimizer state."""


@dataclass(slots=True, eq=False)
class Block:
    """One allocation.

    owner: the layer or parameter that it belongs to.
    kind: one of `KINDS`, or "" while nobody has claimed it; then it is an activation if it was made by a forward pass (or its
        repetition in a checkpointed backward) and outlived it, else a temporary.
    part: of optimizer state: "moments", "basis", "scales" or "other".
    rows: the first dimension of a weight, gradient or state tensor that FSDP splits; 0 where every process keeps all of it.
    """

    size: int
    owner: str
    in_forward: bool
    kind: str = ""
    part: str = ""
    rows: int = 0
    outlived: bool = True

    @property
    def resolved(self) -> str:
        return self.kind or ("activations" if self.in_forward and self.outlived else "temporaries")

    def share(self, world_size: int) -> int:
        """Bytes on the first of `world_size` processes: ⌈rows/world_size⌉ of the rows where they are split."""
        if not self.rows or world_size == 1:
            return self.size
        return self.size // self.rows * -(-self.rows // world_size)

    def rounded_share(self, granule: int, world_size: int) -> int:
        """`share`, rounded up to a multiple of `granule`."""
        return -(-self.share(world_size) // granule) * granule


@dataclass(frozen=True, slots=True)
class Moment:
    """When something happens: which step, which pass of it, in which layer."""

    step: str
    phase: str
    layer: str

    def __str__(self) -> str:
        return f"{self.step}, {self.phase}" + (f" of {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class Snapshot:
    """The bytes of one moment by kind, by part of the state, and by owner and kind."""

    kinds: dict[str, int]
    parts: dict[str, int]
    owners: dict[str, dict[str, int]]


@dataclass
class Timeline:
    """Events in order: (block, made or freed, moment).

    The questions take `granule`, to a multiple of which sizes are rounded up, and `world_size`, the processes that split weights,
    gradients and state.
    """

    events: list[tuple[Block, bool, Moment]] = field(default_factory=list)

    def totals(self, granule: int, world_size: int = 1) -> Iterator[tuple[int, int]]:
        """(index of the event, bytes in memory after it)."""
        now = 0
        for index, (block, made, _) in enumerate(self.events):
            size = block.rounded_share(granule, world_size)
            now += size if made else -size
            yield index, now

    def peaks(self, granule: int, world_size: int = 1) -> dict[Moment, tuple[int, int]]:
        """For every step, pass and layer, the most bytes in memory and the event after which that was so."""
        peaks: dict[Moment, tuple[int, int]] = {}
        for index, now in self.totals(granule, world_size):
            moment = self.events[index][2]
            if moment.step and now > peaks.get(moment, (-1, 0))[0]:
                peaks[moment] = (now, index)
        return peaks

    def snapshot(self, index: int, granule: int, world_size: int = 1) -> Snapshot:
        """What is in memory after the event."""
        live: set[Block] = set()
        for block, made, _ in self.events[: index + 1]:
            (live.add if made else live.discard)(block)
        kinds, parts = dict.fromkeys(KINDS, 0), dict.fromkeys(PARTS, 0)
        owners: dict[str, dict[str, int]] = {}
        for block in live:
            size, kind = block.rounded_share(granule, world_size), block.resolved
            kinds[kind] += size
            if kind == "optimizer_state":
                parts[block.part or "other"] += size
            owners.setdefault(block.owner, dict.fromkeys(KINDS, 0))[kind] += size
        return Snapshot(kinds, parts, owners)

    def kinds_at(self, indices: Iterable[int], granule: int, world_size: int = 1) -> dict[int, dict[str, int]]:
        """Bytes by kind after each of some events."""
        wanted, found, now = set(indices), {}, dict.fromkeys(KINDS, 0)
        for index, (block, made, _) in enumerate(self.events):
            size = block.rounded_share(granule, world_size)
            now[block.resolved] += size if made else -size
            if index in wanted:
                found[index] = dict(now)
        return found

    def allocations(self, world_size: int = 1) -> Iterator[tuple[int, int]]:
        """(identity, size) of every event in order, as `allocator.reserved_peak` takes them; a freed block has size 0 there.

        Without what was freed while building: a model may be built elsewhere, and its blocks are not the training's.
        """
        gone = {
            block for block, made, moment in self.events if not made and not moment.step and moment.phase == "building"
        }
        return ((id(block), block.share(world_size)) for block, _, _ in self.events if block not in gone)
