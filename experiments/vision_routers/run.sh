#!/bin/bash
# Six routers and the dense model at equal training FLOPs: experiments/vision_routers/run.sh
# Needs `apt-get install dataset-fashion-mnist` and `moejax prepare emoji3m`.
source "$(dirname "$0")/../common.sh"

# Pictures, not the sequences of the other comparisons; as many of the held-out ones as cost a
# quarter of the training.
DATA=()
FRAME=(--schedule wsd --evaluations 6 --config.eval.batches=40)

# arms SUFFIX: the flags of the seven arms.
arms() {
  for name in dense softmax_token sinkhorn_token softmax_expert sinkhorn_expert sparse_expert soft; do
    echo "--arm $name=vision_routers:$name$1"
  done
}

# shellcheck disable=SC2046
fashion_mnist() {
  BUDGET="${FASHION_BUDGET:-flops=3e12}"
  compare fashion_mnist $(arms "") --config.eval.metrics="('accuracy','accuracy@test/0')" \
    --also image/accuracy,test/image/accuracy
}

# shellcheck disable=SC2046
emoji3m() {
  BUDGET="${EMOJI_BUDGET:-flops=4e12}"
  compare emoji3m $(arms _clip) --config.eval.metrics="('retrieval','retrieval@test/0')" \
    --also image_to_text/recall_at_10,text_to_image/recall_at_10,test/image_to_text/recall_at_10
}

both() {
  fashion_mnist
  emoji3m
}

on_each_core both
