"""GShard, Lepikhin et al. 2020, arXiv 2006.16668: two experts a token, the second by chance.

Claim: top-2 routing with a capacity, a balance loss and a second expert that is kept with
probability min(1, 2 w_2) lets layers of experts grow with the devices that hold them.

    moejax train --config gshard         # or gshard:small: laptop CPU, built-in data, float32

Every other layer has experts; the two weights are divided by their sum before the second is drawn.
Departures: evaluation drops nobody; a decoder with SwiGLU experts on interleaved text and image
codes, where the paper translates; a sequence is one group.
Parameters of ``gshard``: 5.11M in total, 2.75M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
# fmt: off
INFERRED = (
    "model.block_pattern", "model.moe.capacity_factor", "model.moe.losses",
    "model.moe.routing_group",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "moe")
    moe.num_experts, moe.top_k, moe.hidden = 8, 2, 512
    moe.router.options = {"renormalise": True, "random_second": True}
    moe.capacity, moe.capacity_factor = "order", 1.0
    moe.losses = ({"name": "gshard", "coefficient": 0.01},)
    about.paper, about.family = "arXiv 2006.16668", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_token_choice.py::test_gshard_draws_the_second_expert"
    about.approximate = INFERRED
    about.total_params, about.active_params = 5_112_960, 2_753_664
    return config
