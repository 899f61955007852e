#!/bin/bash
# MoMa against the dense decoder, and experts of both modalities mixed: experiments/moma/run.sh
source "$(dirname "$0")/../common.sh"

compare text_image --arm dense=chameleon --arm 1t1i=moma:1t1i --arm 4t4i=moma:4t4i \
  --arm "8 mixed=moma:4t4i,model.moe.allowed=()"
