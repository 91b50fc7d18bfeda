"""What `make matrix` runs and writes: its files exist, its counts are those of the report, the page shows its results."""

import json
import os
import subprocess
import sys

import pytest

from tests import matrix

REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/>
<testcase name="c"><skipped message="no GPU"/></testcase><testcase name="d"><skipped message="no GPU"/></testcase>
<testcase name="e"><failure message="1 != 2"/></testcase><testcase name="f"><error message="no fixture"/></testcase>
</testsuite></testsuites>"""


def test_every_file_of_the_matrix_exists_once():
    files = matrix.test_files()
    assert len(files) == len(set(files)) == sum(len(names.split()) for names in matrix.AREAS.values())


def test_a_name_without_a_file_raises(monkeypatch):
    monkeypatch.setattr(matrix, "AREAS", {"area": "test_of_nothing"})
    with pytest.raises(ValueError, match="test_of_nothing, and 0 files"):
        matrix.test_files()


def test_counts_are_those_of_the_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert matrix.count(report) == {"passed": 2, "failed": 2, "skipped": 2, "skips": {"no GPU": 2}}


def test_a_python_that_is_not_there_is_named():
    result = matrix.run("3.1", "2.8.0")
    assert result == {
        "python": "3.1",
        "torch": "2.8.0",
        "not_run": "there is no python3.1 on the path and none of pyenv's",
    }
    assert "Not run: Python 3.1 with torch 2.8.0 (there is no python3.1" in matrix.table([result])


def test_the_page_shows_the_results():
    results = json.loads(matrix.RESULTS.read_text())
    assert matrix.BEGIN + matrix.table(results) + matrix.END in matrix.PAGE.read_text(encoding="utf-8")


def test_results_are_replaced_by_pair(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}old\n{matrix.END}after\n")
    monkeypatch.setattr(matrix, "PAGE", page)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "run", lambda python, torch: {"python": python, "torch": torch, "not_run": "no time"})
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    row = dict.fromkeys(matrix.COLUMNS, 0) | {"skips": {}}
    kept = {**row, "python": "3.11.7", "torch": "2.13.0+cpu"}
    (tmp_path / "matrix.json").write_text(json.dumps([{**row, "python": "3.10.2", "torch": "2.8.0+cu128"}, kept]))
    for pair in ["3.12:2.10.0", "3.10:2.8.0"]:
        monkeypatch.setattr(sys, "argv", ["matrix.py", pair])
        with pytest.raises(SystemExit) as ended:
            matrix.main()
        assert not ended.value.code
    results = json.loads((tmp_path / "matrix.json").read_text())
    assert [(result["python"], result["torch"]) for result in results] == [
        ("3.10", "2.8.0"),
        ("3.12", "2.10.0"),
        ("3.11.7", "2.13.0+cpu"),
    ]
    assert page.read_text() == f"before\n{matrix.BEGIN}{matrix.table(results)}{matrix.END}after\n"


@pytest.mark.parametrize(
    ("asked", "environment", "pin"),
    [
        ([], ".venv", "constraints.txt"),
        (
            ["TORCH=2.8.0", "PYTHON=/usr/bin/python3.10"],
            ".venv-python3.10-torch2.8.0",
            ".venv-python3.10-torch2.8.0/constraints.txt",
        ),
        (["TORCH=2.8.0", "VENV=mine"], "mine", "mine/constraints.txt"),
    ],
)
def test_another_torch_has_an_environment_and_constraints_of_its_own(asked, environment, pin):
    command = ["make", "--dry-run", "--always-make", "setup", *asked]
    unset = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "TORCH", "VENV"}  # `make test TORCH=…` passes its own on
    env = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, cwd=matrix.ROOT, env=env, capture_output=True, text=True, check=True)
    assert f"-m venv {environment}\n" in done.stdout
    assert done.stdout.count(f"{environment}/bin/pip install") == done.stdout.count(f"--constraint {pin} ") == 2
    (replaced,) = [line for line in done.stdout.splitlines() if line.startswith("sed")] or [""]
    assert ("torch==2.8.0" in replaced) == bool(asked)
