"""Backend "cpu": the C++ library of csrc/cpu, called through ctypes.

`library` finds and checks it, `operations` are the kernels.
"""

from lowrank_optim.kernels.cpu.library import open_library
from lowrank_optim.kernels.cpu.operations import Operations, many, operations
from lowrank_optim.kernels.dispatch import Loaded


def load() -> Loaded:
    """The backend; raises `Unavailable` where the library is not there or not ours."""
    library = open_library()
    ops, about = Operations(library), f"{library.simd}; {library.build_info}; {library.path}"
    return Loaded(frozenset({"cpu"}), operations(ops), about, many(ops))
