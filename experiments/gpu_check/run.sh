#!/bin/bash
# What one NVIDIA GPU can check in ten minutes: tests, benches, one comparison.
# experiments/gpu_check/run.sh [FOLDER]: writes check.log, tests.log, bench_*.md and the comparison there.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${1:-runs/gpu_check}"
mkdir -p "$OUT"
say() { echo "[$(date +%T)] $*" | tee -a "$OUT/check.log"; }

say "$(date +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
say "$(python3 -c 'import jax, flax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__, jax.devices())')"

# Float32 products of a GPU are of ten bits unless told otherwise; processes share the memory.
JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
  timeout "${TEST_SECONDS:-240}" python3 -m pytest -q -n "${WORKERS:-8}" -p no:cacheprovider \
  -k "not devices" -m "not slow" tests/pallas_kernels tests/ops tests/experts tests/nn \
  tests/generate/test_cache.py tests/train/test_gpu.py >"$OUT/tests.log" 2>&1
say "tests: $(tail -1 "$OUT/tests.log")"

for bench in moe_layer untied_ffn; do
  timeout 60 moejax bench "$bench" --dtype bfloat16 --implementations auto,ragged_dot --repeats 9 \
    >"$OUT/bench_$bench.md" 2>&1
  say "bench $bench: exit $?"
done

say "comparison, BUDGET=${BUDGET:-the default}"
timeout "${COMPARISON_SECONDS:-300}" experiments/mot_chameleon/run.sh gpu 2>&1 | tee -a "$OUT/check.log"
say "comparison: exit ${PIPESTATUS[0]}"
work=runs/experiments/mot_chameleon_text_image_gpu
cp "$work"/{plan.json,comparison.md,comparison.csv,comparison.png,summary.json} "$OUT" 2>/dev/null
tar -czf "$OUT/metrics.tar.gz" $(find "$work" -name metrics.jsonl) 2>/dev/null
say "done"
