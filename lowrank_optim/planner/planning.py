"""`plan`: the memory of one training set-up, from a simulated run of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.nn import quantize_weights_
from lowrank_optim.planner.choices import OptimizerChoice, resolve_optimizer
from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.memory_plan import MemoryPlan
from lowrank_optim.planner.models import ModelChoice, resolve_model
from lowrank_optim.planner.parametrizations import KEEP_WEIGHTS, ParametrizationChoice, resolve_parametrization
from lowrank_optim.planner.simulation import sharding
from lowrank_optim.planner.simulation.allocator import reserved_peak, rules_for
from lowrank_optim.planner.simulation.pretend import EFFICIENT_TAKES_GROUPS, bare
from lowrank_optim.planner.simulation.simulate import DataInForward, Run, Setting, simulate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def plan(
    model: Any,
    optimizer: Any = "galore_8bit",
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    dtype: str | torch.dtype | None = None,
    in_backward: bool = False,
    activation_checkpointing: bool = False,
    device: str | torch.device = "cuda",
    accumulate: int = 1,
    world_size: int = 1,
    fsdp: bool = False,
    weight_bits: int = 16,
    parametrization: Any = None,
    example_batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    per_layer: bool = False,
    progress: Callable[[str], None] | None = None,
) -> MemoryPlan:
    """Peak memory of training a model with an optimizer, before a byte is allocated; needs neither the memory nor a GPU.

    Runs the model, the optimizer and three steps (the first, an ordinary one, one that refreshes every subspace) on tensors without
    numbers, and follows the life of each.

    Args:
        model: an `nn.Module` (on any device, the meta device too; it is not changed), a transformers config, the path of a
            config.json or of a folder with one, or a name such as "llama-7b" or "mixtral-8x7b" (`planner.catalog.BUILT_IN`):
            language models, image classifiers, diffusion transformers.
        optimizer: a class or a name of this package or of `torch.optim`, "adamw_8bit" (bitsandbytes'), (class or name, options), or a
            function that builds one for a model, with its handles (`truncate_ranks`, an attached `SpectralSchedule`). Options of this
            package's optimizers may hold `rank` (default: a quarter of the short side), `density`, `include` and `exclude`, as
            `param_groups` takes them.
        batch_size: sequences, images or latents in a micro-batch (default 1).
        sequence_length: tokens in a sequence, for language models (default 2048).
        dtype: of weights and arithmetic; default bfloat16, or, for a module, what it has.
        in_backward: `lowrank_optim.update_in_backward`.
        activation_checkpointing: only the inputs of repeated layers are kept, and layers run again in backward.
        device: "cuda" (or another accelerator), or "cpu".
        accumulate: micro-batches in a step.
        world_size, fsdp: processes; FSDP2 if `fsdp`, else DDP. The numbers are those of one process (`planner.sharding`).
        weight_bits: 8 for int8 weights (`lowrank_optim.nn.quantize_weights_`).
        parametrization: "sltrain", or ("sltrain", {"rank": 1024, "density": 0.05}): `lowrank_optim.nn.sltrain_` changes the model
            first; "weight_normalized", "ordered" (as it is before ranks fall), "spectral", "svfit", "salt", "loldu", "nola", "tucker"
            are the other names; or a function that changes a model and returns it. Optimizers of this package then project nothing
            unless `rank` is given to them, too.
        example_batch: for any other module: a dict (keyword arguments), tuple (positional ones) or tensor that it is called with.
        loss: the loss from the model's output; default: its `loss`, or the mean of the (first) tensor.
        per_layer: also list the bytes of each layer.
        progress: called with the name of each step that is simulated.

    Returns:
        A `MemoryPlan`; print it.

    Raises:
        PlanError (a ValueError): an unknown model or optimizer, a config that lacks fields, a forward pass that needs real data.

    Not counted: memory inside of library kernels (beyond cuBLAS's workspace), NCCL buffers, the data loader, other processes,
    building the model (quantise weights before they are on the device), and the few d×r matrices more that a refresh takes where a
    gradient has fewer directions than the rank, so that Cholesky-QR fails.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
        >>> memory = lo.plan(model, ("galore", {"rank": 8}), example_batch=torch.zeros(4, 64), device="cpu")
        >>> memory.weights_bytes, memory.optimizer_state_bytes, sum(memory.state.values())
        (132352, 41584, 41584)
    """
    chosen_model, chosen_optimizer = resolve_model(model), resolve_optimizer(optimizer)
    layers = resolve_parametrization(parametrization)
    check_sizes(batch_size=batch_size, sequence_length=sequence_length, accumulate=accumulate, world_size=world_size)
    if weight_bits not in (8, 16):
        raise PlanError(f"weight_bits is {weight_bits!r}; it must be 16 (weights as they are) or 8 (int8)")
    if fsdp and world_size == 1:
        raise PlanError("fsdp is True, but world_size is 1: give the number of processes that split the model")
    if in_backward and world_size > 1 and not fsdp:
        raise PlanError("in_backward and DDP do not go together: set fsdp=True, or in_backward=False")
    if fsdp and weight_bits == 8:
        raise PlanError("fsdp and weight_bits=8 do not go together: int8 weights are not sharded by this version")
    if layers is not None and layers.name not in KEEP_WEIGHTS and weight_bits == 8:
        raise PlanError(f"{layers.name} and weight_bits=8 do not go together: its factors are not stored in int8")
    chosen_dtype = resolve_dtype(dtype, model)
    device = torch.device(device)
    length = chosen_model.length(None if example_batch is not None else sequence_length)
    setting = make_setting(
        chosen_model,
        chosen_optimizer,
        batch=_batch(chosen_model, batch_size, length, example_batch),
        dtype=chosen_dtype,
        device=device,
        loss=loss,
        in_backward=in_backward,
        activation_checkpointing=activation_checkpointing,
        accumulate=min(accumulate, 2),  # a third micro-batch finds what the second found
        weight_bits=weight_bits,
        parametrization=layers,
    )
    run = _simulate(setting, example_batch, progress or (lambda step: None))
    described = {
        "model": chosen_model.name,
        "optimizer": chosen_optimizer.name,
        "options": _plain(chosen_optimizer.options),
        "batch_size": batch_size,
        "sequence_length": None if example_batch is not None else length,
        "sample": None if example_batch is not None else chosen_model.sample,
        "dtype": "own" if chosen_dtype is None else str(chosen_dtype).removeprefix("torch."),
        "in_backward": in_backward,
        "activation_checkpointing": activation_checkpointing,
        "device": str(device),
        "accumulate": accumulate,
        "world_size": world_size,
        "fsdp": fsdp,
        "weight_bits": weight_bits,
        "parametrization": None if layers is None else {"name": layers.name} | _plain(layers.options),
    }
    return summarize(run, described, per_layer, chosen_model.notes)


def make_setting(
    model: ModelChoice,
    optimizer: OptimizerChoice,
    *,
    batch: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    loss: Callable[[Any], Tensor] | None = None,
    layers: int | None = None,
    weight_bits: int = 16,
    parametrization: ParametrizationChoice | None = None,
    **how: Any,
) -> Setting:
    """The simulation's setting; `layers` asks a transformers config for another number of layers."""

    def build() -> nn.Module:
        built = model.build(dtype, layers)
        if parametrization is not None:
            built = parametrization.convert(built)
        return quantize_weights_(built) if weight_bits == 8 else built

    return Setting(build, optimizer.build, batch, loss or default_loss, device, **how)


def summarize(
    run: Run, described: Mapping[str, Any], per_layer: bool = False, notes: tuple[str, ...] = ()
) -> MemoryPlan:
    """The plan that a simulated run amounts to; `notes` are assumptions besides."""
    rules, processes = rules_for(torch.device(described["device"]).type), described["world_size"]
    split = processes if described["fsdp"] else 1
    extra = sharding.overhead(run.parameters, processes, described["fsdp"])
    peaks = run.timeline.peaks(rules.block, split)
    moment, (_, index) = max(peaks.items(), key=lambda item: item[1][0])
    snapshot = run.timeline.snapshot(index, rules.block, split)
    fixed = {"gradients": extra["gradients"], "temporaries": extra["temporaries"] + rules.workspace}
    phases: dict[str, int] = {}
    for when, (size, _) in peaks.items():
        name = f"{when.step}, {when.phase}"
        phases[name] = max(phases.get(name, 0), size + sum(fixed.values()))
    kinds = {kind: size + fixed.get(kind, 0) for kind, size in snapshot.kinds.items()}
    reserved = peak = sum(kinds.values())
    if rules.block > 1:
        reserved = max(peak, reserved_peak(run.timeline.allocations(split)) + sum(fixed.values()))
    return MemoryPlan(
        **{f"{kind}_bytes": size for kind, size in kinds.items()},
        reserved_bytes=reserved,
        context_bytes=rules.context,
        when=str(moment),
        state=dict(run.state) if split == 1 else snapshot.parts,
        phases=phases,
        setting=dict(described),
        layers=snapshot.owners if per_layer else None,
        assumptions=(*assumptions(described, bool(rules.context)), *notes),
    )


def assumptions(setting: Mapping[str, Any], on_gpu: bool) -> tuple[str, ...]:
    """What the numbers rest on."""
    said = []
    if on_gpu:
        said.append("attention by the flash or memory-efficient kernel, which keep no scores")
        if not EFFICIENT_TAKES_GROUPS:
            when = " and a mask" if setting["dtype"] in ("bfloat16", "float16") else ""
            said.append(
                f"attention with fewer heads of key and value{when} by the math kernel, which keeps scores (torch before 2.14)"
            )
        said.append("a CUDA context of 512 MiB, a cuBLAS workspace of 32 MiB, allocations in multiples of 512 bytes")
    if setting["world_size"] > 1 and not setting["fsdp"]:
        said.append("DDP's buckets: a second copy of all gradients")
    if setting["fsdp"]:
        said.append(
            "FSDP2: two layers' weights and one layer's gradients gathered at a time, besides what is in no layer; an upper bound, "
            "as working copies of the optimizer count as those of whole tensors"
        )
    return tuple(said)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold."""
    return {k: v for k, v in options.items() if isinstance(v, (int, float, str, bool, type(None)))}


def _simulate(setting: Setting, example: Any, progress: Callable[[str], None]) -> Run:
    """Without the example's numbers; where the forward pass reads some, with those of its integers."""
    try:
        return simulate(setting, progress)
    except DataInForward:
        if example is None:
            raise
        real = map_tensors(example, lambda t: t.cpu() if not t.is_floating_point() and not t.is_meta else bare(t))
        return simulate(replace(setting, batch=real), progress)


def _batch(model: ModelChoice, sequences: int, length: int | None, example: Any) -> Any:
    if example is not None:
        return map_tensors(example, bare)
    if model.batch is None:
        raise PlanError(
            f"{model.name} is no language model of transformers, so what it is called with is not known: give example_batch, a dict "
            "(keyword arguments), a tuple (positional arguments) or a tensor; meta tensors do"
        )
    return model.batch(sequences, length or 0)


def map_tensors(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dicts, tuples and lists, every tensor changed."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, Mapping):
        return {key: map_tensors(value, change) for key, value in item.items()}
    return type(item)(map_tensors(part, change) for part in item) if type(item) in (tuple, list) else item


def default_loss(output: Any) -> Tensor:
    """The output's `loss`, or the mean of its first tensor.

    Raises:
        PlanError: there is neither.
    """
    named = isinstance(output, Mapping)
    found = output.get("loss") if named else getattr(output, "loss", None)
    if found is None:
        items = output.values() if named else output if isinstance(output, (tuple, list)) else (output,)
        found = next((item for item in items if isinstance(item, Tensor) and item.is_floating_point()), None)
    if not isinstance(found, Tensor):
        raise PlanError(
            f"the model returns {type(output).__name__} without a loss: give loss, a function of the output"
        )
    return found if found.dim() == 0 else found.mean()


def resolve_dtype(dtype: str | torch.dtype | None, model: Any) -> torch.dtype | None:
    """The type that was asked for; None where a module keeps its own.

    Raises:
        PlanError: no type that models are trained in.
    """
    if dtype is None:
        return None if isinstance(model, nn.Module) else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise PlanError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return chosen


def check_sizes(**sizes: int | None) -> None:
    """Raise PlanError for a count below 1."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise PlanError(f"{name} is {size!r}; it must be an int of at least 1")
