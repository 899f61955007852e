"""EC-DiT, Sun et al. 2024, arXiv 2410.02098: experts choose the patches of a picture.

Claim: not all of a picture is as hard; where experts choose patches, seeing the whole picture, hard
parts get more experts, and diffusion transformers can be made as large as 97B parameters.

    moejax train --config ec_dit         # or ec_dit:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config ec_dit:l       # as ProMoE's authors compare with it: l, bfloat16

Each of eight experts takes an eighth of a picture's patches, those of its largest softmax scores,
which are weights too; every other block has experts. EC-DiT itself is told texts and has no public
code: what stands here is the baseline of ProMoE's repository (arXiv 2510.24711), with labels, and
rectified flow with time logit-normal. Departures: else as ``dit`` says. Quality,
small, at equal FLOPs, on two CPU cores: experiments/dit_moe.
"""

from moejax.config import load_config_dict

COUNTS = {
    "": (792_112, 333_360),
    "small": (792_112, 333_360),
    "l": (1_162_344_464, 457_701_392),
}
ARGS = tuple(COUNTS)


def get_config(arg=""):
    config = load_config_dict("dit:l2" if arg == "l" else "dit")
    model, moe, about = config.model, config.model.moe, config.about
    model.learned_range = config.objective.learned_range = False
    config.objective.update(process="flow", schedule="cosine")
    config.objective.times.distribution = "logit_normal"
    model.block_pattern = ("dense", "moe")
    moe.update(num_experts=8, hidden=4 * model.d_model, activation="gelu", routing_group=1)
    moe.score.options = {"init_std": 0.006}
    moe.router.name = "expert_choice"
    moe.router.options = {"normalise": "softmax", "capacity_factor": 1.0, "rounding": "down"}
    if arg == "l":
        config.train.steps = 500_000
    about.paper, about.family = "arXiv 2410.02098", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_dit_experts.py::test_experts_choose_in_one_picture"
    about.total_params, about.active_params = COUNTS[arg]
    about.approximate = (
        *about.approximate,
        "model.moe.num_experts",
        "model.moe.router.options",
        "model.block_pattern",
        "objective.process",
        "data.source",
    )
    return config
