"""Switch Transformer, Fedus et al. 2021, arXiv 2101.03961: each token goes to one expert.

Claim: with one expert a token, a capacity, a balance loss and jitter, a sparse layer holds many
times the parameters of a dense one at its FLOPs, and trains.

    moejax train --config switch         # or switch:small: laptop CPU, built-in data, float32

Every other layer has experts. Departures: evaluation drops nobody; a decoder with SwiGLU experts on
interleaved text and image codes, where the paper has T5 and text; sequences are routed one by one.
The dense baseline of equal FLOPs is ``chameleon`` with pre-norm and no QK-norm.
Parameters of ``switch``: 5.11M in total, 2.36M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
# fmt: off
INFERRED = (
    "model.block_pattern", "model.moe.capacity_factor", "model.moe.losses",
    "model.moe.routing_group", "model.moe.score.jitter",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "moe")
    moe.num_experts, moe.top_k, moe.hidden = 8, 1, 512
    moe.score.jitter = 0.01
    moe.capacity, moe.capacity_factor = "order", 1.25
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    about.paper, about.family = "arXiv 2101.03961", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_token_choice.py::test_switch_sends_a_token_to_one_expert"
    )
    about.approximate = INFERRED
    about.total_params, about.active_params = 5_112_960, 2_360_448
    return config
