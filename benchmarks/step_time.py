"""Time of one optimizer step, of every optimizer here and of its peers, on the same tensors in one run.

    dense     a 13 M parameter stack of float32 matrices, no low-rank groups: AdamW in float32 and 8 bits
    small     200 matrices of 64 × 64 at rank 16, float32: what a step costs besides its arithmetic
    matrices  the matrices of LLaMA layers (CPU: one of the 350M model, float32; GPU: eight of the 7B model, bfloat16), every method

Steps between refreshes; the first step, which takes the first basis, is warm-up. APOLLO-Mini runs at rank 1, which is what it is, all
others at --rank. Every optimizer has its own copy of the weights and shares the gradients, one optimizer at a time is built on a GPU.
Peers that are not installed, or fail, are named with the reason. Ratios are to torch's fused AdamW with float32 state, medians of
interleaved rounds on the CPU; memory is exact bytes of state, bases that peers keep in objects and the parts of their tensor
subclasses included.

    python benchmarks/step_time.py [--only dense small matrices] [--rounds 9] [--rank 256]
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from common import environment, interleaved, reason, write
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import lowrank_optim as lo

Build = Callable[[list[torch.nn.Parameter], int], torch.optim.Optimizer]

LAYERS = {
    "cpu": [(1024, 1024)] * 4 + [(2736, 1024)] * 2 + [(1024, 2736)],
    "cuda": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 8,
}
DENSE = [(1024, 1024)] * 5 + [(2736, 1024)] * 2 + [(1024, 2736)]
"""13.6 million parameters."""
SMALL = [(64, 64)] * 200


def ours(method: type) -> Build:
    def build(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
        rank = 1 if method is lo.APOLLOMiniAdamW else rank
        group: dict[str, Any] = {"params": params, "rank": rank, "update_proj_gap": 10**6}
        if "rule" in method.matrix_options:  # one of whole matrices
            group = {"params": params, "rule": method.matrix_options["rule"]}
        if method.__name__.startswith("Frugal"):
            group["projector"] = "randomized_svd"
        return method([group], lr=1e-4)

    return build


def ours_dense(bits: int) -> Build:
    return lambda params, rank: lo.GaLoreAdamW([{"params": params, "rank": None}], lr=1e-4, state_bits=bits)


def galore_torch(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"params": params, "rank": rank, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True)


def apollo_torch(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    group = {"params": params, "rank": rank, "update_proj_gap": 10**6, "scale": 1.0, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": "channel"}
    return APOLLOAdamW([group], lr=1e-4)


def apollo_torch_mini(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    group = {"params": params, "rank": 1, "update_proj_gap": 10**6, "scale": 128.0, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": "tensor"}
    return APOLLOAdamW([group], lr=1e-4)


def bitsandbytes(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4)


def torchao(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4)


FUSED = "torch AdamW, fused, float32 state"
PEERS_DENSE: dict[str, Build] = {
    FUSED: lambda params, rank: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "bitsandbytes AdamW8bit": bitsandbytes,
    "torchao AdamW8bit": torchao,
}
OURS_DENSE: dict[str, Build] = {f"GaLoreAdamW without rank, {b}-bit state": ours_dense(b) for b in (32, 8, 4)}
PEERS: dict[str, Build] = {
    **PEERS_DENSE,
    "galore-torch GaLoreAdamW": galore_torch,
    "apollo-torch APOLLOAdamW": apollo_torch,
    "apollo-torch APOLLO-Mini": apollo_torch_mini,
}


def gradients(shapes: list[tuple[int, int]], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1e-3 * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


def prepare(build: Build, grads: list[Tensor], rank: int) -> tuple[Callable[[], object], int]:
    """A function that makes one step, after two; and the bytes of the optimizer's state."""
    params = [torch.nn.Parameter(torch.zeros_like(grad).add_(0.01)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = build(params, rank)
    for _ in range(2):
        optimizer.step()
    return optimizer.step, sum(stored_bytes(value) for state in optimizer.state.values() for value in state.values())


def stored_bytes(value: object) -> int:
    """Bytes of a tensor; of the tensors that a tensor subclass wraps; of those in an object such as galore-torch's projector."""
    if is_traceable_wrapper_subclass(value):
        return sum(stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(stored_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0


def measure(candidates: dict[str, Build], grads: list[Tensor], rank: int, rounds: int) -> dict[str, Any]:
    """Median seconds and bytes of state by name, or the reason why there is none."""
    results: dict[str, Any] = {}
    cuda = grads[0].is_cuda
    steps: dict[str, Callable[[], object]] = {}
    for name, build in candidates.items():
        try:
            step, size = prepare(build, grads, rank)
        except Exception as why:  # a peer that does not run here is a result, too
            results[name] = {"skipped": reason(why)}
            continue
        results[name] = {"state_bytes": size}
        if cuda:  # one at a time: together they do not fit
            results[name]["seconds"] = interleaved({name: step}, rounds)[name]
            del step
            gc.collect()
            torch.cuda.empty_cache()
        else:
            steps[name] = step
    for name, seconds in interleaved(steps, rounds).items() if steps else ():
        results[name]["seconds"] = seconds
    return results


def table(title: str, results: dict[str, Any]) -> None:
    base = results[FUSED].get("seconds")
    print(f"\n{title}\n{'':44}{'ms':>9}{'× fused AdamW':>15}{'state MiB':>11}")
    for name, row in results.items():
        if "seconds" not in row:
            print(f"{name:44}  {row['skipped']}")
            continue
        row["over_fused_adamw"] = row["seconds"] / base if base else None
        ratio = f"{row['over_fused_adamw']:15.2f}" if base else f"{'–':>15}"
        print(f"{name:44}{row['seconds'] * 1e3:9.2f}{ratio}{row['state_bytes'] / 2**20:11.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["dense", "small", "matrices"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, help="default: 256 on the CPU, 512 on a GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank = arguments.rank or (512 if device == "cuda" else 256)
    results: dict[str, Any] = {}
    if "dense" in arguments.only:
        grads = gradients(DENSE, device, torch.float32)
        results["dense"] = measure({**PEERS_DENSE, **OURS_DENSE}, grads, rank, arguments.rounds)
        table(f"dense, {sum(grad.numel() for grad in grads) / 1e6:.1f} M parameters, float32", results["dense"])
        mine = results["dense"]["GaLoreAdamW without rank, 8-bit state"]["seconds"]
        other = results["dense"]["bitsandbytes AdamW8bit"].get("seconds")
        results["bitsandbytes_over_ours"] = other / mine if other else None
        print(f"bitsandbytes over ours, 8 bits: {results['bitsandbytes_over_ours']}")
    if "small" in arguments.only:
        few = (lo.GaLoreAdamW, lo.FiraAdamW, lo.APOLLOAdamW)
        peers = {name: PEERS[name] for name in (FUSED, "galore-torch GaLoreAdamW", "apollo-torch APOLLOAdamW")}
        candidates = peers | {method.__name__: ours(method) for method in few}
        results["small"] = measure(candidates, gradients(SMALL, device, torch.float32), 16, arguments.rounds)
        table("200 matrices of 64 × 64, float32, rank 16, between refreshes", results["small"])
    if "matrices" in arguments.only:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        grads = gradients(LAYERS[device], device, dtype)
        methods = {method.__name__: ours(method) for method in lo.METHODS.values()}
        results["matrices"] = measure({**PEERS, **methods}, grads, rank, arguments.rounds)
        results["rank"] = rank
        table(f"matrices of LLaMA layers, {dtype}, rank {rank}, between refreshes", results["matrices"])
    print(f"\n{environment()}")
    name = "".join(c if c.isalnum() else "-" for c in environment()["device"].lower()).strip("-")
    if set(arguments.only) == set(parts):
        write("step_time" if device == "cpu" else f"step_time-{name}", results)


if __name__ == "__main__":
    main()
