"""gamma-MoD, Luo et al. 2024, arXiv 2410.13859: redundant layers are run by half of a picture.

Claim: 51.6% fewer FLOPs and 53.2% less time in inference for 1.5% of quality. Layers whose
attention has a low rank are turned into mixtures of depths; text always runs them.

    moejax train --config gamma_mod      # or gamma_mod:small: laptop CPU, built-in data, float32
    moejax eval --workdir runs/chameleon --metrics attention_rank    # which layers of a dense run

One router of two classes for all layers but the first three and the last; its probability weighs
the feed-forward branch, its cross-entropy learns who was chosen. Departures: trained from
scratch; the router sees tokens normalised without the layer's own scale; positions are kept;
only picture tokens count in the cross-entropy and are weighed; half of each picture; one
threshold of 0.5. Without ``model.depth.room`` training computes layers for all tokens.
Parameters of ``gamma_mod``: 2.88M, all of them active. Val loss after 300
steps on CPU (seed 0): text 6.32 nats a token (unigram 6.49), image 5.55 nats a code (6.21).
"""

from moejax.config import load_config_dict

ARGS = ("", "small")
INFERRED = ("model.depth.router_norm", "model.depth.threshold", "model.num_layers")


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, depth, about = config.model, config.model.depth, config.about
    model.norm_placement, model.qk_norm, model.num_layers = "pre", "none", 6
    model.first_blocks, model.last_blocks = ("untied",) * 3, ("untied",)
    model.block_pattern = ("mod",)
    depth.capacity, depth.modality, depth.within, depth.rounding = 0.5, "image", "run", "up"
    depth.gate, depth.gate_on, depth.causal_loss = "softmax", "ffn", 0.01
    depth.router_shared, depth.router_norm = True, True
    config.data.text_first_share = 0.0
    about.paper, about.family = "arXiv 2410.13859", "mixture-of-depths"
    about.mechanism_test = "tests/papers/test_depth.py::test_gamma_mod_has_one_router"
    about.approximate = INFERRED
    about.total_params = about.active_params = 2_883_456
    return config
