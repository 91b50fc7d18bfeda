"""`examples/pretrain.py --in-backward`: the numbers of ordinary stepping, resumed when killed, and a table that shows the saving."""

import json

import pytest
import torch

from tests.repository.test_pretrain import kill_after, rows, run, start

pytestmark = pytest.mark.long


def test_without_clipping_the_run_has_the_numbers_of_ordinary_stepping_and_less_memory(tmp_path):
    for name, flags in (("usual", []), ("ours", ["--in-backward"])):
        run("--optimizer", "galore", "--clip", "0", "--steps", "12", "--out", str(tmp_path / name), *flags)
    for usual, ours in zip(rows(tmp_path / "usual"), rows(tmp_path / "ours"), strict=True):
        norms = usual.pop("grad_norm"), ours.pop("grad_norm")
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert ours == usual
    usual, ours = (json.loads((tmp_path / n / "result.json").read_text())["bytes"] for n in ("usual", "ours"))
    assert ours.pop("gradients, the largest of them") == 4 * 352 * 128
    assert usual.pop("gradients") == usual["weights"]
    assert ours == usual


def test_a_run_with_accumulation_and_clipping_that_is_killed_resumes_to_the_same_numbers(tmp_path):
    arguments = ["--optimizer", "galore", "--in-backward", "--accumulate", "3", "--steps", "14"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *arguments)
    kill_after(start(broken, *arguments), broken, 8)
    undisturbed.finish()
    output = start(broken, *arguments, "--resume").finish()
    assert "gradients, accumulated" in output
    assert rows(broken) == rows(whole)
    assert torch.load(whole / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"][0][
        "grad_norms"
    ].shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adamw"], "--in-backward: adamw is torch's"),
        (["--optimizer", "fira", "--accumulate", "2"], "--in-backward: accumulate is 2, but residual='norm_scaled'"),
    ],
    ids=["adamw", "fira"],
)
def test_what_cannot_be_updated_in_backward_ends_with_a_message(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(*arguments, "--in-backward", "--out", str(tmp_path / "run"))
    assert message in capsys.readouterr().err
