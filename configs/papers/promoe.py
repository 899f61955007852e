"""ProMoE, Wei et al. 2025, arXiv 2510.24711: prototypes route what shows something.

Claim: pictures are too alike, patch by patch, for experts to find their parts by themselves; where
pictures of which nothing is said have an expert of their own, and the others' patches go to the
nearest of some prototypes, which a contrastive loss pulls to their patches, experts pay off.

    moejax train --config promoe         # or promoe:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config promoe:ec      # experts choose patches
    moejax train --config promoe:l       # the authors' sizes: s b l xl, and l_ec, bfloat16

Every other block has 12 experts, one for pictures without a label and one that all share, each half
as wide as a dense layer. A patch has one expert, with its cosine to the prototype for a weight, as
it is; without a label the weight is 1. By ``ec`` an expert takes a twelfth of each picture's
patches, and the loss is of each picture; the authors advise it for DDPM, and have it in their code
with rectified flow, as here. Time logit-normal, no loss of balance. Departures: the authors'
network predicts a variance too, which is not used; else as ``dit`` says. Quality,
small, at equal FLOPs, on two CPU cores: experiments/dit_moe.
"""

from moejax.config import load_config_dict

# The size of ``dit``, parameters in all and active.
SIZES = {
    "s": ("s2", 75_312_400, 32_845_072),
    "b": ("b2", 300_145_168, 130_275_856),
    "l": ("l2", 1_061_730_320, 457_750_544),
    "xl": ("xl2", 1_566_533_392, 674_719_504),
}
SMALL = (727_088, 333_872)
ARGS = ("", "small", "ec", *SIZES, "l_ec")


def get_config(arg=""):
    size, experts_choose = arg.removesuffix("_ec"), arg.endswith("ec")
    base, *counts = SIZES.get(size, ("", *SMALL))
    config = load_config_dict(f"dit:{base}" if base else "dit")
    model, moe, about = config.model, config.model.moe, config.about
    model.learned_range = config.objective.learned_range = False
    config.objective.update(process="flow", schedule="cosine")
    config.objective.times.distribution = "logit_normal"
    model.modalities = ("image", "unconditional")
    model.block_pattern = ("dense", "moe")
    moe.update(num_experts=13, unscored_experts=1, top_k=1, activation="gelu")
    moe.allowed = (tuple(range(12)), (12,))
    moe.hidden = moe.shared_hidden = 2 * model.d_model
    moe.score.name, moe.score.options = "cosine", {"init_std": 0.02}
    moe.router.options = {"normalise": "identity"}
    per = "group" if experts_choose else "batch"
    options = {"per": per, "temperature": 0.07}
    moe.losses = ({"name": "contrastive", "coefficient": 1.0, "options": options},)
    if experts_choose:
        moe.router.name = "expert_choice"
        moe.router.options = {"normalise": "identity", "rounding": "down"}
    if base:
        config.train.steps = 500_000
    about.paper, about.family = "arXiv 2510.24711", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_promoe.py::test_null_patches_never_touch_prototypes"
    about.total_params, about.active_params = counts
    return config
