#!/bin/bash
# Mixture-of-Depths against the dense decoder and a choice at random: experiments/mod/run.sh
source "$(dirname "$0")/../common.sh"

compare text_image --arm "dense=mod,model.block_pattern=('untied',)" --arm mod=mod \
  --arm random=mod:random
price text_image
