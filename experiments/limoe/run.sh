#!/bin/bash
# LIMoE with and without what keeps a modality on several experts: experiments/limoe/run.sh
# Needs `moejax prepare emoji3m`.
source "$(dirname "$0")/../common.sh"

BUDGET="${LIMOE_BUDGET:-steps=500}"
DATA=()
USED=routing/image/experts_used,routing/text/experts_used,routing/dead_experts
RECALL=image_to_text/recall_at_10,text_to_image/recall_at_10
FRAME=(--rates 1e-3 --evaluations 5 --also "$USED,$RECALL" --config.eval.batches=20
  --config.eval.metrics="('retrieval', 'routing')")
Z="{'name': 'z', 'coefficient': 1e-4}"
SPREAD="{'name': 'importance', 'coefficient': 0.005}, {'name': 'load', 'coefficient': 0.005}"
on_each_core compare emoji3m --arm all=limoe:emoji3m \
  --arm "no_entropy=limoe:emoji3m,model.moe.losses=($SPREAD, $Z)" \
  --arm "no_spread=limoe:emoji3m,model.moe.losses=($Z,)"
python "$HERE/../marks.py" "runs/experiments/limoe_emoji3m_$SIZE" "$HERE/emoji3m_$SIZE/experts.png" \
  "experts that patches use=routing/image/experts_used" \
  "experts that words use=routing/text/experts_used"
