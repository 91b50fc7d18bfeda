"""Checks for rules, projectors and residuals of your own: what the contract promises, tried on a small problem.

Each check raises AssertionError for the first promise that is broken: which one, what came, what is needed. Any test runner will do.
"""

from lowrank_optim.testing.projectors import check_projector
from lowrank_optim.testing.residuals import check_residual
from lowrank_optim.testing.rules import check_rule

__all__ = ["check_projector", "check_residual", "check_rule"]
