"""What `make integrations` runs and writes: its files exist, its counts are those of the report, the page shows its results."""

import json

import pytest

from tests import third_party

REPORT = """<testsuites><testsuite>
<testcase classname="tests.integrations.test_trl" name="test_a"/>
<testcase classname="tests.integrations.test_trl" name="test_b"><failure message="1 != 2"/></testcase>
<testcase classname="tests.integrations.test_trl.TestC" name="test_c"><error message="no fixture"/></testcase>
<testcase classname="tests.repository.test_docs" name="test_code_of_the_page_runs[docs/integrations/trl.md]"/>
<testcase classname="" name="tests.integrations.test_peft"><skipped message="no peft"/></testcase>
</testsuite></testsuites>"""


def test_every_file_exists_once_and_no_test_with_the_marker_is_left_out():
    files = third_party.files()
    assert len(files) == len(set(files))
    marked = {
        path.relative_to(third_party.ROOT).as_posix()
        for path in (third_party.ROOT / "tests").rglob("test_*.py")
        if "\npytestmark = pytest.mark.integration\n" in path.read_text(encoding="utf-8")
    }
    assert marked <= set(files)


def test_every_page_that_is_run_exists():
    named = [test.partition("[")[2].rstrip("]") for test in third_party.pages()]
    assert named
    assert all((third_party.ROOT / page).exists() for page in named)


def test_a_name_without_a_file_raises(monkeypatch):
    project = third_party.Project("nobody", "nothing", ("test_of_nothing",), "")
    monkeypatch.setattr(third_party, "PROJECTS", (project,))
    with pytest.raises(ValueError, match="test_of_nothing, and 0 files"):
        third_party.files()


def test_counts_are_those_of_the_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    counts = third_party.count(report)
    assert counts == {
        "test_trl": {"passed": 1, "failed": 2, "skipped": 0},
        "trl": {"passed": 1, "failed": 0, "skipped": 0},
        "test_peft": {"passed": 0, "failed": 0, "skipped": 1},
    }
    results = third_party.results_of(counts, "2000-01-01")
    trl = next(project for project in results["projects"] if project["project"] == "TRL")
    assert (trl["passed"], trl["failed"], trl["date"]) == (2, 2, "2000-01-01")


def test_the_page_shows_the_results():
    results = json.loads(third_party.RESULTS.read_text())
    page = third_party.PAGE.read_text(encoding="utf-8")
    assert third_party.BEGIN + third_party.table(results) + third_party.END in page
    assert [project["project"] for project in results["projects"]] == [project.name for project in third_party.PROJECTS]
