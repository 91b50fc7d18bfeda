"""What happens when a gradient is not finite: the update of that parameter is masked out, counted, and warned of once.

Reading a flag costs nothing where the parameter lives on the CPU. On an accelerator it would make the host wait, so there the mask
stays on the device, and a total is copied back now and then without waiting.
"""

import warnings

import torch
from torch import Tensor

POLL_EVERY = 100
"""Steps between two looks at the counters of an accelerator."""


class SkippedUpdates:
    """Counters of masked updates by parameter. Diagnostic: not part of the state."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._warned = False
        self._pending: tuple[Tensor, torch.Event] | None = None
        self._steps = 0

    def add(self, name: str, skipped: Tensor) -> None:
        """Count one update of parameter `name` where the 0-d bool `skipped` is true."""
        if name not in self._counts:
            self._counts[name] = torch.zeros((), dtype=torch.int64, device=skipped.device)
        self._counts[name] += skipped

    def warn(self) -> None:
        """Warn, the first time."""
        if not self._warned:
            self._warned = True
            names = ", ".join(list(self.read())[:5])
            warnings.warn(
                f"skipped the update of {names}: the gradient holds NaN or infinity. The weights, moments and basis are as they "
                'were. Later ones are counted (optimizer.skipped_updates()) without a warning; on_nonfinite="raise" stops at the '
                "first one.",
                RuntimeWarning,
                stacklevel=4,
            )

    def poll(self) -> None:
        """Called once a step: look at accelerators' counters now and then, a copy behind, without waiting."""
        self._steps += 1
        if self._warned:
            return
        if self._pending is not None and self._pending[1].query():
            skipped, self._pending = int(self._pending[0]), None
            if skipped:
                self.warn()
        on_device = [count for count in self._counts.values() if count.device.type != "cpu"]
        if on_device and self._pending is None and self._steps % POLL_EVERY == 1:
            total = torch.empty((), dtype=torch.int64, pin_memory=True)
            total.copy_(torch.stack(on_device).sum(), non_blocking=True)
            event = torch.Event(on_device[0].device)
            event.record()
            self._pending = (total, event)

    def read(self) -> dict[str, int]:
        """Masked updates by parameter name, those with any; waits for the device."""
        counts = {name: int(count) for name, count in self._counts.items()}
        return {name: count for name, count in counts.items() if count}
