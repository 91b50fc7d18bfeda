"""Schemas, fakes and mutation marks of the operations, by `torch.library.opcheck`."""

import pytest
import torch

from lowrank_optim.kernels import schemas
from lowrank_optim.kernels.comparison import Case
from lowrank_optim.kernels.selftest import quick_cases
from tests.oracles.op_cases import CASES

CHECKED = [case for case in [*quick_cases(), *(cases[0] for cases in CASES.values())] if "nonfinite" not in case.label]
"""NaN is not equal to NaN for opcheck."""

LAST = {case.op: case for case in CHECKED}


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_schema_and_fake(case: Case):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.lowrank_optim, case.op).default, case.make(), test_utils=checks)


@pytest.mark.long
@pytest.mark.parametrize("case", LAST.values(), ids=str)
def test_every_check(case: Case):
    """Those of compilation, too, which take half a second and look at the operation more than at its arguments."""
    torch.library.opcheck(getattr(torch.ops.lowrank_optim, case.op).default, case.make())


def test_every_operation_is_checked():
    assert {case.op for case in CHECKED} == set(schemas.CHECKS)
