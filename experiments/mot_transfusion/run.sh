#!/bin/bash
# Mixture-of-Transformers against the dense decoder on latents: experiments/mot_transfusion/run.sh
source "$(dirname "$0")/../common.sh"

shared="model.untie.qkv=False,model.untie.out=False,model.untie.ffn=False"
shared="$shared,model.untie.norms=False,model.untie.final_norm=False"
compare text_image --arm "dense=quickstart:transfusion,$shared" --arm "MoT=quickstart:transfusion" \
  --config.data.sequence_length=176
