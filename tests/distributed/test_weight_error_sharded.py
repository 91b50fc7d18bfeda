"""Error bits and cautious updates on sharded weights: the numbers of one process, and state that any process group can send."""

import torch

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from tests.distributed.test_fully_shard import place
from tests.oracles.distributed_harness import Model, distance, spawn, states, train, weights, whole

SHAPES = {"tall": (26, 10), "wide": (10, 33), "uneven": (17, 12), "experts": (3, 14, 9), "vector": (13,)}
CASES = [
    ({}, {"rule": "adam", "weight_error_bits": 16}),
    ({}, {"rule": "lion", "weight_error_bits": 8, "cautious_decay": True}),
    ({"rank": 2}, {"rule": "adam", "weight_error_bits": 16, "cautious": True, "cautious_decay": True}),
    ({"rank": 2}, {"rule": "adam", "residual": "norm_scaled", "weight_error_bits": 16}),
    ({"rank": 2}, {"rule": "adam", "coordinates": "columns", "weight_error_bits": 16}),
    ({}, {"rule": "adam", "state_bits": 8, "weight_error_bits": 16, "cautious": True}),
]


def compare(layout: str) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if layout == "fsdp" or len(shape) > 1}
    coded.MIN_CODED = 1
    found = {}
    for group, options in CASES:
        ends, kept = [], []
        for sharded in (False, True):
            model = Model(shapes, torch.bfloat16)
            model = place(model, layout) if sharded else model
            params = [{"params": list(model.named_parameters()), **group}]
            optimizer = lo.LowRankOptimizer(params, lr=1e-3, weight_decay=0.1, update_proj_gap=5, **options)
            before = weights(model)
            train(model, optimizer, range(8))
            ends.append({name: whole(lo.full_precision(optimizer, p)) for name, p in model.named_parameters()})
            kept.append(states(optimizer, model))
            assert all(not torch.equal(ends[-1][name], before[name].float()) for name in shapes)
            assert all(torch.equal(p, e) for p, e in zip(weights(model).values(), rounded(ends[-1]), strict=True))
        gap = distance(*ends)
        # A number on an edge goes to either side: of 2⁻¹⁶ of a weight with 8 error bits, of a level of a coded moment.
        allowed = 2e-5 if options["weight_error_bits"] == 8 else 5e-4 if "state_bits" in options else 2e-6
        if not gap < allowed:
            found[str(group), str(options)] = gap
        assert all(kept[1][name]["weight_error"].shape == shapes[name] for name in shapes)
    assert not found, found


def rounded(whole: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The nearest bfloat16, ties away from zero."""
    return [((w.view(torch.int32) + 0x8000) & -65536).view(torch.float32).to(torch.bfloat16) for w in whole.values()]


def test_sharded_rows_agree_with_one_process():
    spawn(2, compare, "fsdp")


def test_sharded_columns_agree_with_one_process():
    spawn(2, compare, "tp columns")


def resume() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def make():
        model = place(Model({"tall": (26, 10), "wide": (10, 33)}, torch.bfloat16), "fsdp")
        params = [{"params": list(model.named_parameters()), "rank": 2}]
        return model, lo.LowRankOptimizer(params, rule="adam", lr=1e-3, weight_error_bits=16)

    whole_state = StateDictOptions(full_state_dict=True)
    model, optimizer = make()
    train(model, optimizer, range(3))
    saved, values = get_optimizer_state_dict(model, optimizer, options=whole_state), weights(model)
    assert saved["state"]["tall"]["weight_error"].shape == (26, 10)
    other, resumed = make()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(values[name], p.device_mesh, p.placements))
    set_optimizer_state_dict(other, resumed, saved, options=whole_state)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(lo.full_precision(optimizer, mine)), whole(lo.full_precision(resumed, theirs)))


def test_a_whole_state_dict_is_gathered_and_resumed_exactly():
    spawn(2, resume)
