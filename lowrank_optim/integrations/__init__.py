"""Thin adapters to training frameworks, `lowrank_optim.integrations.<name>`. None of them imports its framework."""

from lowrank_optim.integrations import compat, transformers

__all__ = ["compat", "transformers"]
