# Sourced by the run.sh of each comparison; run.sh takes "cpu" (two cores, the default) or "gpu".
#
# Every comparison is of decoders on emoji3m in four art styles, eight variants of each training
# picture (moved, shrunk, mirrored where that changes no meaning), names in one language. The same
# command again goes on where it was stopped.
set -euo pipefail
SIZE="${1:-cpu}"
HERE="$(cd "$(dirname "$0")" && pwd)"
DATA=(--config.data.source=local:emoji3m --config.data.variants=8)
case "$SIZE" in
  cpu)
    BUDGET="${BUDGET:-flops=2e12}"
    # Small batches: at a budget this small, four times the batch learned 0.3 nats a code less. The
    # held-out pictures are about a hundred concepts in four styles.
    FRAME=(--config.data.batch_size=4 --config.data.sequence_length=160 --config.eval.batches=48)
    ;;
  gpu)
    BUDGET="${BUDGET:-flops=5e14}"
    # Four times as wide and twice as deep.
    FRAME=(--width 512 --config.model.num_layers=8 --config.model.dtype=bfloat16
      --config.data.batch_size=32 --config.data.sequence_length=320)
    ;;
  *)
    echo "usage: $0 [cpu|gpu]" >&2
    exit 2
    ;;
esac

# compare NAME ARGUMENTS...: runs it in runs/experiments and keeps what it found beside the script.
compare() {
  local name="$1" work="runs/experiments/$(basename "$HERE")_$1_$SIZE"
  shift
  moejax compare --budget "$BUDGET" "${DATA[@]}" "${FRAME[@]}" --workdir "$work" "$@"
  mkdir -p "$HERE/${name}_$SIZE"
  for file in comparison.md comparison.png comparison.csv summary.json plan.json final.csv; do
    if [ -e "$work/$file" ]; then
      cp "$work/$file" "$HERE/${name}_$SIZE"
    fi
  done
}

# on_each_core COMMAND...: once on each of two cores, where the two share the runs of a comparison.
# A model of the size "cpu" leaves much of a second core idle.
on_each_core() {
  if [ "$SIZE" != cpu ] || ! command -v taskset >/dev/null || [ "$(nproc)" -lt 2 ]; then
    "$@"
    return
  fi
  trap 'trap - INT TERM; kill 0' INT TERM
  local failed=0 processes=() core
  for core in 0 1; do
    (
      taskset -pc "$core" "$BASHPID" >/dev/null
      "$@" 2>&1 | sed -u "s/^/core $core: /"
    ) &
    processes+=($!)
  done
  for process in "${processes[@]}"; do
    wait "$process" || failed=$?
  done
  return "$failed"
}

# price NAME: what causality costs the arms of that comparison; price.md and price.csv beside it.
price() {
  python "$HERE/../depth_price.py" "runs/experiments/$(basename "$HERE")_$1_$SIZE" "$HERE/$1_$SIZE"
}
