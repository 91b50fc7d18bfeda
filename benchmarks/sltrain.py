"""One linear layer in four forms: bytes of weights, index, gradients and state, peak memory of a step, and its time.

    dense           W
    low rank        W = s·B A
    released        W = s·B A + S as the released code computes it: dense W in the forward pass and again in backward, dense ∂W, int64
                    indices, and a scaled copy of A that lives from one to the other (written anew here, in torch's operations)
    sltrain         W = s·B A + S of this package

The shapes are those of a layer of LLaMA-350M, with its rank and density in the paper. All have the same optimizer, Adam with float32
state, so that what differs is the layer. Memory is counted from the life of tensors (`memory_tracker.py`), to the byte: `peak` is
what forward, backward and step make beyond weights, index and state, which exist before; what kernels take within an operation is
not seen. Times are medians of interleaved runs of one process, `pass` of forward and backward, `step` with the optimizer. On the CPU
they are CPU time of one thread, which other processes disturb less than they disturb the clock on the wall; `noise` is the ratio of
two dense layers.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import rounds_of, write
from memory_tracker import PeakMemory
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.kernels import Unavailable, backends
from lowrank_optim.nn import SparseLowRankLinear

SHAPES = ((1024, 2736), (2736, 1024), (1024, 1024))
RANK, DENSITY, ALPHA = 256, 0.03, 16.0
FORMS = ("dense", "low rank", "released", "sltrain")


class ReleasedProduct(torch.autograd.Function):
    """y = x (B A' + S)ᵀ with a dense W, made in both directions."""

    @staticmethod
    def weight(b: Tensor, scaled_a: Tensor, values: Tensor, index: Tensor) -> Tensor:
        weight = b @ scaled_a
        weight.view(-1).scatter_add_(0, index, values)
        return weight

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, scaled_a: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, b, scaled_a, values, index)
        return x @ ReleasedProduct.weight(b, scaled_a, values, index).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, scaled_a, values, index = ctx.saved_tensors
        weight = ReleasedProduct.weight(b, scaled_a, values, index)
        grad_weight = grad.mT @ x  # both alive
        return grad @ weight, grad_weight @ scaled_a.mT, b.mT @ grad_weight, grad_weight.view(-1)[index], None


class ReleasedLinear(nn.Module):
    """The layer as it is released: indices are a sorted part of a permutation of all m·n."""

    def __init__(self, n: int, m: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        like = {"dtype": dtype, "device": device}
        bound, count = 1 / math.sqrt(n), math.floor(DENSITY * m * n)
        self.lora_A = nn.Parameter(torch.empty(RANK, n, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(m, RANK, **like))
        self.sparse_value = nn.Parameter(torch.empty(count, **like).uniform_(-bound, bound))
        index = torch.randperm(m * n)[:count].sort().values
        self.register_buffer("sparse_index", index.to(device))

    def forward(self, x: Tensor) -> Tensor:
        return ReleasedProduct.apply(x, self.lora_B, self.lora_A * (ALPHA / RANK), self.sparse_value, self.sparse_index)


def build(form: str, m: int, n: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer without bias."""
    torch.manual_seed(0)
    if form == "released":
        return ReleasedLinear(n, m, dtype, device)
    if form == "dense":
        return nn.Linear(n, m, bias=False, dtype=dtype, device=device)
    density = DENSITY if form == "sltrain" else 0.0
    return SparseLowRankLinear(n, m, rank=RANK, density=density, alpha=ALPHA, bias=False, dtype=dtype, device=device)


def both_passes(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Forward and backward; the input wants its gradient, as within a model."""
    layer(x).backward(grad)
    x.grad = None
    for param in layer.parameters():
        param.grad = None


def whole_step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, grad: Tensor) -> None:
    layer(x).backward(grad)
    x.grad = None
    optimizer.step()
    optimizer.zero_grad()


def optimizer_for(layer: nn.Module, bits: int = 32) -> lo.LowRankOptimizer:
    return lo.LowRankOptimizer(list(layer.named_parameters()), rule="adam", lr=1e-3, state_bits=bits)


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(form: str, m: int, n: int, x: Tensor, grad: Tensor) -> dict[str, int]:
    """Exact bytes."""
    layer = build(form, m, n, x.dtype, x.device)
    optimizer = optimizer_for(layer)
    whole_step(layer, optimizer, x, grad)
    layer(x).backward(grad)
    gradients = nbytes(param.grad for param in layer.parameters())
    optimizer.zero_grad()
    x.grad = None
    with PeakMemory() as memory:
        whole_step(layer, optimizer, x, grad)
    found = {
        "parameters": sum(param.numel() for param in layer.parameters()),
        "weights": nbytes(layer.parameters()),
        "index": nbytes(layer.buffers()),
        "gradients": gradients,
        "state": sum(lo.state_bytes(optimizer).values()),
        "state_8bit": sum(lo.state_bytes(optimizer_for(layer, 8)).values()),
        "peak": memory.peak,
    }
    return found | {"all": found["weights"] + found["index"] + found["state"] + found["peak"]}


def times_of(m: int, n: int, x: Tensor, grad: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of `pass` and `step`, and the median ratio to the dense layer within a round."""
    candidates: dict[str, Callable[[], object]] = {}
    for name in (*FORMS, "dense again"):
        layer = build(name.removesuffix(" again"), m, n, x.dtype, x.device)
        candidates[f"{name}, pass"] = partial(both_passes, layer, x, grad)
        candidates[f"{name}, step"] = partial(whole_step, layer, optimizer_for(layer), x, grad)
    clock = time.perf_counter if x.is_cuda else time.process_time
    times = rounds_of(candidates, rounds, clock=clock)
    found: dict[str, dict[str, float]] = {}
    for name in (*FORMS, "dense again"):
        found[name] = {}
        for what in ("pass", "step"):
            own, dense = times[f"{name}, {what}"], times[f"dense, {what}"]
            found[name][what] = middle(own)
            found[name][f"{what}_over_dense"] = middle([a / b for a, b in zip(own, dense, strict=True)])
    return found


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input (default 1024)")
    parser.add_argument("--rounds", type=int, default=11, help="timed runs of each (default 11)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default float32,bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = torch.device(args.device), []
    for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
        for m, n in SHAPES:
            x = torch.randn(args.tokens, n).to(device, dtype).requires_grad_()
            grad = torch.randn(args.tokens, m).to(device, dtype)
            times = times_of(m, n, x, grad, args.rounds)
            for form in FORMS:
                row = {"dtype": str(dtype).removeprefix("torch."), "shape": [m, n], "form": form}
                row |= {"bytes": memory_of(form, m, n, x, grad), "seconds": times[form]}
                row["noise"] = times["dense again"]["pass_over_dense"]
                rows.append(row)
                say(row)
    setting = {"tokens": args.tokens, "rank": RANK, "density": DENSITY, "rounds": args.rounds, "state": "float32"}
    there = [name for name, loaded in backends().items() if not isinstance(loaded, Unavailable)]
    write("sltrain", {"setting": setting, "backends": there, "layers": rows})


def say(row: dict[str, Any]) -> None:
    sizes, seconds, mib = row["bytes"], row["seconds"], 2**20
    parts = "  ".join(f"{name} {sizes[name] / mib:6.2f}" for name in ("weights", "index", "gradients", "state", "peak"))
    print(
        f"{row['dtype']:<8} {row['shape'][0]}x{row['shape'][1]} {row['form']:<9} {parts}  all {sizes['all'] / mib:6.2f} MiB  pass "
        f"{1000 * seconds['pass']:6.1f} ms ({seconds['pass_over_dense']:.2f}x dense, noise {row['noise']:.2f}x)  step "
        f"{1000 * seconds['step']:6.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
