#!/usr/bin/env bash
# Everything that needs a GPU. Writes benchmarks/results/*_gpu.json.
#
#   benchmarks/gpu.sh [WHEELS [PART...]]
#
# Parts, each of under 8 minutes; all of them if none is named:
#   kernels  checks every kernel, times all against the peers, times a whole training step, and
#            trains the quickstart end to end on ZeRO-3
#   bench    everything's speed in one table (suite.py)
#   train    whole trainings of a model of 1.9 G parameters, ZeRO-3, bf16: packed, padded, SFTMix,
#            TRL
#   8b       a model of 7 G parameters with the optimiser on the host
#
# `train` and `8b` need ALPACA=FILE, Alpaca's JSON (tatsu-lab/stanford_alpaca, alpaca_data.json).
# Needs nothing but this repository, a Python with torch for the GPU, and a folder of wheels for
# what that Python lacks:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels -r benchmarks/gpu_wheels.txt
#   pip wheel --no-deps -w wheels deepspeed==0.19.8        # comes as source only
# Without a GPU it writes the same files with every row "not measured"; our losses then have the
# least time that an H100 can take, from their machine code. Peers without a wheel are rows "not
# measured".
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=${1:-}
PARTS=" ${*:2} "
[[ $PARTS == "  " ]] && PARTS=" kernels bench train 8b "
ALPACA=${ALPACA:-}
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

wanted() { [[ $PARTS == *" $1 "* ]]; }
# Alpaca's responses are short; 16,384 tokens of them fill a micro-batch of packed examples.
train() { # name, seconds allowed, arguments of train.py ...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" benchmarks/train.py --device cuda --data "$ALPACA" \
        --max-length 4096 --micro-batch-tokens 16384 --vocab-size 8000 --zero-stage 3 \
        --precision bf16 "$@"
}

if "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    echo "no GPU: writing rows that say so"
    wanted kernels && part kernels 60 \
        "$PYTHON" benchmarks/loss_kernels.py --device cuda --out "$OUT/kernels_gpu.json"
    wanted kernels && part step 60 \
        "$PYTHON" benchmarks/step.py --device cuda --out "$OUT/step_gpu.json"
else
    nvidia-smi --format=csv,noheader \
        --query-gpu=name,driver_version,power.limit,clocks.max.sm || true
    if wanted kernels; then
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
    wanted bench && part bench 480 "$PYTHON" benchmarks/suite.py --out "$OUT/suite_gpu.json"
    if { wanted train || wanted 8b; } && [[ ! -f $ALPACA ]]; then
        failed+=("train, 8b: ALPACA=FILE is not given")
        PARTS=" kernels "
    fi
fi
wanted train && train "whole training" 470 --hidden-size 2560 --layers 24 --examples 2000 \
    --batch-size 128 --arms packed padded sftmix trl --rounds 2 --out "$OUT/train_gpu.json"
wanted 8b && train "8b with offload" 470 --hidden-size 4096 --layers 32 --examples 1000 \
    --batch-size 256 --arms offload --rounds 1 --out "$OUT/train_8b_gpu.json"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
