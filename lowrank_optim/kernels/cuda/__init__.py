"""Backend "cuda": the library of csrc/cuda, called through ctypes: what is done element by element and block by block of codes.

`build` compiles it, `library` finds and checks it, `operations` are the kernels. Matrix products are left to the definitions, which
call cuBLAS.
"""

import torch

from lowrank_optim.kernels.cuda.library import open_library
from lowrank_optim.kernels.cuda.operations import many, operations
from lowrank_optim.kernels.dispatch import Loaded, Unavailable


def load() -> Loaded:
    """The backend; raises `Unavailable` where the library is not there or not ours, or there is no CUDA device."""
    library = open_library()
    if not library.on_host and not (torch.cuda.is_available() and torch.version.cuda):
        raise Unavailable(f"{library.path} is there, but no CUDA device.")
    device = "cpu" if library.on_host else "cuda"
    return Loaded(frozenset({device}), operations(library), f"{library.build_info}; {library.path}", many(library))
