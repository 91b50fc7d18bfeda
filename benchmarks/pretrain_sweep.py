"""Learning-rate sweep of the main job: the same grid of factors for each optimizer, one table, JSON.

Runs `examples/pretrain.py --sweep …` (about 20 minutes on 2 cores for two optimizers). Finished runs in the folder are used as
they are, so an interrupted sweep continues.

The losses of low-rank methods differ between machines: matrix products are rounded in another way, and the choice of subspaces
amplifies the difference. GaLore at its best rate ended at 1.3578, 1.3664, 1.3710 and 1.3738 on four machines, AdamW at 1.3913 on all.
The committed JSON is that of 1.3710.
"""

import argparse
import json
import sys
from pathlib import Path

from common import write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def main() -> None:
    import pretrain

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", default="adamw,galore")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    args, rest = parser.parse_known_args()
    pretrain.main(["--sweep", args.optimizers, "--out", str(args.out), "--resume", *rest])
    results = json.loads((args.out / "comparison.json").read_text(encoding="utf-8"))
    keys = ("optimizer", "lr", "val_loss", "train_loss", "steps", "tokens", "bytes")
    rows = [{key: result[key] for key in keys} for result in results]
    best = {}
    for name in args.optimizers.split(","):
        best[name] = min((r for r in rows if r["optimizer"] == name), key=lambda r: r["val_loss"])
    adamw = best.get("adamw")
    ratios = {name: row["val_loss"] / adamw["val_loss"] for name, row in best.items()} if adamw else {}
    write("pretrain_sweep", {"runs": rows, "best_lr": {n: r["lr"] for n, r in best.items()}, "loss_over_adamw": ratios})


if __name__ == "__main__":
    main()
