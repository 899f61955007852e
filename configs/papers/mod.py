"""Mixture-of-Depths, Raposo et al. 2024, arXiv 2404.02258: tokens that skip every second block.

Claim: with an eighth of the tokens in every second block a model is as good as the dense one at
half the FLOPs a forward pass, or up to 1.5% better in log-probability at the same in training.

    moejax train --config mod            # or mod:small: laptop CPU, built-in data, float32
    moejax train --config mod:predictor  # a second router decides in decoding, and teaches nothing
    moejax train --config mod:random     # a control: who runs a block is drawn

Routers see the whole row in training. Outside of it a token runs a block if sigmoid(r) > 0.5, for
which r learns to tell who was chosen. Departures: interleaved text and image codes, our widths.
Parameters of ``mod``: 2.36M, all of them active. Val loss after 300 steps on CPU (seed 0): text
6.35 nats a token (unigram 6.49), image 5.63 nats a code (6.21), decided causally; minutes: not
measured alone.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "predictor", "random")
INFERRED = ("model.depth.branch", "model.depth.causal_loss", "model.depth.predictor_hidden")


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, about = config.model, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern = ("untied", "mod")
    model.depth.capacity, model.depth.gate = 0.125, "linear"
    model.depth.causal_rule = {"predictor": "predictor", "random": "none"}.get(arg, "router")
    model.depth.random_choice = arg == "random"
    about.paper, about.family = "arXiv 2404.02258", "mixture-of-depths"
    about.mechanism_test = "tests/papers/test_depth.py::test_so_many_tokens_run_so_many_blocks"
    about.approximate = INFERRED
    about.total_params = about.active_params = 2_375_168 if arg == "predictor" else 2_358_656
    return config
