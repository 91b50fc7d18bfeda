"""The example under torchrun: what fully_shard and DistributedDataParallel train is the same."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.oracles.processes import Child

ROOT = Path(__file__).parents[2]


def arguments(kind: str, out: Path) -> list[str]:
    return [kind, "--clip", "0", "--steps", "10", "--out", str(out)]


def last_loss(said: str) -> float:
    found = re.findall(r"step 10: loss ([\d.]+)", said)
    assert len(found) == 1, said  # the first process alone reports
    return float(found[0])


def under_torchrun(kind: str, out: Path) -> str:
    """What ten steps on two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["examples/pretrain.py", *arguments(kind, out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def one_of_two(rank: int, port: int, kind: str, out: Path) -> None:
    """The example in an environment such as torchrun's, without the seconds of another interpreter."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.path.insert(0, str(ROOT / "examples"))
    import pretrain

    pretrain.main(arguments(kind, out))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_example_trains_alike_under_torchrun(tmp_path):
    port = free_port()
    children = [Child(tmp_path / f"said-{rank}", one_of_two, rank, port, "--ddp", tmp_path / "ddp") for rank in (0, 1)]
    replicated = last_loss("".join(child.finish() for child in children))
    sharded = last_loss(under_torchrun("--fsdp", tmp_path / "fsdp"))
    assert abs(sharded - replicated) < 2e-3
    assert sharded < 4.5  # a uniform guess among 256 bytes is 5.5
