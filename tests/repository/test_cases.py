"""Which cases of a test `pytest --cases` runs."""

import itertools
import subprocess
import sys

import pytest

from tests.mutations import ROOT

CASES = """
import pytest

@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize(("b", "c"), [(4, "x"), (5, "y"), (5, "x")])
def test_product(a, b, c): pass

@pytest.fixture(params=["k", "l"])
def made(request): return request.param

@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", [3, 4])
def test_three(a, b, made): pass

@pytest.mark.parametrize(("a", "b", "c", "d"), [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6, 4), (1, 7, 3, 4), (8, 2, 3, 4), (1, 2, 6, 5)])
def test_chosen(a, b, c, d): pass

def test_alone(): pass

@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_marked(a): pass
"""

CHOSEN = ["1-2-3-4", "1-2-3-5", "1-2-6-4", "1-7-3-4", "8-2-3-4", "1-2-6-5"]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The cases of each test, by choice."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "test_cases.py").write_text(CASES)
    code = (
        "import sys, pytest\n"
        "for cases in ('all', 'pairs', 'values'):\n"
        "    print('cases', cases, flush=True)\n"
        "    pytest.main([*sys.argv[1:], '--cases', cases])"
    )
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.conftest", "--collect-only", "-q"]
    command = [sys.executable, "-c", code, "--rootdir", str(folder), str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {}
    for said in done.stdout.split("cases ")[1:]:
        lines = [line.partition("::")[2].rstrip("]") for line in said.splitlines() if "::" in line]
        by_test = itertools.groupby(lines, lambda line: line.partition("[")[0])
        found[said.split()[0]] = {name: [line.partition("[")[2] for line in group] for name, group in by_test}
    return found


@pytest.mark.long
def test_values_are_each_run_once_and_products_are_not(collected):
    assert collected["values"]["test_product"] == ["4-x-1", "4-x-3", "5-y-2"]
    assert collected["values"]["test_alone"] == [""]


@pytest.mark.long
def test_pairs_are_each_run_once_and_lists_of_chosen_cases_whole(collected):
    pairs = collected["pairs"]
    assert len(collected["all"]["test_three"]) == 8
    assert len(pairs["test_three"]) == 4
    for places in itertools.combinations(range(3), 2):
        seen = {tuple(case.split("-")[place] for place in places) for case in pairs["test_three"]}
        assert len(seen) == 4, places
    assert pairs["test_chosen"] == CHOSEN
    assert pairs["test_alone"] == [""]


@pytest.mark.long
def test_all_cases_are_all(collected):
    assert [len(cases) for cases in collected["all"].values()] == [9, 8, 6, 1, 3]


@pytest.mark.long
def test_a_case_marked_full_runs_with_all_only(collected):
    assert collected["all"]["test_marked"] == ["1", "2", "3"]
    assert collected["pairs"]["test_marked"] == collected["values"]["test_marked"] == ["1", "3"]
