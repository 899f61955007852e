"""Ming-Flash-Omni, Inclusion AI 2025, arXiv 2510.24821: routers of modalities, experts of all.

Claim: with one pool of experts and a full router for each of text, pictures and sound, tokens of
different modalities find experts of their own accord, and none is set aside.

    moejax train --config ming_flash_omni    # or :small: laptop CPU, built-in data, float32

Softmax, two of eight experts, weights over their sum, one shared expert, a balance loss and a
bias for each router. ``small`` has the FLOPs of ``chameleon``. Departures: two modalities; one
bias serves the routers of all; the Ling 2.0 backbone with 256 experts is not known well enough
here for its size.
Parameters of ``ming_flash_omni``: 4.14M in total, 2.36M active. Device, minutes, expected loss:
not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
# fmt: off
INFERRED = (
    "model.moe.balance.rate", "model.moe.losses", "model.moe.num_experts",
    "model.moe.router.options", "model.moe.shared_hidden", "model.moe.top_k",
    "model.norm_placement", "model.qk_norm",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    moe.num_experts, moe.top_k, moe.hidden, moe.shared_hidden = 8, 2, 192, 128
    moe.score.per_modality = True
    moe.router.options = {"renormalise": True}
    moe.balance.name = "sign"
    moe.losses = ({"name": "switch", "coefficient": 0.001},)
    about.paper, about.family = "arXiv 2510.24821", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_modality_experts.py::test_ming_has_a_router_per_modality"
    )
    about.approximate = INFERRED
    about.total_params, about.active_params = 4_136_096, 2_362_528
    return config
