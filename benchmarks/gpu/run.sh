#!/usr/bin/env bash
# Everything that needs a GPU, in about ten minutes: tests marked gpu, benchmarks/step_time.py, benchmarks/kernels.py, and the steps of
# benchmarks/gpu/static.py, measured beside their estimate.
#
#     bash benchmarks/gpu/run.sh                  from anywhere; installs nothing, and uses the Python that PYTHON names
#
# JSON files go to $OUT (default: benchmarks/results), logs beside them. A part that fails does not stop the others; the exit status
# is 1 if any did. Without a GPU it says so and exits with 0.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT" || exit 1
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-$(if [ -x .venv/bin/python ]; then echo .venv/bin/python; else echo python3; fi)}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
mkdir -p "$OUT"
failed=()

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No GPU here (or $PYTHON has no torch): nothing to run."
  exit 0
fi

"$PYTHON" - <<'PY'
import platform
import torch
try:
    import triton
    version = triton.__version__
except ImportError:
    version = "none"
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {version}, Python {platform.python_version()}")
PY

# part NAME SECONDS COMMAND…: run it, with its output on the screen and in a log.
part() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "── $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
  echo "── $name took $((SECONDS - began)) s"
}

# The CUDA library, where nvcc is there: for this device alone, in a directory of its own.
if command -v nvcc > /dev/null; then
  library=$(mktemp -d)
  trap 'rm -rf "$library"' EXIT
  part build-cuda 45 "$PYTHON" -c "
import torch
from pathlib import Path
from lowrank_optim.kernels.cuda.build import build
major, minor = torch.cuda.get_device_capability()
print(build(Path('$library'), (10 * major + minor,)))"
  if [ -f "$library/liblowrank_optim_cuda.so" ]; then
    export LOWRANK_OPTIM_CUDA_LIBRARY="$library/liblowrank_optim_cuda.so"
  fi
fi

# Only the files with such tests: the others may need packages that are not here.
mapfile -t marked < <(grep -rl 'mark\.gpu' --include='test_*.py' tests)
part tests-gpu 200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${marked[@]}"
if [ -f benchmarks/step_time.py ]; then
  part step-time 120 "$PYTHON" benchmarks/step_time.py
  # Its JSON lies where benchmarks/common.py writes.
  if [ "$(cd "$OUT" && pwd)" != "$ROOT/benchmarks/results" ]; then
    find benchmarks/results -name 'step*time*.json' -newer "$OUT/tests-gpu.log" -exec cp {} "$OUT" \;
  fi
fi
part estimate 120 "$PYTHON" benchmarks/gpu/static.py --measure --out "$OUT"
part kernels 140 "$PYTHON" benchmarks/kernels.py --seconds 90 --rounds 10 --out "$OUT"

if [ ${#failed[@]} -gt 0 ]; then
  echo "Failed: ${failed[*]}"
  exit 1
fi
echo "All parts passed; results are in $OUT."
