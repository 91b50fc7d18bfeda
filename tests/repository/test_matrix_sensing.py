"""examples/matrix_sensing.py: what theory says of matrix sensing holds, and GaLoreAdamW does on it what it should."""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import lowrank_optim as lo

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from sensing import completion as completing  # noqa: E402

pytestmark = pytest.mark.long


def load_example() -> ModuleType:
    """The example as a module; examples are scripts, not a package."""
    path = EXAMPLES / "matrix_sensing.py"
    spec = importlib.util.spec_from_file_location("matrix_sensing", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


example = load_example()


# --- rates of gradient descent on factors ------------------------------------------------------------------------------------------


SEEDS = [0, pytest.param(1, marks=pytest.mark.full)]


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def rates(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return example.rates(request.param, steps=4000)


def test_symmetric_factors_with_too_many_columns_slow_down_to_inverse_square(rates: dict[str, Tensor]) -> None:
    errors = rates["symmetric, width 6"]
    exponent, fit = example.power_law(errors)
    assert -2.1 < exponent < -1.7
    assert fit > 0.999
    # The lower bound itself: T² times the error does not fall, where a linear rate would lose many orders.
    scaled = errors * torch.arange(len(errors), dtype=errors.dtype) ** 2
    assert 0.9 < float(scaled[-1] / scaled[len(errors) // 2]) < 1.3
    assert float(errors[-1]) > 1e-7


def test_symmetric_factors_of_the_right_rank_converge_linearly(rates: dict[str, Tensor]) -> None:
    errors = rates["symmetric, width 3 = rank"]
    rate, fit = example.linear_rate(errors)
    assert rate < -0.03  # decades an iteration
    assert fit > 0.99
    assert float(errors[-1]) < 1e-25


def test_imbalanced_asymmetric_factors_with_too_many_columns_converge_linearly(rates: dict[str, Tensor]) -> None:
    errors = rates["asymmetric, width 6"]
    rate, fit = example.linear_rate(errors)
    assert rate < -0.007
    assert fit > 0.99
    assert float(errors[-1]) < 1e-25


def test_power_law_and_linear_rate_recover_known_laws() -> None:
    times = torch.arange(1, 5001, dtype=torch.float64)
    assert example.power_law(3.0 * times**-2) == pytest.approx((-2.0, 1.0), abs=1e-2)
    assert example.linear_rate(10.0 ** (-0.02 * times)) == pytest.approx((-0.02, 1.0), abs=1e-9)


# --- the size of the start -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1], ids="seed {}".format)
def by_scale(request: pytest.FixtureRequest) -> dict[tuple[float, bool], tuple[float, float]]:
    return {key: example.late_rate(errors) for key, errors in example.scale(request.param).items()}


def test_the_rate_of_imbalanced_factors_is_the_square_of_the_size_of_their_start(
    by_scale: dict[tuple[float, bool], tuple[float, float]],
) -> None:
    plain = {alpha: found for (alpha, changed), found in by_scale.items() if not changed}
    assert all(rate < 0 and fit > 0.99 for rate, fit in plain.values())
    sizes, rates = torch.tensor(list(plain)).log(), torch.tensor([-rate for rate, _ in plain.values()]).log()
    exponent, fit = example.fit_line(sizes, rates)
    assert 1.85 < exponent < 2.15
    assert fit > 0.99


def test_one_changed_step_makes_the_rate_independent_of_the_start_and_that_of_the_right_width(
    by_scale: dict[tuple[float, bool], tuple[float, float]],
) -> None:
    changed = {alpha: found for (alpha, changed), found in by_scale.items() if changed}
    assert all(fit > 0.999 for _, fit in changed.values())
    rates = [rate for rate, _ in changed.values()]
    assert max(rates) / min(rates) > 0.9
    assert all(changed[alpha][0] < 3 * by_scale[alpha, False][0] for alpha in changed)
    problem, rng = example.psd_problem(20, 3, 1200, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(5)
    exact, _ = example.late_rate(example.asymmetric_descent(problem, 3, 500, rng, scale=0.1))
    assert max(rates) < 0.5 * exact


def test_the_changed_step_keeps_the_product_and_makes_the_columns_orthonormal() -> None:
    rng = torch.Generator().manual_seed(0)
    f, g = (example.normal(size, 4, rng=rng) for size in (20, 15))
    new_f, new_g = example.rebalanced(f, g, 0.7)
    torch.testing.assert_close(new_f @ new_g.T, f @ g.T)
    torch.testing.assert_close(new_f.T @ new_f, 0.49 * torch.eye(4, dtype=torch.float64))
    problem = example.psd_problem(20, 3, 1200, rng)
    plain, changed = (
        example.asymmetric_descent(problem, 6, 80, torch.Generator().manual_seed(1), scale=0.4, beta=beta)
        for beta in (None, 1.0)
    )
    first = int((plain - changed).abs().gt(1e-12).nonzero()[0])
    assert 5 < first < 60
    assert float(plain[first - 1]) < 0.02 * float(
        problem.target.square().sum()
    )  # it was near when the step was changed


# --- completion ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completed() -> dict[str, tuple[Tensor, int]]:
    return example.completion(seed=0, iterations=14)


def factor_of(errors: Tensor) -> tuple[float, float]:
    """What an iteration multiplies the error by, and R² of the line."""
    rate, fit = example.fit_line(torch.arange(len(errors), dtype=errors.dtype), errors.log10())
    return 10**rate, fit


def test_alternating_minimisation_divides_the_error_in_every_iteration(
    completed: dict[str, tuple[Tensor, int]],
) -> None:
    """Published: by two at least, exact or not, where the solutions are accurate enough; log(1/ε) iterations."""
    curves = list(completed.values())
    exact, fit = factor_of(curves[0][0])
    assert exact < 0.5
    assert fit > 0.99
    for errors, _ in curves[:3]:  # exact, 3 rounds, 1 round
        found, fit = factor_of(errors)
        assert found < 1.1 * exact
        assert fit > 0.99
        assert (errors[1:] < 0.5 * errors[:-1]).all()
        assert float(errors[-1]) < 1e-7
    coarse, _ = factor_of(curves[3][0])  # the sketch alone
    assert 1.2 * exact < coarse < 0.5


def test_the_report_of_completion_has_errors_and_costs(
    completed: dict[str, tuple[Tensor, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    example.report_completion(completed)
    output = capsys.readouterr().out
    assert "sketch, 3 rounds" in output
    assert "factor an iteration" in output


def test_sketched_least_squares_become_exact_and_agree_with_lapack() -> None:
    rng = torch.Generator().manual_seed(0)
    problem = completing.completion_problem(60, 200, 12, 0.4, rng)
    seen = problem.by_rows
    noisy = completing.Seen(
        seen.columns, seen.values + torch.randn(seen.values.shape, generator=rng) * seen.there, seen.there
    )
    factor = torch.linalg.qr(torch.randn(200, 12, generator=rng, dtype=torch.float64)).Q
    expected = torch.stack(
        [
            torch.linalg.lstsq(factor[columns[there]], values[there].unsqueeze(1), driver="gelsd").solution.squeeze(1)
            for there, columns, values in zip(noisy.there.bool(), noisy.columns, noisy.values, strict=True)
        ]
    )
    exact, work = completing.exact_rows(noisy, factor)
    torch.testing.assert_close(exact, expected, atol=1e-10, rtol=1e-10)
    assert work == noisy.count * 144
    errors = [
        float((completing.sketched_rows(rounds, rng)(noisy, factor)[0] - expected).norm() / expected.norm())
        for rounds in (0, 2, 4, 8, 40)
    ]
    assert all(later < 0.4 * sooner for sooner, later in pairwise(errors[:4]))
    assert errors[-1] < 1e-12


def test_the_exact_reference_is_that_of_scipy() -> None:
    scipy = pytest.importorskip("scipy.linalg")
    problem = completing.completion_problem(8, 50, 3, 0.5, torch.Generator().manual_seed(0))
    factor = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, _ = completing.exact_rows(problem.by_rows, factor)
    seen = problem.by_rows
    for row, there, columns, values in zip(found, seen.there.bool(), seen.columns, seen.values, strict=True):
        expected = scipy.lstsq(factor[columns[there]].numpy(), values[there].numpy())[0]
        assert row.numpy() == pytest.approx(expected, rel=1e-12)


def test_the_cost_of_the_sketch_is_near_the_entries_times_the_rank() -> None:
    cost = completing.cost_by_rank()
    growth = [[math.log2(cost[2 * rank][side] / cost[rank][side]) for rank in (8, 16)] for side in (0, 1)]
    assert all(1.95 < exponent < 2.05 for exponent in growth[0])  # |Ω|·k²
    assert all(1.0 < exponent < 1.25 for exponent in growth[1])  # |Ω|·k, and 8·k³ a row
    assert cost[32][1] < 0.5 * cost[32][0]


def test_known_entries_are_those_of_the_mask_and_the_start_is_near() -> None:
    problem = completing.completion_problem(40, 30, 2, 0.5, torch.Generator().manual_seed(0))
    dense = torch.zeros(40, 30, dtype=torch.float64)
    seen = problem.by_rows
    dense.scatter_add_(1, seen.columns, seen.values)
    known = dense != 0
    assert 0.4 < float(known.double().mean()) < 0.6
    torch.testing.assert_close(dense[known], problem.target[known])
    other = torch.zeros(30, 40, dtype=torch.float64).scatter_add_(
        1, problem.by_columns.columns, problem.by_columns.values
    )
    assert torch.equal(other.T, dense)
    assert seen.count == int(known.sum())
    v = completing.start(problem, 2, torch.Generator().manual_seed(1), rounds=60)
    right = torch.linalg.svd(dense).Vh[:2].T
    torch.testing.assert_close(v @ v.T, right @ right.T, atol=1e-6, rtol=0)


# --- gross corruption ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def robust(request: pytest.FixtureRequest) -> dict[str, float]:
    return {name: float(errors[-1]) for name, errors in example.robust(request.param).items()}


def test_subgradient_descent_from_a_small_start_recovers_the_matrix_under_gross_corruption(
    robust: dict[str, float],
) -> None:
    assert robust["l1, geometric steps"] < 1e-3
    assert robust["l1, polynomial steps"] < 3e-2


def test_small_initialisation_is_needed_with_a_square_factor(robust: dict[str, float]) -> None:
    assert robust["l1, geometric steps, large start"] > 100 * robust["l1, geometric steps"]
    assert robust["l1, geometric steps, large start"] > 0.05


def test_gradient_descent_on_squares_fits_the_corruption(robust: dict[str, float]) -> None:
    assert robust["l2, constant steps"] > 1.0


def test_corruption_hits_the_given_share_of_the_measurements_and_no_other() -> None:
    problem = example.psd_problem(20, 3, 2000, torch.Generator().manual_seed(0), corrupted=0.1)
    residual = problem.residual(problem.target)
    assert 0.08 < float((residual.abs() > 1e-12).double().mean()) < 0.12
    assert float(residual.norm()) > 2.0 * float(problem.target.norm())


# --- low-rank optimizers on the full matrix ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subspace() -> dict[tuple[str, str, str], float]:
    return {key: float(errors[-1]) for key, errors in example.subspace(seed=0).items()}


@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_rank_4_reaches_a_matrix_of_rank_6_when_the_subspace_moves(
    subspace: dict[tuple[str, str, str], float], projector: str, policy: str
) -> None:
    assert subspace["every 20", policy, projector] < 0.10


@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_rank_4_stalls_on_a_matrix_of_rank_6_in_one_subspace(
    subspace: dict[tuple[str, str, str], float], projector: str
) -> None:
    assert subspace["never", "–", projector] > 0.30


def test_galore_torch_gives_comparable_errors(subspace: dict[tuple[str, str, str], float]) -> None:
    pytest.importorskip("galore_torch")
    assert subspace["every 20", "keep", "galore_torch"] < 0.10
    # In one subspace nothing but the placement of epsilon differs (the bases are float32 there).
    assert subspace["never", "–", "galore_torch"] == pytest.approx(subspace["never", "–", "svd"], rel=1e-3)


# --- float64 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)], ids=str)
def test_full_rank_galore_adamw_is_adamw_on_the_rotated_matrix(shape: tuple[int, int]) -> None:
    assert example.rotation(*shape) < 1e-10


@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_float64_parameters_have_float64_state(projector: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(30, 40, dtype=torch.float64))
    optimizer = example.galore(20, "rotate", projector)(weight)
    for seed in range(2):
        weight.grad = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    state = optimizer.state[weight]
    assert {state[name].dtype for name in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float64}
    basis = state["basis"]
    assert float((basis.T @ basis - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-14


def test_float64_adafactor_reaches_the_matrix_too() -> None:
    problem = example.determined_problem(0)

    def build(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [weight], "rank": 4, "update_proj_gap": 20, "scale": 1.0}
        return lo.GaLoreAdafactor([group], lr=0.1, scale_parameter=False, projector="svd", stagger=False)

    assert float(example.train(problem, build, 500)[-1]) < 0.10


# --- the command -------------------------------------------------------------------------------------------------------------------


def test_command_prints_tables_and_writes_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    example.main(["robust", "rotation", "--seed", "3", "--plot", str(picture)])
    output = capsys.readouterr().out
    assert "l1, geometric steps" in output
    assert "24×24" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_an_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["rate"])
    assert "choose from rates, scale, robust, completion, subspace, rotation" in capsys.readouterr().err


def test_command_refuses_a_plot_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["rotation", "--plot", str(tmp_path / "out.png")])
    assert "--plot needs one of the parts" in capsys.readouterr().err
