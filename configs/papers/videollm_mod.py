"""VideoLLM-MoD, Wu et al. 2024, arXiv 2408.16730: a fifth of each frame runs every second layer.

Claim: 42% less time and 30% less memory in training at the same quality. The rest of the frame
passes by and is seen by later layers; language runs every layer.

    moejax train --config videollm_mod   # or videollm_mod:small: laptop CPU, built-in data, float32

A frame is a run of picture tokens, each with its own best fifth, rounded up. Clips of four frames,
in which an emoji moves, grows or turns, come before their captions. Departures: trained from
scratch; frames' codes are predicted too, so outside of training a predictor chooses.
Parameters of ``videollm_mod``: 2.38M, all of them active. Val loss after 300
steps on CPU (seed 0): text 3.56 nats a token, image 4.36 nats a code.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
INFERRED = (
    "model.block_pattern",
    "model.depth.branch",
    "model.depth.causal_loss",
    "model.depth.causal_rule",
    "model.depth.gate",
    "model.depth.room",
)


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, data, about = config.model, config.data, config.about
    depth = model.depth
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "mod")
    depth.capacity, depth.modality, depth.within, depth.rounding = 0.2, "image", "run", "up"
    depth.gate, depth.causal_rule = "linear", "predictor"
    data.source, data.order = "builtin:emoji_clips", "image_first"
    # One clip in a row: four frames of 66 tokens, BOS, EOS and a caption of up to 22. The block is
    # run by 52 tokens of the frames and up to 32 others, for which 0.3 of the row is enough.
    data.sequence_length, depth.room = 288, 0.3
    about.paper, about.family = "arXiv 2408.16730", "mixture-of-depths"
    about.mechanism_test = "tests/papers/test_depth.py::test_videollm_mod_takes_a_fifth_of_a_frame"
    about.approximate = INFERRED
    about.total_params = about.active_params = 2_375_168
    return config
