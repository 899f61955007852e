"""ReXMoE, Tan et al. 2025, arXiv 2510.17483: neighbouring layers share their experts.

Claim: a router over the experts of r layers in a row, let in bit by bit, chooses better at no
more parameters but its own: a 2.3B model goes from 49.15 to 49.65 (r = 2) and 50.23 (r = 4) on
average.

    moejax train --config rexmoe         # or rexmoe:small: laptop CPU, built-in data, float32

Two layers share eight experts, of which a token takes two; the other layer's are let in from
step 60 to step 180, those of the layer itself are always there. ``small`` has the FLOPs of
``chameleon``. The paper's widths are not known here, so there are no other sizes.
Parameters of ``rexmoe``: 3.15M in total, 2.36M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
# fmt: off
INFERRED = (
    "model.moe.losses", "model.moe.pool_steps", "model.moe.router.options",
    "model.moe.shared_hidden", "model.norm_placement",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    moe.pool_layers, moe.pool_steps = 2, (60, 180)
    model.block_pattern = ("moe",) * moe.pool_layers
    moe.num_experts, moe.top_k, moe.hidden = 4, 2, 256
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    about.paper, about.family = "arXiv 2510.17483", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_reuse.py::test_rexmoe_layers_choose_from_one_pool"
    about.approximate = INFERRED
    about.total_params, about.active_params = 3_148_928, 2_362_496
    return config
