"""The Triton backend without a GPU: the op suite under the interpreter, and every kernel compiled ahead of time.

Both need processes of their own: whether kernels are interpreted is decided when triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
LOCAL = Path(__file__).parent

GROUPS = {
    "products and elements": "not (coded_adam or quantize or pack)",
    "codes": "(coded_adam or quantize or pack)",
}


def child(*args: str, **environment: str) -> str:
    """What a Python process of this environment prints; it has to succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LOCAL.parents[1]), **environment}
    for name in {"LOWRANK_OPTIM_BACKEND", "PYTEST_XDIST_WORKER", "TRITON_INTERPRET"} - environment.keys():
        env.pop(name, None)
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=LOCAL, env=env, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def interpreted(*args: str) -> int:
    """Run tests under the interpreter; how many passed."""
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-W", "ignore")
    said = child(*options, *args, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    return int(re.search(r"(\d+) passed", said)[1])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_op_suite_passes_under_the_interpreter(group, request):
    cases = request.config.getoption("cases")
    assert interpreted("test_backends.py", "-k", f"triton and {group}", "--cases", cases) > 400


@pytest.mark.long
def test_kernels_under_the_interpreter():
    assert interpreted("test_triton_interpreted.py") > 15


AHEAD = """
import sys
from tests.oracles.triton_calls import calls
from lowrank_optim.kernels.triton import ahead

capability = int(sys.argv[1])
variants = ahead.variants_of(calls(), capability)
if sys.argv[2] == "products":
    variants = [variant for variant in variants if variant.kernel.__module__.endswith((".products", ".sparse"))]
for variant in variants:
    built = ahead.build(variant, capability)
    assert built.cubin[:4] == b"\\x7fELF"
    print(variant.name, built.registers, built.spilled, round(built.shared_kib, 1))
    assert not ahead.faults(built), f"{variant}: {ahead.faults(built)}"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "which"),
    [
        (80, "all"),  # the fewest instructions
        (90, "products"),  # which have tiles, tensor cores and shared memory of their own on each
        pytest.param(
            89, "products", marks=pytest.mark.full
        ),  # as on sm_80, in less shared memory: benchmarks/gpu/static.py
        *(pytest.param(each, "all", marks=pytest.mark.full) for each in (86, 89, 90)),
    ],
)
def test_every_kernel_compiles_ahead_of_time(capability, which, tmp_path):
    said = child("-c", AHEAD, str(capability), which, TRITON_CACHE_DIR=str(tmp_path))
    built = {line.split()[0] for line in said.splitlines()}
    names = ("products.py", "sparse.py") if which == "products" else ("*.py",)
    folder = Path(LOCAL.parents[1], "lowrank_optim", "kernels", "triton")
    sources = [path for name in names for path in folder.glob(name)]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert built == kernels


RECOMPILED = """
import torch
from lowrank_optim.kernels import arguments
from tests.oracles.triton_calls import OPS, empty
from lowrank_optim.kernels.triton import ahead

B = torch.bfloat16
ok = torch.tensor(True)

def step(t, lr, key, start):
    adam = (0.9, 0.999, 1e-8, t)
    w, g = empty(64, 512, dtype=B), empty(64, 512, dtype=B)
    noise, rounding = arguments.pack_key(key, t, start), arguments.pack_key(key, start)
    codes = [empty(64, 512, dtype=d) for d in (torch.int8, torch.uint8)]
    scales = [empty(64, 2), empty(64, 2)]
    dense = arguments.pack_scalars(*adam, lr, 1 - lr)
    OPS["adam_direct_"](empty(64, 512), empty(64, 512), empty(64, 512), arguments.pack_scalars(*adam), ok)
    OPS["adam_dense_"](w, g, empty(64, 512), empty(64, 512), dense, ok, rounding)
    folded = arguments.pack_scalars(*adam, lr, lr, 1 - lr)
    OPS["folded_adam_dense_"](w, g, empty(64, 128), empty(64, 128), folded, ok, rounding, 4)
    OPS["coded_adam_dense_"](w, g, codes[0], scales[0], codes[1], scales[1], None, dense, noise, ok, rounding, 8, 256)
    OPS["apply_"](w, empty(64, 16), empty(512, 16).mT, arguments.pack_scalars(lr, 1 - lr), None, ok, rounding, *(None,) * 4, False)
    OPS["lion_direct_"](empty(64, 512), empty(64, 512), arguments.pack_scalars(0.9, 0.99), ok)
    OPS["rmsprop_direct_"](empty(64, 512), empty(64, 512), arguments.pack_scalars(lr, 1e-8), ok)
    OPS["gaussian_"](empty(64, 512), arguments.pack_key(key))
    OPS["stochastic_round_"](w, empty(64, 512), rounding)
    OPS["quantize_rows"](empty(64, 512), None, noise, 8, True, 256)

with ahead.recorded() as first:
    step(3, 0.001, 12345, 7)
for t, lr, key, start in ((1, 1.0, 1, 1), (16, 0.0, 16, 16), (2**31, 2.0, 2**64 - 1, 2**40), (0, -1.0, 0, 0)):
    with ahead.recorded() as again:
        step(max(t, 1), lr, key, start)
    assert again == first, (t, set(again) ^ set(first))
print(len(first))
"""


def test_scalars_of_a_step_never_make_another_binary():
    assert int(child("-c", RECOMPILED)) == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_backend_says_so():
    said = child("-c", "from lowrank_optim.kernels import dispatch; print(repr(dispatch.backends()['triton']))")
    assert "Unavailable" in said
    assert "no GPU" in said
