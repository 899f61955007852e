"""MoIIE, Wang et al. 2025, arXiv 2508.09779: experts of one modality, and experts between them.

Claim: of E experts a quarter is for pictures, a quarter for text, and half for both; each
modality has a router of its own over the three quarters that it may choose from.

    moejax train --config moiie          # or moiie:small: laptop CPU, built-in data, float32

Two of three experts a token, weights over their sum, in every second layer; a balance loss for
each modality. As in the recipe all experts begin alike. Departures: they begin as drawn, where
the recipe copies the MLP of a vision-language model.
Parameters of ``moiie``: 3.54M in total, 2.75M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
INFERRED = ("model.norm_placement", "model.qk_norm")


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("untied", "moe")
    moe.num_experts, moe.top_k, moe.hidden, moe.equal_init = 4, 2, 512, True
    # Expert 0 is for pictures, 1 and 2 are for both, 3 is for text; text is the first modality.
    moe.allowed = ((1, 2, 3), (0, 1, 2))
    moe.score.per_modality = True
    moe.router.options = {"renormalise": True}
    moe.losses = ({"name": "switch_per_modality", "coefficient": 0.001},)
    about.paper, about.family = "arXiv 2508.09779", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_modality_experts.py::test_moiie_keeps_experts_apart"
    about.approximate = INFERRED
    about.total_params, about.active_params = 3_540_096, 2_752_640
    return config
