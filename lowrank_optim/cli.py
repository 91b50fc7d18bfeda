"""The command `lowrank-optim`: each subcommand is a module with `add_parser(subparsers)`, which sets `run(args) -> int`."""

import argparse
import sys
from collections.abc import Sequence

from lowrank_optim import doctor
from lowrank_optim._version import __version__
from lowrank_optim.console import accept_any_text
from lowrank_optim.planner import command as planner


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(prog="lowrank-optim", description="Memory-efficient optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    planner.add_parser(subparsers)
    doctor.add_parser(subparsers)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
