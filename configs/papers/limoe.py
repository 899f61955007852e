"""LIMoE, Mustafa et al. 2022, arXiv 2206.02770: one sparse tower for pictures and texts.

Claim: patches and words can share one transformer whose experts find their modality by themselves,
if losses of entropy keep a modality from falling together onto one expert.

    moejax train --config limoe           # laptop CPU, emoji with their English names, float32
    moejax train --config limoe:emoji3m   # four art styles, twelve languages

One of eight experts in every other block; each patch and word is sent to one, those of the highest
weights first where places (1.05 times the even share of a row, the padding of its text too) are
few. Words are to be sure of their expert (local entropy) and to use at least three of them
together, patches at least six (global entropy, each with its threshold); importance, load and z
losses beside them. In the paper texts are to use some 9 of 32. Departures: thresholds scaled to
eight experts, coefficients of our own, no biases in the blocks, positives as in ``clip``. The size
is ours; the tokens of the whole batch are routed together. Measured, two CPU cores, 500 steps of
``emoji3m``, with the losses and without: experiments/limoe.
"""

from moejax.config import default_config, load_config_dict

ARGS = ("", "emoji3m")


def get_config(arg=""):
    config = load_config_dict(f"clip:{arg}" if arg else "clip")
    config.model = default_config("limoe", "contrastive").model
    model, moe, about = config.model, config.model.moe, config.about
    model.update(num_layers=4, d_model=96, num_heads=3, ffn_hidden=(256,), text_length=24)
    moe.num_experts, moe.top_k, moe.routing_group = 8, 1, 0
    moe.router.options = {"noise": "gaussian"}
    moe.capacity, moe.capacity_factor = "priority", 1.05
    moe.losses = (
        {"name": "entropy_local", "coefficient": 0.02, "options": {"modality": 1}},
        {
            "name": "entropy_global",
            "coefficient": 0.02,
            "options": {"min_experts_each": (6.0, 3.0)},
        },
        {"name": "importance", "coefficient": 0.005},
        {"name": "load", "coefficient": 0.005},
        {"name": "z", "coefficient": 0.0001},
    )
    about.paper = "arXiv 2206.02770"
    about.approximate = ("model.d_model", "model.num_layers", "model.moe.losses")
    about.mechanism_test = (
        "tests/papers/test_limoe.py::test_without_losses_of_entropy_the_words_collapse"
    )
    about.total_params, about.active_params = 1_891_009, 858_817
    return config
