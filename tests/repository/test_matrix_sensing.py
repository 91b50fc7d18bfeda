"""examples/matrix_sensing.py: what theory says of matrix sensing holds, and GaLoreAdamW does on it what it should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import lowrank_optim as lo

pytestmark = pytest.mark.long


def load_example() -> ModuleType:
    """The example as a module; examples are scripts, not a package."""
    path = Path(__file__).parents[2] / "examples" / "matrix_sensing.py"
    spec = importlib.util.spec_from_file_location("matrix_sensing", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sensing = load_example()


# --- rates of gradient descent on factors ------------------------------------------------------------------------------------------


SEEDS = [0, pytest.param(1, marks=pytest.mark.full)]


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def rates(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return sensing.rates(request.param, steps=4000)


def test_symmetric_factors_with_too_many_columns_slow_down_to_inverse_square(rates: dict[str, Tensor]) -> None:
    errors = rates["symmetric, width 6"]
    exponent, fit = sensing.power_law(errors)
    assert -2.1 < exponent < -1.7
    assert fit > 0.999
    # The lower bound itself: T² times the error does not fall, where a linear rate would lose many orders.
    scaled = errors * torch.arange(len(errors), dtype=errors.dtype) ** 2
    assert 0.9 < float(scaled[-1] / scaled[len(errors) // 2]) < 1.3
    assert float(errors[-1]) > 1e-7


def test_symmetric_factors_of_the_right_rank_converge_linearly(rates: dict[str, Tensor]) -> None:
    errors = rates["symmetric, width 3 = rank"]
    rate, fit = sensing.linear_rate(errors)
    assert rate < -0.03  # decades an iteration
    assert fit > 0.99
    assert float(errors[-1]) < 1e-25


def test_imbalanced_asymmetric_factors_with_too_many_columns_converge_linearly(rates: dict[str, Tensor]) -> None:
    errors = rates["asymmetric, width 6"]
    rate, fit = sensing.linear_rate(errors)
    assert rate < -0.007
    assert fit > 0.99
    assert float(errors[-1]) < 1e-25


def test_power_law_and_linear_rate_recover_known_laws() -> None:
    times = torch.arange(1, 5001, dtype=torch.float64)
    assert sensing.power_law(3.0 * times**-2) == pytest.approx((-2.0, 1.0), abs=1e-2)
    assert sensing.linear_rate(10.0 ** (-0.02 * times)) == pytest.approx((-0.02, 1.0), abs=1e-9)


# --- gross corruption ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def robust(request: pytest.FixtureRequest) -> dict[str, float]:
    return {name: float(errors[-1]) for name, errors in sensing.robust(request.param).items()}


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
    problem = sensing.psd_problem(20, 3, 2000, torch.Generator().manual_seed(0), corrupted=0.1)
    residual = problem.residual(problem.target)
    assert 0.08 < float((residual.abs() > 1e-12).double().mean()) < 0.12
    assert float(residual.norm()) > 2.0 * float(problem.target.norm())


# --- low-rank optimizers on the full matrix ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subspace() -> dict[tuple[str, str, str], float]:
    return {key: float(errors[-1]) for key, errors in sensing.subspace(seed=0).items()}


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
    assert sensing.rotation(*shape) < 1e-10


@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_float64_parameters_have_float64_state(projector: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(30, 40, dtype=torch.float64))
    optimizer = sensing.galore(20, "rotate", projector)(weight)
    for seed in range(2):
        weight.grad = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    state = optimizer.state[weight]
    assert {state[name].dtype for name in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float64}
    basis = state["basis"]
    assert float((basis.T @ basis - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-14


def test_float64_adafactor_reaches_the_matrix_too() -> None:
    problem = sensing.determined_problem(0)

    def build(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [weight], "rank": 4, "update_proj_gap": 20, "scale": 1.0}
        return lo.GaLoreAdafactor([group], lr=0.1, scale_parameter=False, projector="svd", stagger=False)

    assert float(sensing.train(problem, build, 500)[-1]) < 0.10


# --- the command -------------------------------------------------------------------------------------------------------------------


def test_command_prints_tables_and_writes_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    sensing.main(["robust", "rotation", "--seed", "3", "--plot", str(picture)])
    output = capsys.readouterr().out
    assert "l1, geometric steps" in output
    assert "24×24" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_an_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sensing.main(["rate"])
    assert "choose from rates, robust, subspace, rotation" in capsys.readouterr().err


def test_command_refuses_a_plot_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sensing.main(["rotation", "--plot", str(tmp_path / "out.png")])
    assert "--plot needs one of the parts" in capsys.readouterr().err
