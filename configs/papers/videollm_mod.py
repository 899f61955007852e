"""VideoLLM-MoD, Wu et al. 2024, arXiv 2408.16730: a fifth of each frame runs every second layer.

Claim: 42% less time and 30% less memory in training at the same quality. The rest of the frame
passes by and is seen by later layers; language runs every layer.

    moejax train --config videollm_mod   # or videollm_mod:small: laptop CPU, built-in data, float32

A frame is a run of picture tokens, each with its own best fifth, rounded up. Departures: trained
from scratch; single pictures; their codes are predicted too, so outside of training a predictor
chooses. Without ``model.depth.room`` training computes the blocks for all tokens.
Parameters of ``videollm_mod``: 2.38M, all of them active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
INFERRED = (
    "model.block_pattern",
    "model.depth.branch",
    "model.depth.causal_loss",
    "model.depth.causal_rule",
    "model.depth.gate",
)


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, depth, about = config.model, config.model.depth, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "mod")
    depth.capacity, depth.modality, depth.within, depth.rounding = 0.2, "image", "run", "up"
    depth.gate, depth.causal_rule = "linear", "predictor"
    config.data.text_first_share = 0.0
    about.paper, about.family = "arXiv 2408.16730", "mixture-of-depths"
    about.mechanism_test = "tests/papers/test_depth.py::test_videollm_mod_takes_a_fifth_of_a_frame"
    about.approximate = INFERRED
    about.total_params = about.active_params = 2_375_168
    return config
