"""The build step that setuptools cannot express in pyproject.toml: csrc/cpu into one shared library beside the Python files.

The library is no Python extension (it is loaded through ctypes), so one file serves every Python and torch. The kernels
are compiled once for each instruction set. CXX, CXXFLAGS and LDFLAGS are those of the environment. Where there is no compiler, or it
fails, the package installs without the library; build.json in its place says why, and `lowrank-optim doctor` repeats it.
LOWRANK_OPTIM_BUILD_CPU=0 leaves the library out: the wheel is then pure, for every platform.
"""

import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCE = Path("csrc/cpu")
PACKAGE = Path("lowrank_optim/kernels/cpu")
LIBRARY, RECORD = "liblowrank_optim_cpu.so", "build.json"
CUDA_LIBRARY = "liblowrank_optim_cuda.so"

# Results are rounded as the definitions say: no contraction, and nothing of -ffast-math but the two flags that leave values alone.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
KERNELS = ("adam", "codes", "weights", "sparse", "pairs", "eigen", "rite")
SOURCES = [str(SOURCE / f"{name}.cpp") for name in KERNELS]
X86 = platform.machine().lower() in ("x86_64", "amd64")


class NotBuilt(Exception):
    """Why there is no library."""


def find_compiler() -> list[str]:
    """CXX, or the first C++ compiler on the path."""
    if os.name != "posix":
        raise NotBuilt(f"csrc/cpu is built with GCC or Clang, and this is {platform.system()}.")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NotBuilt(f"there is no C++ compiler (looked for {' '.join(chosen) or 'g++, c++, clang++'}).")


def run(command: list[str]) -> None:
    """Run a compiler; its errors are the reason if it fails."""
    logging.info("%s", shlex.join(command))
    try:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, errors="replace")
    except subprocess.CalledProcessError as error:
        message = (error.stderr or error.stdout or f"exit status {error.returncode}").strip()
        raise NotBuilt(f"`{shlex.join(command)}` failed: {message[:2000]}") from None
    except OSError as error:
        raise NotBuilt(f"`{command[0]}` could not be run: {error}.") from None


def build(target: Path) -> list[str]:
    """Compile and link the library to `target`, which appears whole or not at all; returns compiler and flags."""
    if os.environ.get("LOWRANK_OPTIM_BUILD_CPU", "1") == "0":
        raise NotBuilt("this package is for every platform, and has none (LOWRANK_OPTIM_BUILD_CPU=0).")
    compiler = find_compiler()
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    levels = LEVELS if X86 else {"baseline": []}
    shown = " ".join([*flags, *(f"[{name}: {' '.join(more)}]" for name, more in levels.items() if more)])
    common = [*flags, *(["-DLOWRANK_X86"] if X86 else [])]
    with tempfile.TemporaryDirectory() as scratch:
        objects = []

        def compile_one(source: str, name: str, *more: str) -> None:
            objects.append(f"{scratch}/{name}.o")
            run([*compiler, *common, *more, "-c", str(SOURCE / source), "-o", objects[-1]])

        for level, more in levels.items():
            for name in KERNELS:
                compile_one(f"{name}.cpp", f"{name}_{level}", f"-DLOWRANK_LEVEL={level}", *more)
        compile_one("pool.cpp", "pool")
        compile_one("abi_pairs.cpp", "abi_pairs")
        compile_one("abi.cpp", "abi", f'-DLOWRANK_FLAGS="{shown}"')
        linked = f"{scratch}/{LIBRARY}"
        run([*compiler, *flags, "-shared", "-o", linked, *objects, *shlex.split(os.environ.get("LDFLAGS", ""))])
        target.parent.mkdir(parents=True, exist_ok=True)
        near = target.with_suffix(f".{os.getpid()}.new")  # on the target's file system, where replacing is atomic
        shutil.copy(linked, near)
        near.replace(target)
    return [*compiler, *flags]


def build_cuda(directory: Path) -> None:
    """The library of csrc/cuda besides, where nvcc is on the path; LOWRANK_OPTIM_BUILD_CUDA=0 leaves it out (it takes a minute)."""
    if shutil.which("nvcc") is None or os.environ.get("LOWRANK_OPTIM_BUILD_CUDA", "1") == "0":
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "lowrank_optim/kernels/cuda/build.py"), "--output", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        logging.warning("lowrank_optim installs without its CUDA library: %s", done.stderr.strip())


class BuildLibrary(build_ext):
    """`build_ext`, for the one "extension" that is a plain shared library."""

    def run(self) -> None:
        directory = ROOT / PACKAGE if self.inplace else Path(self.build_lib).absolute() / PACKAGE
        library, record = directory / LIBRARY, directory / RECORD
        directory.mkdir(parents=True, exist_ok=True)
        try:
            result = {"command": build(library)}
        except NotBuilt as why:
            library.unlink(missing_ok=True)
            result = {"error": str(why)}
            self.warn(f"lowrank_optim installs without its C++ library: {why}")
        record.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        build_cuda(directory.parent / "cuda")

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / SOURCE).iterdir()) if path.is_file()]

    def get_outputs(self) -> list[str]:
        directory = Path(self.build_lib) / PACKAGE
        built = [directory / LIBRARY, directory / RECORD, directory.parent / "cuda" / CUDA_LIBRARY]
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        parts = {output: Path(output).relative_to(self.build_lib) for output in self.get_outputs()}
        return {output: str(part) for output, part in parts.items()} if self.inplace else {}


class Wheel(bdist_wheel):
    """A wheel for this platform and every Python 3 if the library is in it, else for every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_ext").build_lib).absolute() / PACKAGE / LIBRARY
        self.root_is_pure = not built.exists()
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(
    ext_modules=[Extension("lowrank_optim.kernels.cpu.library", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
