"""`make matrix`: a part of the tests on several versions of Python and torch, each pair in an environment of its own.

The part: the files of AREAS without what is marked slow, and of each test as many cases as it takes for each value of each parameter
to appear once (`--cases values`). The results go to matrix.json beside this file and into the table of docs/development.md.
`make matrix MATRIX="3.12:2.11.0 3.13:2.14.1"` runs these pairs and leaves the results of the others as they are.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "matrix.json"
PAGE = ROOT / "docs" / "development.md"
BEGIN, END = "<!-- written by `make matrix` -->\n", "<!-- end -->\n"

PAIRS = ["3.10:2.8.0", "3.11:2.13.0", "3.12:2.11.0", "3.13:2.14.1", "3.14:2.14.1"]
"""Python and torch: the oldest of both, those of `make test`, some between, the newest."""

AREAS = {
    "steps, against references": (
        "test_step test_galore_reference test_apollo_reference test_frugal test_ldadam test_lisa test_badam test_directions"
    ),
    "resuming and checkpoints": "test_state test_migrations",
    "state of few bits": "test_coded_state test_quantization",
    "updates in backward": "test_in_backward",
    "quantized weights": "test_quantized_weights test_qgalore",
    "planner": "test_planner",
    "FSDP2 and its checkpoints on gloo": "test_fully_shard test_checkpoints",
    "transformers": "test_transformers_integration",
    "autocast, default device, torch.compile": "test_autocast test_default_device test_compile",
    "CPU, Triton (interpreted) and reference backends": "test_ops test_backends test_cpu_backend test_triton",
}
"""What is tested: names of files, wherever they lie under tests/."""

COLUMNS = ["python", "torch", "triton", "transformers", "numpy", "passed", "failed", "skipped", "date"]
VERSIONS = """
import importlib.metadata, json, platform
names = ["torch", "triton", "transformers", "numpy"]
print(json.dumps({"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}))
"""


def test_files() -> list[str]:
    """The files of AREAS; a name that no file or more than one has is an error."""
    files = []
    for name in " ".join(AREAS.values()).split():
        found = sorted((ROOT / "tests").rglob(f"{name}.py"))
        if len(found) != 1:
            raise ValueError(f"AREAS names {name}, and {len(found)} files under tests/ have this name; one must.")
        files.append(str(found[0].relative_to(ROOT)))
    return files


def find_python(version: str) -> str | None:
    """An interpreter of this version that runs: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))]
    for candidate in filter(None, candidates):
        done = subprocess.run(
            [candidate, "-c", "import venv"], capture_output=True, check=False
        )  # pyenv's shims can fail
        if done.returncode == 0:
            return str(candidate)
    return None


def count(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit report, and the reasons of the skips."""
    outcomes: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
        elif skip is not None:
            outcomes["skipped"] += 1
            reasons[skip.get("message", "")] += 1
        else:
            outcomes["passed"] += 1
    return {**outcomes, "skips": dict(sorted(reasons.items()))}


def run(python: str, torch: str) -> dict[str, Any]:
    """Versions and counts of one pair; what is missing or does not install is the value of "not_run"."""
    asked = {"python": python, "torch": torch}
    interpreter = find_python(python)
    if interpreter is None:
        return {**asked, "not_run": f"there is no python{python} on the path and none of pyenv's"}
    environment = f".venv-python{python}-torch{torch}"
    make = ["make", f"PYTHON={interpreter}", f"TORCH={torch}", f"VENV={environment}"]
    if subprocess.run([*make, "setup"], cwd=ROOT, check=False).returncode:
        return {**asked, "not_run": "its packages did not install"}
    versions = subprocess.run(
        [f"{environment}/bin/python", "-c", VERSIONS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        selection = f"-q --cases values -m 'not slow' --junitxml={report} {' '.join(test_files())}"
        subprocess.run([*make, "test", f"ARGS={selection}"], cwd=ROOT, check=False)
        if not report.exists():
            return {**asked, "not_run": "pytest ended without a report"}
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        return {**json.loads(versions.stdout), **count(report), "date": date}


def pair_of(result: dict[str, Any]) -> tuple[list[int], list[int]]:
    """torch without its build, and Python to the minor version, as numbers: what names a result, and their order."""
    torch, python = (result[name].partition("+")[0].split(".") for name in ("torch", "python"))
    return [int(part) for part in torch], [int(part) for part in python[:2]]


def table(results: list[dict[str, Any]]) -> str:
    """The page's table, and a line for what did not run."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(':---' if c != 'passed' else '---:' for c in COLUMNS)} |"]
    lines += [f"| {' | '.join(str(result[c]) for c in COLUMNS)} |" for result in results if "not_run" not in result]
    missing = [f"Python {r['python']} with torch {r['torch']} ({r['not_run']})" for r in results if "not_run" in r]
    return "\n".join(lines) + "\n" + (f"\nNot run: {', '.join(missing)}.\n" if missing else "")


def write(results: list[dict[str, Any]]) -> None:
    """matrix.json and the table of the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table(results) + END + after, encoding="utf-8")


def main() -> None:
    """Runs the pairs that were asked for; exit status 1 if a test failed or a pair that has its Python did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="PYTHON:TORCH")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    bad = False
    for pair in parser.parse_args().pairs:
        result = run(*pair.split(":"))
        print(json.dumps(result), flush=True)
        bad |= bool(result.get("failed")) or ("not_run" in result and find_python(result["python"]) is not None)
        others = [other for other in results if pair_of(other) != pair_of(result)]
        results = sorted([*others, result], key=pair_of)
        write(results)
    sys.exit(bad)


if __name__ == "__main__":
    main()
