"""`make dist-check`: what lies in dist/ holds what it should, installs, and runs.

The two wheels are installed into new environments and run there with nothing on the path but the environment itself: no compiler. The
sdist is installed where there is one. torch is borrowed from the environment that runs this file.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
SMOKE = ROOT / "tests" / "smoke.py"
LIBRARY = "lowrank_optim/kernels/cpu/liblowrank_optim_cpu.so"
RECORD = "lowrank_optim/kernels/cpu/build.json"
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
"""Tracked files that no sdist needs."""


class Broken(Exception):
    """What is wrong with a package."""


def find(directory: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel of this platform, the pure wheel."""
    found = []
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_").partition("_")[2]
    for pattern in ("*.tar.gz", f"*-py3-none-manylinux*_{machine}.whl", "*-py3-none-any.whl"):
        files = sorted(directory.glob(pattern))
        if len(files) != 1:
            names = ", ".join(path.name for path in sorted(directory.glob("*"))) or "nothing"
            raise Broken(
                f"{directory} has {len(files)} files like {pattern}, and one is needed; it holds {names}. Run `make dist`."
            )
        found += files
    return found[0], found[1], found[2]


def tracked() -> list[str]:
    """The files of the repository that belong into an sdist."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.splitlines() if not name.startswith(LEFT_OUT)]


def check_sdist(sdist: Path, names: list[str]) -> None:
    """Every tracked file is in the sdist, and nothing that was built."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(set(names) - held):
        raise Broken(f"{sdist.name} lacks {', '.join(missing[:10])}: MANIFEST.in decides what goes in")
    if built := sorted(name for name in held if name.endswith((".so", ".pyc")) or name == RECORD):
        raise Broken(f"{sdist.name} holds what was built: {', '.join(built[:10])}")


def check_wheel(wheel: Path, library: bool, names: list[str]) -> None:
    """The package and its papers are in the wheel, nothing else, and the library exactly where its name says so."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = {PurePosixPath(name).name: name for name in held if ".dist-info/" in name}
        tags = re.findall(r"^Tag: (.*)$", archive.read(metadata["WHEEL"]).decode(), flags=re.MULTILINE)
        if not wheel.stem.endswith(tuple(tags)):
            raise Broken(f"{wheel.name} says of itself {', '.join(tags)}")
        if missing := {"LICENSE", "NOTICE", "METADATA", "entry_points.txt"} - metadata.keys():
            raise Broken(f"{wheel.name} lacks {', '.join(sorted(missing))}")
        package = {name for name in held if ".dist-info/" not in name}
        expected = (
            {name for name in names if name.startswith("lowrank_optim/")} | {RECORD} | ({LIBRARY} if library else set())
        )
        if package != expected:
            raise Broken(
                f"{wheel.name} lacks {', '.join(sorted(expected - package)) or 'nothing'} and has "
                f"{', '.join(sorted(package - expected)) or 'nothing'} besides"
            )
        if library:
            with tempfile.TemporaryDirectory() as scratch:
                check_glibc(wheel.name, needed_glibc(Path(archive.extract(LIBRARY, scratch))))
        if ("command" in json.loads(archive.read(RECORD))) is not library:
            raise Broken(f"{RECORD} of {wheel.name} does not say what is in it")


def needed_glibc(library: Path) -> tuple[int, int]:
    """The oldest glibc that has every symbol which the library asks for."""
    done = subprocess.run(["objdump", "-p", str(library)], check=True, capture_output=True, text=True)
    return newest_glibc(done.stdout)


def newest_glibc(dump: str) -> tuple[int, int]:
    """The newest version of glibc in the version references that objdump prints."""
    found = [(int(major), int(minor)) for major, minor in re.findall(r"\bGLIBC_(\d+)\.(\d+)", dump)]
    if not found:
        raise Broken("the library asks for no symbol of glibc: is it one for Linux?")
    return max(found)


def check_glibc(name: str, needed: tuple[int, int]) -> None:
    """The tag of the wheel promises no older glibc than the library needs."""
    promised = re.search(r"manylinux_(\d+)_(\d+)_", name)
    if promised is None or (int(promised[1]), int(promised[2])) < needed:
        raise Broken(f"{name} needs glibc {needed[0]}.{needed[1]}, and its tag promises to run on an older one")


class Environment:
    """A new virtual environment, with torch of the environment that runs this file and without its lowrank_optim."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = Path(
            sysconfig.get_path("purelib", "posix_prefix", vars={"base": str(folder), "platbase": str(folder)})
        )

    def borrow(self) -> None:
        """See the packages of the environment that runs this file; its .pth files, and so its editable installs, do not count."""
        (self.site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def install(self, package: Path, **variables: str) -> None:
        """Install a file, and nothing that it asks for."""
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        command += ["--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check", str(package)]
        subprocess.run(command, check=True, env={**os.environ, **variables}, cwd=self.bin)

    def try_out(self, *flags: str, path: str) -> None:
        """The smoke test and `lowrank-optim doctor`, with this PATH."""
        env = {"PATH": path, "HOME": str(self.bin), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        for command in ([str(self.python), "-I", str(SMOKE), *flags], [str(self.bin / "lowrank-optim"), "doctor"]):
            done = subprocess.run(command, env=env, cwd=self.bin, check=False, capture_output=True, text=True)
            if done.returncode:
                raise Broken(f"`{' '.join(command)}` failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
            print(f"  {done.stdout.strip().splitlines()[-1]}", flush=True)


def main() -> None:
    """Check all three, one after the other."""
    sdist, platform, pure = find(DIST)
    names = tracked()
    check_sdist(sdist, names)
    check_wheel(platform, True, names)
    check_wheel(pure, False, names)
    for package, flags in ((platform, ["--library"]), (pure, []), (sdist, ["--library"])):
        begun = time.perf_counter()
        print(package.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            environment = Environment(Path(folder))
            if package is sdist:
                environment.borrow()  # setuptools, too
                environment.install(
                    sdist, CXXFLAGS="-O0", LOWRANK_OPTIM_BUILD_CUDA="0"
                )  # what it needs, not how fast it is
                environment.try_out(*flags, path=os.environ["PATH"])
            else:
                environment.install(package)
                environment.borrow()
                environment.try_out(*flags, "--no-compiler", path=str(environment.bin))
        print(f"  {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Broken as why:
        sys.exit(f"dist-check: {why}")
