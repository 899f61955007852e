"""p-MoD, Zhang et al. 2024, arXiv 2412.04449: deeper layers see fewer and fewer picture tokens.

Claim: with 55.6% of the FLOPs and 53.8% of the keys and values of its multimodal model in decoding
it is as good. Text runs every layer; the share of picture tokens falls by a shifted cosine.

    moejax train --config p_mod          # or p_mod:small: laptop CPU, built-in data, float32

Weights 1 + 0.2 tanh(r), 1 at the beginning, multiply the feed-forward branch of tokens that run a
layer and the whole of those that skip it. Departures: trained from scratch, codes of pictures
are predicted too; so outside of training a predictor chooses, which the paper does not need. The
share is of each picture; without ``model.depth.room`` training computes layers for all tokens.
Parameters of ``p_mod``: 2.38M, all of them active. Val loss after 300
steps on CPU (seed 0): text 6.26 nats a token (unigram 6.49), image 5.56 nats a code (6.21).
"""

from moejax.config import load_config_dict
from moejax.depth import shifted_cosine_decay

ARGS = ("", "small")
INFERRED = ("model.depth.causal_loss", "model.depth.causal_rule", "model.num_layers")


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, depth, about = config.model, config.model.depth, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    shares = shifted_cosine_decay(model.num_layers)
    model.block_pattern = tuple("untied" if share == 1 else f"mod:{share:.4f}" for share in shares)
    depth.modality, depth.within, depth.rounding = "image", "run", "down"
    depth.gate, depth.gate_scale, depth.gate_on = "tanh_norm", 0.2, "ffn"
    depth.weigh_skipped, depth.router_zeros, depth.router_bias = True, True, True
    depth.causal_rule = "predictor"
    config.data.text_first_share = 0.0
    about.paper, about.family = "arXiv 2412.04449", "mixture-of-depths"
    about.mechanism_test = "tests/papers/test_depth.py::test_p_mod_keeps_fewer_pictures_in_depth"
    about.approximate = INFERRED
    about.total_params = about.active_params = 2_383_555
    return config
