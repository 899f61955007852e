"""Expert choice, Zhou et al. 2022, arXiv 2202.09368: experts choose tokens, not tokens experts.

Claim: each expert takes its share of the tokens, those that score highest with it: loads are
equal without a balance loss, and a token gets as many experts as want it.

    moejax train --config expert_choice  # or :small: laptop CPU, built-in data, float32

Softmax over the experts; two experts a token on average; every other layer. A decoder cannot
compare a token with those to come: beside each router a causal one (that of MoMa, arXiv
2407.21770) learns what it chooses and takes its place outside of training. It sends no gradient
to the rest. Departures: that, and SwiGLU experts on interleaved text and image codes.
Parameters of ``expert_choice``: 5.13M in total, 2.77M active. Device, minutes, expected loss:
not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
# fmt: off
INFERRED = (
    "model.block_pattern", "model.moe.causal_router", "model.moe.losses",
    "model.moe.router.options", "model.moe.routing_group",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "moe")
    moe.num_experts, moe.hidden, moe.causal_router = 8, 512, True
    moe.router.name = "expert_choice"
    moe.router.options = {
        "capacity_factor": 2.0,
        "normalise": "softmax",
        "causal_rule": "aux_router",
    }
    moe.losses = ({"name": "causal_router", "coefficient": 1.0},)
    about.paper, about.family = "arXiv 2202.09368", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_expert_choice.py::test_all_experts_take_as_many_tokens"
    )
    about.approximate = INFERRED
    about.total_params, about.active_params = 5_130_368, 2_771_072
    return config
