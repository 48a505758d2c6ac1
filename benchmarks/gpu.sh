#!/usr/bin/env bash
# Everything that needs a GPU, in one go of under 8 minutes: checks every kernel, times all against
# the peers, times a whole training step, and trains the quickstart end to end on ZeRO-3. Writes
# benchmarks/results/*_gpu.json.
#
#   benchmarks/gpu.sh [WHEELS]
#
# Needs nothing but this repository, a Python with torch for the GPU, and a folder of wheels for
# what that Python lacks:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels -r benchmarks/gpu_wheels.txt
#   pip wheel --no-deps -w wheels deepspeed==0.19.8        # comes as source only
# Without a GPU it writes the same files with every row "not measured". Peers without a wheel are
# rows "not measured".
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=${1:-}
OUT=${RESULTS:-benchmarks/results}
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}

if [[ -n $WHEELS ]]; then
    "$PYTHON" -m venv --system-site-packages .venv-gpu
    PYTHON=.venv-gpu/bin/python
    # Each by itself: one wheel of another platform must not keep the others out.
    for wheel in "$WHEELS"/*.whl; do
        "$PYTHON" -m pip install --quiet --no-index --no-deps "$wheel" || echo "left out: $wheel"
    done
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
part() { # name, seconds allowed, command ...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed+=("$name (exit $?)")
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: writing rows that say so"
    part kernels 60 "$PYTHON" benchmarks/loss_kernels.py --device cuda --out "$OUT/kernels_gpu.json"
    part step 60 "$PYTHON" benchmarks/step.py --device cuda --out "$OUT/step_gpu.json"
else
    nvidia-smi --format=csv,noheader \
        --query-gpu=name,driver_version,power.limit,clocks.max.sm || true
    part "kernels against the reference" 120 \
        "$PYTHON" -m pytest -q -x --no-header tests/kernels/test_gpu.py
    part "kernels against the peers" 200 \
        "$PYTHON" benchmarks/loss_kernels.py --rounds 10 --memory --out "$OUT/kernels_gpu.json"
    part "whole training step" 60 \
        "$PYTHON" benchmarks/step.py --hidden-size 1024 --layers 8 --vocab-size 32000 \
        --zero-stage 3 --out "$OUT/step_gpu.json"
    part "quickstart, end to end" 90 \
        "$PYTHON" -m sftmix.cli run configs/quickstart.yaml run.dir=runs/quickstart-gpu
fi
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
