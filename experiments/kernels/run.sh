#!/bin/bash
# Correctness and speed of the kernels on a machine with an NVIDIA GPU, in one call of some minutes.
# experiments/kernels/run.sh [FOLDER]: writes tests.log, bench.md and bench.json there.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${1:-experiments/kernels/$(date +%F)_$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -cs 'A-Za-z0-9\n' '_')}"
mkdir -p "$OUT"
say() { echo "[$(date +%T)] $*" | tee -a "$OUT/run.log"; }

say "$(date +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
say "$(python3 -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__, jax.devices())')"

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false timeout "${TEST_SECONDS:-120}" \
  python3 -m pytest -q -m gpu -p no:cacheprovider tests/pallas_kernels >"$OUT/tests.log" 2>&1
say "tests: $(tail -1 "$OUT/tests.log")"

timeout "${KERNEL_SECONDS:-200}" moejax bench kernels --dtype bfloat16 --repeats 7 --json \
  --cases E8,E64,dispatch,combine,gather,scatter,router >"$OUT/kernels.json" 2>"$OUT/kernels.log"
say "bench kernels: exit $?"
timeout "${LAYER_SECONDS:-120}" moejax bench moe_layer --dtype bfloat16 --repeats 7 --json \
  --implementations auto,ragged_dot >"$OUT/moe_layer.json" 2>"$OUT/moe_layer.log"
say "bench moe_layer: exit $?"
say "done"
