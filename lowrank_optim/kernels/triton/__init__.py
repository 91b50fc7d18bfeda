"""Backend "triton": every operation as a Triton kernel, for CUDA (ROCm, XPU) tensors, or for CPU tensors under Triton's interpreter.

The interpreter is there where TRITON_INTERPRET=1 was in the environment before triton was imported; it is for tests. float64, empty
tensors and blocks of odd shapes are left to the definitions.
"""

import os
from importlib import import_module

import torch

from lowrank_optim.kernels.dispatch import Loaded, Unavailable

MODULES = ("elementwise", "folded", "coded", "products", "sparse")


def load() -> Loaded:
    try:
        triton = import_module("triton")
        runtime = import_module("triton.runtime.jit")
    except ImportError as error:
        raise Unavailable(f"triton cannot be imported ({error}); it comes with CUDA builds of torch.") from error
    modules = [import_module(f"{__name__}.{name}") for name in MODULES]
    operations = {name: operation for module in modules for name, operation in module.OPERATIONS.items()}
    interpreted = not isinstance(modules[0].adam_direct_kernel, runtime.JITFunction)
    if interpreted:
        return Loaded(frozenset({"cpu"}), operations, f"triton {triton.__version__}, interpreted")
    devices = {name for name in ("cuda", "xpu") if hasattr(torch, name) and getattr(torch, name).is_available()}
    if not devices:
        asked = os.environ.get("TRITON_INTERPRET") == "1"
        hint = "; TRITON_INTERPRET=1 was set after triton was imported" if asked else ""
        raise Unavailable(f"triton {triton.__version__} is here, but no GPU{hint}.")
    return Loaded(frozenset(devices), operations, f"triton {triton.__version__}")
