"""Building the library of csrc/cuda.

    python -m lowrank_optim.kernels.cuda.build [--output DIRECTORY]

compiles it with nvcc for the GPUs of TARGETS (and as PTX, for newer ones) into this directory, or another. It needs a checkout: the
sources are not in a wheel. This file imports nothing but the standard library, so that a build without torch can load it by its path.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NAME = "liblowrank_optim_cuda.so"
"""As in `library`."""

SOURCE = Path(__file__).parents[3] / "csrc" / "cuda"
TARGETS = (80, 86, 89, 90)
"""Compute capabilities that get code of their own."""

# Every operation is rounded as the definitions say.
NVCC_FLAGS = (
    "-std=c++17 -O3 --fmad=false -prec-div=true -prec-sqrt=true -ftz=false -Xcompiler -fPIC,-fvisibility=hidden"
)
HOST_FLAGS = "-std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off -fPIC -fvisibility=hidden -x c++"


class NotBuilt(RuntimeError):
    """Why there is no library."""


def build(output_dir: Path = HERE, targets: tuple[int, ...] = TARGETS) -> Path:
    """Compile for the device; returns the library's path.

    Raises:
        NotBuilt: there are no sources or no nvcc, or nvcc fails.
    """
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    newest = max(targets)
    ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
    return _compile("nvcc", [*NVCC_FLAGS.split(), *codes, ptx, "-t", "0"], output_dir / NAME)


def build_for_host(output_dir: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile the same functions for the CPU, loops in place of threads: what the tests check where there is no device."""
    return _compile("g++", [*HOST_FLAGS.split(), *flags], output_dir / NAME.replace("cuda", "cuda_host"))


def _compile(compiler: str, flags: list[str], target: Path) -> Path:
    """Compile and link to `target`, which appears whole or not at all."""
    source = SOURCE / "abi.cu"
    if not source.exists():
        raise NotBuilt(f"there is no {source}: building needs a checkout.")
    if shutil.which(compiler) is None:
        raise NotBuilt(f"there is no {compiler} on the path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *flags, "-shared", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise NotBuilt(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()[:2000]}")
        made.replace(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CUDA library of lowrank_optim.")
    parser.add_argument("--output", type=Path, default=HERE, help="directory (default: where the package looks for it)")
    try:
        path = build(parser.parse_args().output)
    except NotBuilt as why:
        sys.stderr.write(f"{why}\n")
        return 1
    sys.stdout.buffer.write(os.fsencode(f"{path}\n"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
