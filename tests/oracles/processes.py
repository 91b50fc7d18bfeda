"""Processes of the tests, forked from a server that has imported torch once; an interpreter of its own takes seconds to import it.

All of one worker share the server, and with it the seed of Python's hashes. `checkpoints.in_fresh_process` has another.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED_ONCE = [
    "lowrank_optim",
    *(f"lowrank_optim.kernels.cpu.{name}" for name in ("code_operations", "operations", "pair_operations")),
    *(f"lowrank_optim.kernels.torch.{name}" for name in ("coded_adam", "sparse")),
    *(f"lowrank_optim.kernels.triton.{name}" for name in ("coded", "elementwise", "folded", "products", "sparse")),
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
]
"""What tests import, and what is imported within functions: by torch (`torch._dynamo`, most of a second), and backends."""


def preload() -> None:
    """Tell the server what to import; without effect once it runs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)


def _run(output: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In the child: what it prints goes to a file; it ends with the status of a script."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 1
    try:
        function(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Child:
    """`function(*arguments)` in a process; what it prints is in a file."""

    def __init__(self, output: Path, function: Callable[..., None], *arguments: Any) -> None:
        preload()
        self.output = output
        context = multiprocessing.get_context("forkserver")
        self.process: BaseProcess = context.Process(target=_run, args=(str(output), function, arguments))
        self.process.start()

    def finish(self, seconds: float = 300.0) -> str:
        """What it printed; it has to end well."""
        self.process.join(seconds)
        said = self.output.read_text(encoding="utf-8")
        assert self.process.exitcode == 0, said
        return said

    def kill_when(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        """SIGKILL as soon as the condition holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.is_alive() and not condition():
            time.sleep(0.01)
        self.process.kill()
        self.process.join()
