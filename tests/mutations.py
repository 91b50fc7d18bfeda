"""Faults put into the package one at a time: does `--cases pairs` find what the whole product of cases finds?

`python -m tests.mutations` copies the package, plants each fault of MUTANTS in the copy, and runs the tests named beside it, first
with pairs, and with all cases where no pair fails. The results go to mutations.json beside this file.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "mutations.json"

KERNELS, PROJECTORS, RESIDUALS = "tests/kernels/test_kernels.py", "tests/projectors", "tests/residuals"
STATE, STEP, LAYOUTS = "tests/optimizers/test_state.py", "tests/step/test_step.py", "tests/step/test_layouts.py"
FRUGAL, GALORE = "tests/optimizers/test_frugal.py", "tests/optimizers/test_galore_reference.py"
CODES, PARTS = "tests/quantization/test_quantization.py", "tests/groups/test_parts_per_group.py"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, once in the file, becomes `new`; `tests` ought to fail, unless `equivalent` says why nothing can change."""

    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


REFERENCE, SCALED = "kernels/reference.py", "residuals/scaled.py"
ENTRIES, BASIS, BLOCKS = "projectors/coordinate_basis.py", "projectors/dense_basis.py", "projectors/blocks.py"
MATRICES, CHECKPOINT, RELAYOUT = "groups/matrices.py", "optimizers/checkpoint.py", "step/relayout.py"

MUTANTS = [
    Mutant(REFERENCE, "[project(g, b, right) for", "[project(g, b, True) for", KERNELS),
    Mutant(
        REFERENCE,
        "out.addmm_(grad[chunk].to(basis.dtype).mT, basis[chunk])",
        "out.copy_(grad[chunk].to(basis.dtype).mT @ basis[chunk])",
        KERNELS,
    ),
    Mutant(REFERENCE, "exp_avg.lerp_(grad, ok.to(grad.dtype) * weight1)", "exp_avg.lerp_(grad, weight1)", KERNELS),
    Mutant(
        REFERENCE, "masked_scalar(ok, beta2, 1.0, grad.dtype)", "masked_scalar(ok, beta2, beta2, grad.dtype)", KERNELS
    ),
    Mutant(
        REFERENCE,
        "torch.div(exp_avg, direction, out=direction)\n    return direction if ok is None else direction.masked_fill_(~ok, 0.0)",
        "torch.div(exp_avg, direction, out=direction)\n    return direction",
        KERNELS,
    ),
    Mutant(SCALED, 'float(options["scale"]) if options["match_reference"] else 1.0', "1.0", RESIDUALS),
    Mutant(SCALED, 'options["scale"] ** 0.5', 'options["scale"]', RESIDUALS),
    Mutant(SCALED, "alpha=inside**2", "alpha=inside", RESIDUALS),
    Mutant(
        SCALED,
        "usable if ok is None else usable & ok",
        "usable",
        RESIDUALS,
        "where ok is false the step gives the residual R, N and squares of 0, so that the norm is 0, which is not usable",
    ),
    Mutant(SCALED, ".clamp_min(gamma) / gamma", ".clamp_min(1.0) / gamma", RESIDUALS),
    Mutant(SCALED, "ratio[..., None, None], ratio * whole", "ratio[..., None, None], whole", RESIDUALS),
    Mutant(ENTRIES, 'return scale if self.side == "right" else scale.mT', "return scale", f"{RESIDUALS} {FRUGAL}"),
    Mutant(ENTRIES, ".view(-1, 1, 1) * rows * cols", ".view(-1, 1, 1) * rows", f"{PROJECTORS} {FRUGAL} {STEP}"),
    Mutant(ENTRIES, 'squares if self.side == "right" else squares.mT', "squares", PROJECTORS),
    Mutant(
        ENTRIES, "return torch.where(shared, carried, 0.0).unsqueeze(-1)", "return carried.unsqueeze(-1)", PROJECTORS
    ),
    Mutant(
        ENTRIES,
        "gradient.sign() if term.sign else gradient, term.scale",
        "gradient, term.scale",
        PROJECTORS,
    ),
    Mutant(
        BASIS,
        "right = _change_of_basis(self.right, old.right, self.orthonormal, self.sharding.cols).pow(power)",
        "right = _change_of_basis(self.right, old.right, self.orthonormal, self.sharding.cols)",
        PROJECTORS,
    ),
    Mutant(
        BASIS,
        "return overlap if orthonormal else torch.linalg.solve(sharding.sum(old.mT @ old, -2), overlap)",
        "return overlap",
        PROJECTORS,
    ),
    Mutant(
        BASIS,
        'if self.side == "right" else (self.matrix, core.mT)',
        'if self.side == "right" else (self.matrix, core.mT * 2)',
        PROJECTORS,
    ),
    Mutant(MATRICES, 'return tensor.mT if layout == "transposed" else tensor', "return tensor", LAYOUTS),
    Mutant(
        MATRICES,
        'if layout == "conv" or tensor.dim() > 3:\n        return tensor.reshape',
        "if tensor.dim() > 3:\n        return tensor.reshape",
        LAYOUTS,
    ),
    Mutant(
        MATRICES,
        "max(1, round(rank * short_side))",
        "max(1, int(rank * short_side))",
        f"{STEP} {LAYOUTS} {GALORE} tests/groups",
    ),
    Mutant(
        CHECKPOINT, "if unique and by_name.keys() == set(names) else keys", "if unique and not names else keys", PARTS
    ),
    Mutant(
        CHECKPOINT,
        "return template.dtype in (widened, torch.float32 if value.dtype == torch.float64 else widened)",
        "return True",
        STATE,
    ),
    Mutant(
        RELAYOUT,
        "rows = slice(after.rank) if full else slice(None)",
        "rows = slice(None)",
        PARTS,
    ),
    Mutant(BLOCKS, "count // 2, active // 2", "count // 2, active", FRUGAL),
    Mutant(BLOCKS, "gradient.sign() if term.sign else gradient, term.scale", "gradient, term.scale", PROJECTORS),
    Mutant(
        "quantization/row_codes.py",
        "zero = 0x88 if signed and bits == 4 else 0",
        "zero = 0",
        f"{CODES} tests/quantization/test_coded_state.py",
    ),
    Mutant(
        "step/refresh_schedule.py",
        "max(step - (step + offset) % gap, 0)",
        "max(step - step % gap, 0)",
        f"{STEP} {GALORE} tests/optimizers/test_invariants.py",
    ),
    Mutant(
        "step/refresh.py",
        'if group["on_refresh"] == "reset" or',
        'if group["on_refresh"] == "never" or',
        f"{STEP} {GALORE} tests/optimizers/test_invariants.py",
    ),
]


def fails(mutant: Mutant, cases: str, copy: Path) -> str | None:
    """The first test that fails, if one does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--cases",
        cases,
        *mutant.tests.split(),
    ]
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" ")[1] if failed else None


def run(mutant: Mutant, copy: Path) -> dict[str, str | None]:
    """What finds the fault."""
    path = copy / "lowrank_optim" / mutant.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {before.count(mutant.old)} times; it must be there once")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        pairs = fails(mutant, "pairs", copy)
        found = pairs or fails(mutant, "all", copy)
    finally:
        path.write_text(before, encoding="utf-8")
    found_by = {"file": mutant.file, "fault": mutant.new, "pairs": pairs, "all": found}
    return {**found_by, "equivalent": mutant.equivalent} if mutant.equivalent else found_by


def main() -> None:
    """Run all, and write the results."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "runs", "*.pyc"))
        results = [run(mutant, copy) for mutant in track(MUTANTS, description="faults")]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results:
        missed = f"nothing can: {result['equivalent']}" if "equivalent" in result else "nothing finds it"
        place = result["pairs"] or (f"only all cases: {result['all']}" if result["all"] else missed)
        sys.stdout.write(f"{result['file']}: {result['fault']}: {place}\n")


if __name__ == "__main__":
    main()
