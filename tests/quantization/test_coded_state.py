"""Moments in 16, 8 and 4 bits inside the optimizers: bytes, closeness to float32 moments, resume, and what keeps 32 bits."""

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.step.state_names import STEP_STATE

RANK = 41  # odd, so that 4-bit codes end in half a byte
SHAPES = ((136, 100), (100, 136), (2, 110, 100), (120, 64), (64,))
# Dense, but for the last-but-one, whose group has no rank.
METHODS = [name for name in lo.METHODS if name not in ("apollo_mini", "ldadam")]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for shape in SHAPES]


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Gradients with a mean that stays and a spectrum that falls, so that columns of R differ in size."""
    fixed = torch.Generator().manual_seed(sum(shape))
    fresh = torch.Generator().manual_seed(1000 * step + sum(shape))
    noise, mean = torch.randn(shape, generator=fresh), torch.randn(shape, generator=fixed)
    if len(shape) > 1:
        falling = 0.93 ** torch.arange(shape[-1])
        noise, mean = noise * falling, mean * falling
    return (mean + noise) * 1e-3


def build(name: str, params: list[nn.Parameter], **options: object) -> lo.LowRankOptimizer:
    own = {"galore_adafactor": {"beta1": 0.9, "lr": None}, "frugal_sgd": {"momentum": 0.9}}
    dense = {"params": params[3:4], "rank": None}
    groups = [{"params": [*params[:3], params[4]], "rank": RANK}, dense]
    return lo.by_name(name)(groups, update_proj_gap=7, **{"lr": 1e-3, **own.get(name, {}), **options})


def run(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], start: int, stop: int) -> None:
    for step in range(start, stop):
        for param in params:
            param.grad = gradient(tuple(param.shape), step).to(param.dtype)
        optimizer.step()


def moment_bytes(rows: int, cols: int, bits: int) -> int:
    """Of one moment: codes of `rows` rows, and a scale for each block of 256 columns."""
    return rows * (-(-cols * bits // 8) + 4 * -(-cols // 256)) if bits < 16 else 2 * rows * cols


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_state_has_exactly_the_bytes_of_the_formula(bits):
    params = parameters()
    optimizer = build("galore", params, state_bits=bits)
    # Rows of R: the long side. The vector has too few elements, and keeps float32 moments.
    rows = [(136, RANK), (136, RANK), (2 * 110, RANK), (120, 64)]
    for param, (m, r) in zip(params, rows, strict=False):
        state = optimizer.state[param]
        held = sum(
            value.numel() * value.element_size()
            for name, value in state.items()
            if name not in (*STEP_STATE, "turn", "basis")
        )
        assert held == 2 * moment_bytes(m, r, bits)
        columns = 2 * r if param.dim() == 3 else r
        assert state.get("col_scale", torch.empty(0)).numel() == (columns if bits < 16 else 0)
    assert {optimizer.state[params[4]][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


FIXED = {"qgalore": {"basis_bits": 32, "overlap_threshold": None}}


@cache
def trained_exactly(name: str) -> list[nn.Parameter]:
    """After 30 steps with moments in float32."""
    exact = parameters()
    run(build(name, exact, state_bits=32, **FIXED.get(name, {})), exact, 0, 30)
    return exact


@pytest.mark.long
@pytest.mark.parametrize(("bits", "tolerance"), [(16, 0.02), (8, 0.04), (4, 0.4)])
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "sara"]
)  # single entries have no columns (test_sara)
def test_training_follows_float32_moments(name, bits, tolerance):
    exact, coded = trained_exactly(name), parameters()
    start = [p.detach().clone() for p in coded]
    optimizer = build(name, coded, state_bits=bits, **FIXED.get(name, {}))
    run(optimizer, coded, 0, 30)
    # Lion and the sign residual step by signs, where any difference is one of whole steps.
    tolerance *= 4 if "lion" in name else 1
    for a, b, before in zip(exact, coded, start, strict=True):
        assert (a - b).norm() < tolerance * (a - before).norm()
    has_moments = not optimizer.state[coded[0]].keys() <= {
        *STEP_STATE,
        "basis",
    }  # SCALE and SinkGD keep none for matrices
    assert torch.equal(exact[0], coded[0]) is not has_moments


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.float32), (8, torch.bfloat16), (4, torch.float32), (16, torch.float64)], ids=str
)
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(name, bits, dtype, tmp_path: Path):
    options = {"state_bits": bits, "stochastic_rounding": dtype == torch.bfloat16}
    whole = parameters(dtype)
    saved = build(name, whole, **options)
    run(saved, whole, 0, 5)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone()) for p in whole]
    resumed = build(name, second, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for ours, theirs in zip(resumed.state.values(), saved.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    run(saved, whole, 5, 12)
    run(resumed, second, 5, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["galore", "fira", "frugal_lion"])
def test_a_step_that_is_left_out_changes_no_code(name, bits, on_device, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    params = parameters()
    optimizer = build(name, params, state_bits=bits)
    run(optimizer, params, 0, 4)
    before = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    for state, old in zip(optimizer.state.values(), before, strict=True):
        for key in state.keys() - {"step"}:
            if key.endswith("_scale") and key != "col_scale":  # coded again: the last bit of a scale may move
                torch.testing.assert_close(state[key], old[key], rtol=1e-6, atol=0.0)
            else:
                assert torch.equal(state[key], old[key]), key


@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_reset_restarts_the_codes_and_other_policies_keep_them(bits, policy):
    params = parameters()[:1]
    optimizer = lo.GaLoreAdamW(params, rank=RANK, update_proj_gap=4, on_refresh=policy, state_bits=bits, lr=1e-3)
    exact = [nn.Parameter(p.detach().clone()) for p in params]
    peer = lo.GaLoreAdamW(exact, rank=RANK, update_proj_gap=4, on_refresh=policy, lr=1e-3)
    start = params[0].detach().clone()
    run(optimizer, params, 0, 5)  # the last of these refreshes
    run(peer, exact, 0, 5)
    error = (params[0] - exact[0]).norm() / (exact[0] - start).norm()
    assert error < (0.04 if bits == 8 else 0.4)


def test_a_checkpoint_with_other_bits_is_refused_and_changes_nothing():
    params = parameters()
    optimizer = build("galore", params, state_bits=8)
    run(optimizer, params, 0, 3)
    other = build("galore", parameters(), state_bits=4)
    before = {key: value.clone() for key, value in next(iter(other.state.values())).items()}
    with pytest.raises(ValueError, match="state_bits is 8 in the checkpoint, 4 here"):
        other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(before[key], value) for key, value in next(iter(other.state.values())).items())


def test_presets_have_the_bits_that_their_names_promise():
    params = parameters()
    eight = lo.GaLoreAdamW8bit([{"params": params[:1], "rank": RANK}, {"params": params[3:4]}])
    assert {s["exp_avg"].dtype for s in eight.state.values()} == {torch.int8}
    assert {s["exp_avg_sq"].dtype for s in eight.state.values()} == {torch.uint8}
    bases = {"basis": torch.uint8, "svd": torch.uint8, "random": None, "reference": torch.float32}
    options = {"svd": {"projector": "svd"}, "random": {"projector": "random"}, "reference": {"match_reference": True}}
    for name, dtype in bases.items():
        low_rank = {"params": [parameters()[0]], "rank": RANK}
        (state,) = lo.GaLoreAdamW8bit([low_rank], **options.get(name, {})).state.values()
        assert state["exp_avg"].dtype == torch.int8
        assert state["basis"].dtype == dtype if dtype else "basis" not in state
    entries = lo.GaLoreAdamW8bit([{"params": [parameters()[0]], "density": 0.25}], coordinates="columns")
    assert entries.param_groups[0]["basis_bits"] == 32
    quantised = lo.QGaLoreAdamW8bit([{"params": params[:1], "rank": RANK}])
    state = quantised.state[params[0]]
    assert state["basis"].dtype == torch.uint8
    assert state["basis"].shape == (100, (RANK + 1) // 2)
    assert state["gap"] == 200


@pytest.mark.parametrize("blocks", ["ascending", "random"])
def test_blocks_code_the_moments_of_their_turn_only(blocks, tmp_path: Path):
    def fresh() -> tuple[list[nn.Parameter], lo.LowRankOptimizer]:
        params = parameters()[:2]
        return params, lo.FrugalAdamW(params, density=0.5, blocks=blocks, state_bits=8, update_proj_gap=3, lr=1e-3)

    whole, uninterrupted = fresh()
    run(uninterrupted, whole, 0, 10)
    first, saved = fresh()
    run(saved, first, 0, 4)
    assert sorted(saved.state[p]["exp_avg"].numel() for p in first) == [0, 136 * 100]
    torch.save([saved.state_dict(), [p.detach() for p in first]], tmp_path / "state.pt")
    second, resumed = fresh()
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    for param, value in zip(second, values, strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(state)
    run(resumed, second, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_bfloat16_moments_are_rounded_in_chunks_as_they_are_whole(monkeypatch):
    def train() -> dict[str, torch.Tensor]:
        params = parameters()
        optimizer = build("galore", params, state_bits=16)
        run(optimizer, params, 0, 3)
        return {f"{i}.{name}": t for i, p in enumerate(params) for name, t in optimizer.state[p].items()}

    whole = train()
    monkeypatch.setattr("lowrank_optim.kernels.compute.CHUNK_ELEMENTS", 1000)
    parts = train()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert any(t.dtype == torch.bfloat16 and t.numel() > 1000 for t in whole.values())


def steep(step: int, rows: int = 512, cols: int = 96) -> torch.Tensor:
    """A gradient whose columns fall off by a thousand, and change places over the steps."""
    generator = torch.Generator().manual_seed(step)
    columns = torch.logspace(0, -3, cols).roll(step // 4)
    return torch.randn(rows, cols, generator=generator) * columns * (1.0 + torch.linspace(0, 3, rows)[:, None])


def test_column_scales_follow_the_moments_at_doubling_steps():
    param = nn.Parameter(torch.zeros(512, 96))
    optimizer = lo.GaLoreAdamW([param], lr=1e-3, rank=None, state_bits=8)
    state, changed, exact = optimizer.state[param], [], torch.zeros(512, 96, dtype=torch.float64)
    for step in range(1, 21):
        param.grad = steep(step)
        before = state["col_scale"].clone()
        optimizer.step()
        exact = 0.999 * exact + 0.001 * param.grad.double().square()
        if not torch.equal(before, state["col_scale"]):
            changed.append(step)
            root = (exact / exact.sum(1, keepdim=True)).pow(4).sum(0, keepdim=True) ** (1 / 8)
            torch.testing.assert_close(state["col_scale"].double(), root / root.max(), rtol=0.02, atol=0)
    assert changed == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", ["galore", "galore_adafactor", "frugal_lion", "frugal_sgd"])
def test_column_scales_are_measured_again_after_a_refresh(name):
    param = nn.Parameter(torch.zeros(96, 128))
    optimizer = lo.METHODS[name](
        [{"params": [param], "rank": 48}], lr=1e-3, state_bits=8, update_proj_gap=10, stagger=False
    )
    if name == "galore_adafactor":
        optimizer = lo.METHODS[name]([{"params": [param], "rank": 48}], state_bits=8, update_proj_gap=10, beta1=0.9)
    state, changed = optimizer.state[param], []
    for step in range(1, 16):
        param.grad = steep(step, 96, 128)
        before = state["col_scale"].clone()
        optimizer.step()
        if not torch.equal(before, state["col_scale"]):
            changed.append(step)
    first = [2] if name == "galore_adafactor" else [1, 2]  # whose average is zero before its first step
    assert changed == [*first, 4, 8, 11, 12, 14]


def test_the_direction_of_steep_columns_is_within_three_hundredths():
    """Of Adam in 8 bits from that in float32, where the columns of a row differ by a thousand."""
    exact, coded = (nn.Parameter(torch.zeros(512, 96)) for _ in range(2))
    plain = torch.optim.AdamW([exact], lr=1.0, weight_decay=0.0)
    optimizer = lo.GaLoreAdamW([coded], lr=1.0, rank=None, state_bits=8)
    for step in range(1, 65):
        for p in (exact, coded):
            p.grad = steep(step // 16)  # the columns change places four times
            p.data.zero_()
        plain.step()
        optimizer.step()
    assert (exact - coded).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["galore", "frugal_lion"])
def test_rows_count_alike_whatever_their_size(name):
    """A frequent token has larger gradients than a rare one, and columns of its own; rows without a gradient do not count."""
    scales = []
    for sizes in (torch.ones(512), torch.logspace(0, -6, 512)):
        param = nn.Parameter(torch.zeros(512, 96))
        optimizer = lo.METHODS[name]([{"params": [param], "rank": None}], lr=1e-3, state_bits=8)
        param.grad = steep(1) * sizes[:, None]
        param.grad[7] = 0.0
        optimizer.step()
        scales.append(optimizer.state[param]["col_scale"].clone())
    torch.testing.assert_close(*scales, rtol=2.0**-8, atol=0)
    assert scales[0].min() < 2e-3


def test_a_masked_gradient_changes_no_column_scale():
    param = nn.Parameter(torch.zeros(512, 96))
    optimizer = lo.GaLoreAdamW([param], lr=1e-3, rank=None, state_bits=8)
    optimizer._mask_on_device = True
    for step in range(1, 4):
        param.grad = steep(step)
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in optimizer.state[param].items() if name != "step"}
    param.grad = steep(4)
    param.grad[3, 5] = torch.nan
    optimizer.step()  # the fourth, in which the scales are due
    assert all(torch.equal(optimizer.state[param][name], tensor) for name, tensor in before.items())
