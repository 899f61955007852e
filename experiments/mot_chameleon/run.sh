#!/bin/bash
# Mixture-of-Transformers against the dense decoder, part by part: experiments/mot_chameleon/run.sh
source "$(dirname "$0")/../common.sh"

arms() {  # arms CONFIG CHANGES: dense, then one part after the other untied
  local shared="model.untie.qkv=False,model.untie.out=False,model.untie.ffn=False"
  shared="$shared,model.untie.norms=False,model.untie.final_norm=False$2"
  echo --arm "dense=$1,$shared"
  echo --arm "ffn=$1,$shared,model.untie.ffn=True"
  echo --arm "ffn+attention=$1,$shared,model.untie.ffn=True,model.untie.qkv=True,model.untie.out=True"
  echo --arm "all=$1$2"
}

if [[ $SIZE == gpu ]]; then
  seeds=3 speech=(--config.data.batch_size=16 --config.data.sequence_length=704)
else
  seeds=5 speech=(--config.data.batch_size=2 --config.data.sequence_length=352 --config.eval.batches=96)
fi
compare text_image $(arms quickstart "") --seeds $seeds
compare text_image_speech $(arms quickstart:speech "") --seeds $seeds "${speech[@]}"
