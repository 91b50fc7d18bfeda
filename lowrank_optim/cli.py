"""The command `lowrank-optim`: each subcommand is a module with `add_parser(subparsers)` and `run(args) -> int`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from lowrank_optim._version import __version__
from lowrank_optim.console import accept_any_text

SUBCOMMANDS = ("lowrank_optim.planner.command", "lowrank_optim.doctor")
"""Modules of the subcommands; one that is not there is left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(prog="lowrank-optim", description="Memory-efficient optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name in SUBCOMMANDS:
        if find_spec(name) is not None:
            module = import_module(name)
            module.add_parser(subparsers)
            subparsers.choices[name.split(".")[1].replace("planner", "plan")].set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
