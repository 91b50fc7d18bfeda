"""What a device takes beyond the bytes of tensors: rounding, segments, context. All sizes in bytes.

`peak_bytes` of a plan is what `torch.cuda.max_memory_allocated` would say: every tensor rounded up to `CUDA_BLOCK`, and cuBLAS's
workspace. A limit (`torch.cuda.set_per_process_memory_fraction`) counts whole segments instead, which `reserved_peak` finds by
running the caching allocator's rules over the same sequence of allocations. The card itself holds the context besides.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30

CUDA_BLOCK = 512
"""The caching allocator rounds every allocation up to this (c10/cuda/CUDACachingAllocator: kMinBlockSize)."""

CUDA_CONTEXT = 512 * MIB
"""The driver's context with the kernels of torch loaded: 300 to 550 MiB on consumer and data-centre cards; outside of torch's
allocator, so that neither `max_memory_allocated` nor a memory fraction sees it."""

CUBLAS_WORKSPACE = 32 * MIB + 128 * 1024
"""Workspace that torch allocates for cuBLAS on the first matrix product: 8.1 MiB before Hopper, 32 MiB since; the larger one."""

SMALL, SMALL_SEGMENT = MIB, 2 * MIB  # allocations up to SMALL share segments of SMALL_SEGMENT
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB  # below MEDIUM they come from segments of MEDIUM_SEGMENT
LARGE_ROUND = 2 * MIB  # larger ones get segments of their own, rounded up to this


@dataclass(frozen=True)
class Rules:
    """How a device's allocator counts.

    block: allocations are rounded up to a multiple of this.
    context: taken once by the process, outside of the allocator.
    workspace: allocated once inside it by the libraries.
    """

    block: int
    context: int
    workspace: int


def rules_for(device_type: str) -> Rules:
    """The rules of a device: those above for accelerators, exact bytes for the CPU."""
    return Rules(1, 0, 0) if device_type == "cpu" else Rules(CUDA_BLOCK, CUDA_CONTEXT, CUBLAS_WORKSPACE)


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "900MiB", or a plain number of bytes.

    Raises:
        ValueError: it is none of these, or not positive.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("24GB")
        (1610612736, 24000000000)
    """
    units = {"": 1, "b": 1} | {f"{p}ib": 2 ** (10 * i) for i, p in enumerate("kmgt", 1)}
    units |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {p: 2 ** (10 * i) for i, p in enumerate("kmgt", 1)}
    stripped = text.replace(" ", "").replace("_", "").lower()
    number = stripped.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        size = int(float(number) * units[stripped[len(number) :]])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ValueError(f"{text!r} is no size: write a number and a unit, such as 24GiB, 16GiB or 900MiB")
    return size


def format_bytes(size: float) -> str:
    """Bytes for a person: "13.48 GiB", "24 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if size == int(size) else f"{size:.2f} {unit}"
        size /= 1024
    return ""


class _Pool:
    """Free blocks of one size class, best fit first; a block that is split leaves the rest, neighbours merge when they are free."""

    def __init__(self, split_above: int) -> None:
        self.split_above = split_above
        self.free: list[tuple[int, int]] = []  # (size, address)
        self.size_at: dict[int, int] = {}  # of free blocks, by address
        self.ends: dict[int, int] = {}  # end → address of free blocks
        self.bounds: dict[int, int] = {}  # address → end of segments

    def take(self, size: int) -> tuple[int, int] | None:
        """Address and size of a block of at least `size`, no longer free; None where there is none."""
        at = bisect_left(self.free, (size, 0))
        if at == len(self.free):
            return None
        found, address = self.free[at]
        self._remove(found, address)
        if found - size > self.split_above:
            self._add(found - size, address + size)
            found = size
        return address, found

    def give(self, address: int, size: int) -> None:
        """Return a block, merged with free neighbours of its segment."""
        end = address + size
        if (follower := self.size_at.get(end)) is not None:
            self._remove(follower, end)
            size += follower
        if (before := self.ends.get(address)) is not None:
            previous = self.size_at[before]
            self._remove(previous, before)
            address, size = before, size + previous
        self._add(size, address)

    def release(self) -> int:
        """Give whole free segments back to the device; returns their bytes."""
        whole = [(size, a) for size, a in self.free if self.bounds.get(a) == a + size]
        for size, address in whole:
            self._remove(size, address)
            del self.bounds[address]
        return sum(size for size, _ in whole)

    def _add(self, size: int, address: int) -> None:
        insort(self.free, (size, address))
        self.size_at[address], self.ends[address + size] = size, address

    def _remove(self, size: int, address: int) -> None:
        del self.free[bisect_left(self.free, (size, address))]
        del self.size_at[address], self.ends[address + size]


def reserved_peak(events: Iterable[tuple[int, int]], limit: int | None = None) -> int:
    """Largest number of bytes in segments of CUDA's caching allocator over a sequence of allocations.

    Args:
        events: (identity, size) in order; an identity that comes a second time is freed.
        limit: where a new segment would pass it, unused segments are given back first, as the allocator does.

    Returns:
        The peak; above `limit` where the allocator would have raised an out-of-memory error (it goes on here).
    """
    pools = {False: _Pool(CUDA_BLOCK - 1), True: _Pool(SMALL)}
    live: dict[int, tuple[bool, int, int]] = {}
    reserved = peak = 0
    top = 0
    for identity, size in events:
        if identity in live:
            large, address, taken = live.pop(identity)
            pools[large].give(address, taken)
            continue
        size = max(-(-size // CUDA_BLOCK) * CUDA_BLOCK, CUDA_BLOCK)
        large = size > SMALL
        pool = pools[large]
        found = pool.take(size)
        if found is None:
            segment = (
                SMALL_SEGMENT
                if not large
                else MEDIUM_SEGMENT
                if size < MEDIUM
                else -(-size // LARGE_ROUND) * LARGE_ROUND
            )
            if limit is not None and reserved + segment > limit:
                reserved -= pools[True].release() + pools[False].release()
            reserved += segment
            peak = max(peak, reserved)
            pool.bounds[top] = top + segment
            pool.give(top, segment)
            top += segment + LARGE_ROUND  # a gap, so that segments are never neighbours
            found = pool.take(size)
            assert found is not None
        live[identity] = (large, *found)
    return peak
