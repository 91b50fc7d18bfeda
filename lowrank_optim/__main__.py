"""`python -m lowrank_optim` is the command `lowrank-optim`."""

import sys

from lowrank_optim.cli import main

sys.exit(main())
