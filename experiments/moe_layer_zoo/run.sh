#!/bin/bash
# Published layers of experts in one frame (pre-norm, no QK-norm, as many key heads as queries):
# experiments/moe_layer_zoo/run.sh
source "$(dirname "$0")/../common.sh"

arms=(--arm "dense=chameleon,model.norm_placement=pre,model.qk_norm=none")
for name in switch gshard deepseek_moe deepseek_v3 moe_plus_plus coe rexmoe openmoe; do
  arms+=(--arm "$name=$name,model.num_kv_heads=0")
done
compare text_image "${arms[@]}"
