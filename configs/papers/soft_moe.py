"""Soft MoE, Puigcerver et al. 2023, arXiv 2308.00951: experts on mixtures of patches.

Claim: where every slot of an expert is a mixture of all patches, and every patch one of all slots,
nothing is dropped, nothing has to be balanced, and more experts cost no more.

    moejax train --config soft_moe       # or :small: laptop CPU, Fashion-MNIST, float32
    moejax train --config soft_moe:s16   # the paper's sizes: s16 s14 b16 l16 h14, bfloat16

One slot for each expert (in ``small`` three: 48 for 49 patches); scores are
cosines with a learned scale; the second half of the blocks has experts; each picture is routed by
itself. The sizes are those of the authors' code. Departures: no biases in the blocks; JFT-4B is not
to be had, so that the paper's sizes are for inspection; the schedule is an inverse square root
there and a constant with a decay at the end here, and the router (prototypes and scale) is decayed
there like the other weights. As every patch meets all experts, all parameters are active.
The dense baseline is ``vit``. Device, minutes, expected accuracy: not measured.
"""

import math

from moejax.config import load_config_dict

# width, layers, heads, hidden width, patch, experts, blocks with experts, parameters.
SIZES = {
    "s16": (384, 12, 6, 1536, 16, 128, 6, 932_120_095),
    "s14": (384, 12, 6, 1536, 14, 256, 6, 1_838_315_551),
    "b16": (768, 12, 12, 3072, 16, 128, 6, 3_704_459_935),
    "l16": (1024, 24, 16, 4096, 16, 128, 12, 13_118_974_885),
    "h14": (1280, 32, 16, 5120, 14, 256, 16, 54_150_515_369),
}
ARGS = ("", "small", *SIZES)


def get_config(arg=""):
    config = load_config_dict("vit")
    model, moe, about = config.model, config.model.moe, config.about
    moe.num_experts, slots, last, count = 16, 3, 2, 1_172_748
    if arg in SIZES:
        width, layers, heads, hidden, patch, moe.num_experts, last, count = SIZES[arg]
        slots = 1
        model.update(d_model=width, num_layers=layers, num_heads=heads, ffn_hidden=(hidden,))
        model.update(patch_size=patch, image_size=224, num_classes=29_593, dtype="bfloat16")
        model.update(
            class_bias=-math.log(29_593), norm="layer", qk_norm="layer", ffn_activation="gelu"
        )
        moe.activation = "gelu"
        config.data.update(image_size=224, batch_size=4096)
        config.objective.loss = "sigmoid"
        config.objective.augment.crop_padding = 0
        config.optim.update(learning_rate=1e-3, warmup_steps=10_000, schedule="wsd")
        config.optim.update(decay_fraction=0.0125, weight_decay=0.03, b2=0.999)
        config.train.steps = 2_000_000 if arg[0] == "h" else 4_000_000
        about.approximate = ("data.source", "model.positions", "optim.eps", "optim.schedule")
    model.last_blocks = ("moe",) * last
    moe.router.name, moe.score.name = "soft", "cosine"
    moe.router.options = {"slots": slots}
    moe.score.options = {"learn_scale": True}
    moe.equal_init = True
    about.paper, about.family = "arXiv 2308.00951", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_vision.py::test_soft_moe_mixes_all_patches"
    about.total_params = about.active_params = count
    return config
