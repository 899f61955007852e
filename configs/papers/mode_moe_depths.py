"""Mixture-of-Depths-and-Experts, Raposo et al. 2024, arXiv 2404.02258, section 4.3: both at once.

Claim: depths and experts add up. Staged, tokens skip a whole block of experts; integrated, one
router chooses from experts and from doing nothing, which is better than experts of less capacity.

    moejax train --config mode_moe_depths              # staged; or :small: laptop CPU, float32
    moejax train --config mode_moe_depths:integrated   # experts that do nothing among the others

Departures: top-2 experts for either, a balance loss, interleaved text and image codes, our widths.
Parameters of ``mode_moe_depths``: 2.56M in total, 2.26M active. Val loss after 300
steps on CPU (seed 0): text 6.37 nats a token (unigram 6.49), image 5.56 nats a code (6.21).
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "integrated")
# fmt: off
INFERRED = (
    "model.depth.causal_loss", "model.moe.hidden", "model.moe.losses", "model.moe.num_experts",
    "model.moe.top_k", "model.moe.zero_experts",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("mod")
    model, moe, about = config.model, config.model.moe, config.about
    integrated = arg == "integrated"
    model.block_pattern = ("untied", "moe" if integrated else "mod:moe")
    moe.num_experts, moe.hidden, moe.top_k = 4, 192, 2
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    if integrated:
        moe.zero_experts = 4
    about.mechanism_test = "tests/papers/test_depth.py::test_experts_may_be_skipped"
    about.approximate = INFERRED
    about.total_params, about.active_params = (
        (2_557_056, 2_114_688) if integrated else (2_556_288, 2_261_376)
    )
    return config
