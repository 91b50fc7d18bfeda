"""Consoles without UTF-8: package, examples and benchmarks print plain characters there; their files are UTF-8."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim import console
from lowrank_optim.cli import main
from lowrank_optim.kernels import dispatch
from tests.oracles.planned import two_recipes

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ENCODINGS = ("ascii", "cp1252", "cp932")  # cp932 has arrows and ×, cp1252 has × and …, both lack ✗
FIELDS = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def printed(monkeypatch, encoding: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command on a console of that encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return code, out, err


def process(tmp_path: Path, encoding: str, *arguments: str) -> str:
    """What a Python process prints on a console of that encoding; it has to succeed."""
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    env.pop("PYTHONUTF8", None)
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(encoding)
    return done.stdout.decode(encoding)


def spelled(text: str, encoding: str) -> str:
    """What is to be expected, character by character."""

    def holds(char: str) -> bool:
        try:
            char.encode(encoding)
        except UnicodeEncodeError:
            return False
        return True

    return "".join(char if holds(char) else console.SPELLED[char] for char in text)


@pytest.fixture
def model(tmp_path, monkeypatch):
    two_recipes(monkeypatch)
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(FIELDS), encoding="utf-8")
    return str(path)


def test_the_table_of_the_planner_is_the_same_on_every_console_but_for_characters_that_are_missing(model, monkeypatch):
    for budget, status, marks, plain in (
        ("1GiB", 0, "→─", "\n> AdamW: of those"),
        ("520MiB", 1, "✗─–·", "\n  * several GPUs"),
    ):
        command = ("plan", "--model", model, "--budget", budget, "--sequence-length", "64")
        code, whole, _ = printed(monkeypatch, "utf-8", *command)
        assert code == status
        assert set(marks) <= set(whole)
        for encoding in ENCODINGS:
            assert whole.encode(encoding, console.ERRORS).decode(encoding) == spelled(whole, encoding)
        code, out, err = printed(monkeypatch, "ascii", *command)
        assert (code, out) == (status, spelled(whole, "ascii"))
        assert plain in out
        assert any(set(line) == {"-"} for line in out.splitlines())
        assert err == ""


def test_help_and_errors_of_the_command_are_spelled(model, monkeypatch):
    code, out, _ = printed(monkeypatch, "ascii", "plan", "--help")
    assert code == 0
    assert "dit-xl-2, ...), or" in " ".join(out.split())
    code, out, err = printed(monkeypatch, "ascii", "plan", "--model", "größe–7b")
    assert (code, out) == (2, "")
    assert r"gr\xf6\xdfe-7b" in err


def test_json_and_the_doctor_print_on_every_console(model, monkeypatch):
    command = ("plan", "--model", model, "--optimizer", "galore", "--rank", "8", "--sequence-length", "64", "--json")
    code, out, _ = printed(monkeypatch, "ascii", *command)
    assert code == 0
    assert json.loads(out)["setting"]["options"] == {"rank": 8}
    monkeypatch.setattr("lowrank_optim.doctor.quick_cases", list)  # the self-test itself is tested elsewhere
    monkeypatch.setenv(dispatch.VARIABLE, "größe")
    code, out, _ = printed(monkeypatch, "ascii", "doctor")
    assert code == 0
    assert f"\n{dispatch.VARIABLE}=gr\\xf6\\xdfe: there is no such backend" in out


def test_the_command_itself_prints_on_a_console_of_ascii(model, tmp_path):
    command = ("-m", "lowrank_optim", "plan", "--model", model, "--optimizer", "adamw", "--sequence-length", "64")
    out = process(tmp_path, "ascii", *command)
    assert out.startswith("small with AdamW, 1 x 64 tokens, bfloat16")
    assert " MiB  ############################\n" in out


def test_what_functions_return_for_printing_is_ascii():
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(3)), torch.nn.Linear(64, 256))
    text = lo.describe(lo.param_groups(net, rank=8))
    assert "  *.weight x3  64x64   right  8     auto    low-rank   12,288" in text
    # Both ends of a long name, and no more than 120 columns.
    long = {"params": [torch.nn.Parameter(torch.zeros(64, 64))], "param_names": [f"begin{'o' * 150}end"], "rank": 8}
    row = lo.describe([long]).splitlines()[2]
    assert len(row) == 120
    assert row.startswith("  beginooo")
    assert "ooo...ooo" in row
    assert "oooend  64x64  right  8" in row
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(6)])
    described = lo.describe_layers(lo.layer_groups(torch.nn.ModuleDict({"layers": layers})))
    assert "layers 0-5    6 x     64   16.67 % each" in described
    plan = lo.plan(FIELDS, "adamw", sequence_length=64)
    assert "with AdamW, 1 x 64 tokens" in str(plan)
    for said in (text, row, described, str(plan)):
        assert said.isascii()


def test_characters_that_have_no_spelling_are_escaped_and_bytes_of_paths_do_not_raise():
    assert "größe → 埋 …".encode("ascii", console.ERRORS) == rb"gr\xf6\xdfe > \u57cb ..."
    assert "größe → 埋 …".encode("cp1252", console.ERRORS) == b"gr\xf6\xdfe > \\u57cb \x85"
    assert os.fsdecode(b"\xe9t\xe9").encode("utf-8", console.ERRORS) == rb"\udce9t\udce9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", console.ERRORS)


def test_streams_without_an_encoding_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    console.accept_any_text()
    sys.stdout.write("→\n")
    assert sys.stdout.getvalue() == "→\n"


# Scripts ----------------------------------------------------------------------------------------------------------------------


def test_the_main_job_prints_on_a_console_of_ascii(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("rich")
    small = ["--text", io.__file__, "--length", "16", "--batch", "2", "--steps", "2", "--validation-batches", "1"]
    out = process(tmp_path, "ascii", str(ROOT / "examples/pretrain.py"), *small, "--out", "größe", "--device", "cpu")
    assert "| optimizer | " in out  # rich draws with plain characters where there are no others
    assert r"wrote gr\xf6\xdfe/loss.png" in out
    assert (tmp_path / "größe" / "loss.png").exists()
    said = process(tmp_path, "ascii", str(ROOT / "examples/pretrain.py"), "--help")
    assert "--compare A,B,..." in said
    assert "1 x 2048 tokens" in " ".join(said.split())


def test_matrix_sensing_and_the_benchmarks_print_on_a_console_of_ascii(tmp_path):
    out = process(tmp_path, "ascii", str(ROOT / "examples/matrix_sensing.py"), "rotation")
    assert "24x24" in out
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import common; print('1.2× ≥ 3 µs −')"
    assert process(tmp_path, "ascii", "-c", code) == "1.2x >= 3 us -\n"


def test_every_text_file_is_opened_as_utf_8():
    """A locale's encoding would make files of one machine unreadable on another."""
    wrong, seen = [], 0
    for path in sorted(p for part in ("lowrank_optim", "examples", "benchmarks") for p in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            text |= name in ("open", "fdopen") and any(set(mode) <= set("rwax+t") for mode in modes)
            text |= name == "open" and isinstance(node.func, ast.Name)
            text &= not any("b" in mode for mode in modes if name in ("open", "fdopen"))
            seen += text
            if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert seen > 15
    assert wrong == []
