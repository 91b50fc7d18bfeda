"""The example under torchrun: what fully_shard and DistributedDataParallel train is the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def last_loss(kind: str, out: Path) -> float:
    """Of ten steps on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["examples/pretrain.py", kind, "--clip", "0", "--steps", "10", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.findall(r"step 10: loss ([\d.]+)", done.stdout)
    assert len(found) == 1, done.stdout  # the first process alone reports
    return float(found[0])


def test_the_example_trains_alike_under_torchrun(tmp_path):
    sharded, replicated = (last_loss(kind, tmp_path / kind) for kind in ("--fsdp", "--ddp"))
    assert abs(sharded - replicated) < 2e-3
    assert sharded < 4.5  # a uniform guess among 256 bytes is 5.5
