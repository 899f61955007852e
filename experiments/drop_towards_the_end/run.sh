#!/bin/bash
# Which places of a row lose their experts: experiments/drop_towards_the_end/run.sh
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
WORK=runs/experiments/drop_towards_the_end
for policy in order priority; do
  moejax train --config openmoe --workdir "$WORK/$policy" --sweep train.seed=0,1,2 \
    --config.data.source=local:emoji3m --config.data.variants=8 --config.train.steps=200 \
    --config.model.moe.capacity="$policy" --config.model.moe.eval_capacity_factor=1.25 \
    --config.eval.metrics="('likelihood','routing')" --config.eval.batches=16
done
python "$HERE/plot.py" "$WORK" "$HERE"
