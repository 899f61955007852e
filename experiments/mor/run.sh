#!/bin/bash
# Mixture-of-Recursions against dense and recursive decoders of eight layers: experiments/mor/run.sh
source "$(dirname "$0")/../common.sh"

compare text_image \
  --arm "dense=recursive,model.block_pattern=('untied',),model.num_layers=8" \
  --arm recursive=recursive --arm expert=mor --arm sharing=mor:sharing
price text_image
