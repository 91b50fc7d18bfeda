"""Schemas, fakes and mutation marks of the operations, by `torch.library.opcheck`."""

import pytest
import torch

from lowrank_optim.kernels import schemas
from lowrank_optim.kernels.comparison import Case
from lowrank_optim.kernels.selftest import quick_cases
from tests.oracles.op_cases import CASES

CHECKED = [case for case in [*quick_cases(), *(cases[0] for cases in CASES.values())] if "nonfinite" not in case.label]
"""NaN is not equal to NaN for opcheck."""


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case: Case):
    torch.library.opcheck(getattr(torch.ops.lowrank_optim, case.op).default, case.make())


def test_every_operation_is_checked():
    assert {case.op for case in CHECKED} == set(schemas.CHECKS)
