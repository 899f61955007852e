#!/bin/bash
# Four diffusion transformers at equal FLOPs: experiments/dit_moe/run.sh [cpu|gpu]
# Needs `apt-get install dataset-fashion-mnist` and `pip install 'moejax[metrics]'`.
source "$(dirname "$0")/../common.sh"

JUDGE=runs/experiments/dit_moe_judge
METRICS=fd_efflite0,floor_fd_efflite0,kid_efflite0,precision,recall,density,coverage
METRICS+=,nearer_to_train,memorised,class_accuracy,real_class_accuracy
ALSO="test/fidelity/${METRICS//,/,test/fidelity/}"
DATA=()
FRAME=(--schedule wsd --evaluations 8 --rates 2e-3,4e-3,8e-3 --config.eval.batches=40
  --config.eval.metrics="('denoising', 'fidelity@test/0')" --also "$ALSO"
  --config.eval.fidelity.classifier="$JUDGE")
if [ "$SIZE" = cpu ]; then
  BUDGET="${DIT_BUDGET:-flops=8e12}"
  WIDTH=64
  FRAME+=(--config.eval.fidelity.pictures="${PICTURES:-2000}" --config.eval.fidelity.steps=25)
else
  BUDGET="${DIT_BUDGET:-flops=1.5e15}"
  # Four times as wide and twice as deep.
  WIDTH=256
  FRAME+=(--config.eval.fidelity.pictures=10000 --config.eval.fidelity.steps=50
    --config.model.d_model=256 --config.model.num_heads=8 --config.model.num_layers=8
    --config.model.dtype=bfloat16 --config.data.batch_size=256)
fi
# All are rectified flow with time logit-normal, as DiT-MoE and ProMoE are; SiT is that with an even
# time that runs the other way. Two SwiGLU experts and the shared one cost what its layer does.
EXPERT=$((WIDTH * 68 / 64))
ARMS=(
  --arm "DiT=sit,objective.direction=to_noise,objective.times.distribution=logit_normal,model.ffn_hidden=($((4 * WIDTH)),)"
  --arm "DiT-MoE=dit_moe,model.moe.hidden=$EXPERT,model.moe.shared_hidden=$((EXPERT / 2))"
  --arm "ProMoE=promoe,model.ffn_hidden=($((4 * WIDTH)),),model.moe.hidden=$((2 * WIDTH)),model.moe.shared_hidden=$((2 * WIDTH))"
  --arm "EC-DiT=ec_dit,model.ffn_hidden=($((4 * WIDTH)),),model.moe.hidden=$((4 * WIDTH))"
)

# What finds the classes of samples is trained by itself.
moejax train --config vit --workdir "$JUDGE" --config.train.steps="${JUDGE_STEPS:-5000}"
on_each_core compare fashion_mnist "${ARMS[@]}"
WORK=runs/experiments/dit_moe_fashion_mnist_$SIZE
OUT="$HERE/fashion_mnist_$SIZE"
python "$HERE/pictures.py" "$WORK" "$OUT/grid.png"
METRIC=test/fidelity
python "$HERE/../marks.py" "$WORK" "$OUT/fidelity.png" \
  "FD-EffLite0 (less is better); dashed: real=$METRIC/fd_efflite0:$METRIC/floor_fd_efflite0" \
  "class found; dashed: real=$METRIC/class_accuracy:$METRIC/real_class_accuracy"
