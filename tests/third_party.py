"""`make integrations`: the tests with trainers and packages of others, in an environment of their own that has them.

axolotl wants another TRL than the newest, and has an environment for itself: `make integrations-axolotl`.
The results go to third_party.json beside this file and into the table of docs/integrations/tested.md.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "third_party.json"
PAGE = ROOT / "docs" / "integrations" / "tested.md"
BEGIN, END = "<!-- written by `make integrations` -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Project:
    """Somebody else's package: its name in the table and in the registry, its files of tests, and what they do.

    page: of docs/integrations, the code of which is run, too.
    """

    name: str
    package: str
    files: tuple[str, ...]
    what: str
    page: str = ""


PROJECTS = (
    Project(
        "transformers",
        "transformers",
        (
            "test_transformers_integration",
            "test_in_backward_trainer",
            "test_model_families",
            "test_renamed_weights",
            "test_compat",
        ),
        "Trainer: factory, callback, resume; LLaMA, GPT-2, Qwen3, Mixtral, T5, ViT; flags of galore_torch and apollo_torch",
        "transformers",
    ),
    Project("TRL", "trl", ("test_trl",), "SFTTrainer, DPOTrainer, in backward, LoRA, `examples/finetune.py`", "trl"),
    Project("peft", "peft", ("test_peft_models",), "LoRA, DoRA, modules_to_save, in backward, resume, LoRA+", "peft"),
    Project(
        "Lightning",
        "lightning",
        ("test_lightning",),
        "automatic and manual optimization, accumulation, clipping, checkpoint, in backward",
        "lightning",
    ),
    Project(
        "Accelerate",
        "accelerate",
        ("test_accelerate",),
        "DDP and FSDP2 on two gloo processes, with the Trainer too; in backward, resume",
        "accelerate",
    ),
    Project("torchtitan", "torchtitan", ("test_torchtitan",), "container of optimizers, resume; not its trainer"),
    Project(
        "axolotl", "axolotl", ("test_axolotl",), "its command line with the plugin of the page, in backward, resume"
    ),
    Project("LLaMA-Factory", "llamafactory", ("test_llama_factory",), "registry of optimizers; not its trainer"),
)

ALONE = ("axolotl",)
"""Projects that need an environment for themselves."""

COLUMNS = ("project", "version", "what", "passed", "failed", "skipped", "date")


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def files(projects: Sequence[Project] | None = None) -> list[str]:
    """The files of the projects (None: of all); a name that no file or more than one has is an error."""
    found = []
    for name in (name for project in (PROJECTS if projects is None else projects) for name in project.files):
        there = sorted((ROOT / "tests").rglob(f"{name}.py"))
        if len(there) != 1:
            raise ValueError(f"PROJECTS names {name}, and {len(there)} files under tests/ have this name; one must.")
        found.append(str(there[0].relative_to(ROOT)))
    return found


def pages(projects: Sequence[Project] = PROJECTS) -> list[str]:
    """The tests that run the code of the pages."""
    test = "tests/repository/test_docs.py::test_code_of_the_page_runs"
    return [f"{test}[docs/integrations/{project.page}.md]" for project in projects if project.page]


def count(report: Path) -> dict[str, dict[str, int]]:
    """Passed, failed and skipped tests of each file in a JUnit report; of pages, by their names."""
    outcomes: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    for case in ElementTree.parse(report).iter("testcase"):
        # A file that is skipped or broken as a whole is named where the others have the name of a test.
        where = case.get("classname") or case.get("name") or ""
        file = next(part for part in reversed(where.split(".")) if part.startswith("test_"))
        page = re.search(r"\[docs/integrations/(\w+)\.md\]", case.get("name") or "")
        file = page[1] if page else file
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[file]["failed"] += 1
        elif case.find("skipped") is not None:
            outcomes[file]["skipped"] += 1
        else:
            outcomes[file]["passed"] += 1
    return outcomes


def results_of(counts: dict[str, dict[str, int]], date: str) -> dict[str, Any]:
    """Versions, and the counts of each project."""
    empty = {"passed": 0, "failed": 0, "skipped": 0}
    projects = [
        {
            "project": project.name,
            "version": version(project.package),
            "what": project.what,
            **{key: sum(counts.get(file, empty)[key] for file in (*project.files, project.page)) for key in empty},
            "date": date,
        }
        for project in PROJECTS
    ]
    return {"python": platform.python_version(), "torch": version("torch"), "projects": projects}


def merged(new: dict[str, Any], ran: Sequence[Project], before: dict[str, Any]) -> dict[str, Any]:
    """The new results of the projects that ran, the former ones of the others."""
    names = {project.name for project in ran}
    former = {project["project"]: project for project in before["projects"]}
    rows = [row if row["project"] in names else former.get(row["project"], row) for row in new["projects"]]
    return {**new, "projects": rows}


def table(results: dict[str, Any]) -> str:
    """The page's table."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join('---:' if c in ('passed', 'failed') else '---' for c in COLUMNS)}|",
    ]
    lines += [f"| {' | '.join(str(project[c]) for c in COLUMNS)} |" for project in results["projects"]]
    return "\n".join(lines) + f"\n\nPython {results['python']}, torch {results['torch']}.\n"


def write(results: dict[str, Any]) -> None:
    """third_party.json and the table of the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.split(BEGIN)[0] + BEGIN + table(results) + END + text.split(END)[1], encoding="utf-8")


def main() -> None:
    """Runs all but axolotl, or what --only names; exit status 1 if a test failed or was skipped, since here nothing is missing."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--only", choices=[project.name for project in PROJECTS])
    args, rest = parser.parse_known_args()
    chosen = [p for p in PROJECTS if (p.name == args.only if args.only else p.name not in ALONE)]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files(chosen), *pages(chosen), *rest]
        subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
        if not report.exists():
            sys.exit("pytest ended without a report")
        results = results_of(count(report), datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    results = merged(results, chosen, json.loads(RESULTS.read_text(encoding="utf-8")))
    write(results)
    print(table(results))
    names = {project.name for project in chosen}
    sys.exit(any(row["failed"] or row["skipped"] for row in results["projects"] if row["project"] in names))


if __name__ == "__main__":
    main()
