"""Uni-MoE-2.0-Omni, Li et al. 2025, arXiv 2511.12609: as many experts as a token's doubt asks for.

Claim: a token takes experts until their probabilities sum to 0.7; one of them may be null, and
small shared ones compete with the rest: a 26B model runs 1.5B to 18B parameters for a token.

    moejax train --config uni_moe_2      # or uni_moe_2:small: laptop CPU, built-in data, float32

Four routed experts, a null one, two shared ones of an eighth of the width. Chosen one after the
other as in SparseMixer, sampled in training. Departures: evaluation drops nobody; experts are
drawn, not warmed up on speech and pictures before; two modalities, no 3D RoPE. The base model is
not known well enough here for its own size.
Parameters of ``uni_moe_2``: 3.25M in total, 2.62M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
INFERRED = ("model.moe.num_experts", "model.norm_placement", "model.qk_norm")


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    moe.num_experts, moe.zero_experts, moe.hidden = 4, 1, 256
    moe.shared_hidden, moe.shared_competing = 2 * moe.hidden // 8, 2
    moe.router.name = "top_p"
    moe.router.options = {"top_p": 0.7, "estimator": "sparsemixer", "gap": 0.01}
    # At most all; an expert has places for three fifths of the tokens, the largest weights first.
    moe.top_k, moe.capacity, moe.capacity_factor = 5, "weight", 0.6
    moe.capacity_renormalise = True
    moe.score.jitter = 0.01
    chosen = {"per": "batch", "counted": "all", "chosen_only": True}
    moe.losses = ({"name": "gshard", "coefficient": 0.025, "options": chosen},)
    about.paper, about.family = "arXiv 2511.12609", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_uni_moe_2.py::test_doubt_takes_more_experts"
    about.approximate = INFERRED
    about.total_params, about.active_params = 3_246_720, 2_617_574
    return config
