"""Packages, workflows and the papers of the project: each parses, and what it names exists. `make dist-check` runs the packages."""

import re
import shutil
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lowrank_optim as lo
from tests import dist, matrix

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github/workflows").glob("*")
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
PAPERS = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
CHECKOUT = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="git says what belongs to the repository"
)


def constraints() -> dict[str, str]:
    """The versions that the Makefile installs."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.partition(";")[0].split("==") for line in lines if "==" in line and not line.startswith("#"))


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


# ------------------------------------------------------------------------------------------------------------------- workflows


def test_ci_runs_on_the_oldest_and_the_newest_python_and_torch():
    (job,) = WORKFLOWS["ci.yml"]["jobs"].values()
    torch = next(Requirement(name) for name in PROJECT["dependencies"] if name.startswith("torch"))
    versions = [pair.split(":")[1] for pair in matrix.PAIRS]
    oldest, newest = (choose(versions, key=lambda v: [int(n) for n in v.split(".")]) for choose in (min, max))
    assert str(torch.specifier) == f">={oldest.rpartition('.')[0]}"
    assert job["strategy"]["matrix"] == {"python": ["3.10", "3.13"], "torch": [oldest, newest]}
    assert PROJECT["requires-python"] == ">=3.10"
    assert job["env"]["TORCH"] == "${{ matrix.torch }}"
    assert [step.get("run") for step in job["steps"]][-1] == ".ci/run"


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_what_a_workflow_runs_exists(name):
    for command in (step["run"] for step in steps(name) if "run" in step):
        for target in re.findall(r"^make ([a-z-]+)", command):
            assert target in TARGETS, target
        for path in re.findall(r"(?:^|\s)(\.?[\w./]+/[\w.]+)$", command):
            assert (ROOT / path).exists(), path
    for action in (step["uses"] for step in steps(name) if "uses" in step):
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action), action


def test_ci_script_runs_only_targets_that_exist():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for line in re.findall(r"\bmake ([a-z -]+)", script):
        assert set(line.split()) <= TARGETS, line
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_only_a_tag_publishes_and_only_after_the_check():
    release = WORKFLOWS["release.yml"]
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads "on" so
    jobs = release["jobs"]
    assert (jobs["check"]["needs"], jobs["publish"]["needs"]) == ("build", "check")
    assert release["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["environment"] == "pypi"
    assert not re.search(
        "password|secrets", (ROOT / ".github/workflows/release.yml").read_text().replace("no password", "")
    )


def test_pre_commit_has_the_versions_of_the_constraints_and_hooks_that_exist():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    ruff, local = config["repos"]
    assert ruff["rev"] == f"v{constraints()['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]
    assert "VENV   ?= .venv\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------- metadata


def test_classifiers_are_the_tested_pythons():
    said = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert said == [pair.split(":")[0] for pair in matrix.PAIRS]


def test_licence_files_and_readme_exist():
    for name in (*PROJECT["license-files"], PROJECT["readme"]):
        assert (ROOT / name).is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_all_papers_name_one_repository():
    source = PROJECT["urls"]["Source"]
    assert all(url.startswith(source) for url in PROJECT["urls"].values())
    for name in (*PAPERS, "CITATION.cff"):
        found = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / name).read_text(encoding="utf-8"))
        assert set(found) <= {source}, name


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (lo.__version__, PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]


def test_the_notice_names_every_paper_of_the_package():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "lowrank_optim").rglob("*.py"))
    named = {number for text in sources for number in re.findall(r"arXiv:\d{4}\.\d{5}", text)}
    assert len(named) > 15
    assert not {number for number in named if number not in notice}


@pytest.mark.parametrize("name", PAPERS)
def test_what_the_papers_name_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\.?[\w-]+/)*[\w.-]+\.(?:md|py|yml|cff)|\w+(?:/\w+)+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, flags=re.MULTILINE):
        assert set(filter(None, target)) <= TARGETS
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


# --------------------------------------------------------------------------------------------------------------------- packages


@CHECKOUT
def test_the_manifest_takes_in_every_tracked_file():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    grafted = {folder for command, *folders in lines if command == "graft" for folder in folders}
    included = {pattern for command, *patterns in lines if command == "include" for pattern in patterns}
    assert all((ROOT / folder).is_dir() for folder in grafted)
    by_setuptools = ("pyproject.toml", "setup.py")
    for name in dist.tracked():
        folder, _, rest = name.partition("/")
        if rest:
            assert folder in grafted, name
        else:
            assert name in by_setuptools or any(fnmatch(name, pattern) for pattern in included), name


DUMP = """
Version References:
  required from libc.so.6:
    0x06969194 0x00 11 GLIBC_2.14
    0x069691b4 0x00 03 GLIBC_2.34
    0x09691a75 0x00 08 GLIBC_2.2.5
  required from libstdc++.so.6:
    0x0297f840 0x00 06 GLIBCXX_3.4.30
"""


def test_the_glibc_of_a_tag_is_compared_with_what_the_library_needs():
    assert dist.newest_glibc(DUMP) == (2, 34)
    dist.check_glibc("a-1-py3-none-manylinux_2_34_x86_64.whl", (2, 34))
    for name in ("a-1-py3-none-manylinux_2_28_x86_64.whl", "a-1-py3-none-linux_x86_64.whl"):
        with pytest.raises(dist.Broken, match=r"needs glibc 2\.34"):
            dist.check_glibc(name, (2, 34))


def test_a_folder_without_packages_says_what_to_run(tmp_path):
    with pytest.raises(dist.Broken, match=r"holds nothing\. Run `make dist`"):
        dist.find(tmp_path)


def test_an_sdist_that_lacks_a_source_or_holds_a_build_is_refused(tmp_path):
    (tmp_path / "a.cu").write_text("")
    path = tmp_path / "p-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "a.cu", "p-1/csrc/cuda/a.cu")
    dist.check_sdist(path, ["csrc/cuda/a.cu"])
    with pytest.raises(dist.Broken, match=r"lacks csrc/cuda/b\.cu"):
        dist.check_sdist(path, ["csrc/cuda/a.cu", "csrc/cuda/b.cu"])
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "a.cu", f"p-1/{dist.LIBRARY}")
    with pytest.raises(dist.Broken, match="holds what was built"):
        dist.check_sdist(path, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"p.dist-info/WHEEL": "Tag: py3-none-linux_x86_64\n"}, "says of itself py3-none-linux_x86_64"),
        ({"p.dist-info/licenses/NOTICE": None}, "lacks NOTICE"),
        ({"lowrank_optim/a.py": None}, r"lacks lowrank_optim/a\.py"),
        ({dist.LIBRARY: ""}, "has lowrank_optim/kernels/cpu/liblowrank_optim_cpu.so besides"),
        ({"tests/a.py": ""}, r"has tests/a\.py besides"),
        ({dist.RECORD: '{"command": []}'}, "does not say what is in it"),
    ],
)
def test_a_wheel_that_is_not_what_it_says_is_refused(tmp_path, change, message):
    files = {
        "p.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        **dict.fromkeys(("p.dist-info/METADATA", "p.dist-info/entry_points.txt", "p.dist-info/licenses/LICENSE"), ""),
        "p.dist-info/licenses/NOTICE": "",
        "lowrank_optim/a.py": "",
        dist.RECORD: '{"error": "none"}',
    }
    path = tmp_path / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | change).items():
            if text is not None:
                archive.writestr(name, text)
    names = ["lowrank_optim/a.py", "README.md"]
    if message is None:
        dist.check_wheel(path, False, names)
    else:
        with pytest.raises(dist.Broken, match=message):
            dist.check_wheel(path, False, names)
