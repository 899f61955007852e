"""MoMa with Mixture-of-Depths, Lin et al. 2024, arXiv 2407.21770: MoMaD, sparse in two directions.

Claim: at 1.4B parameters a token it reaches the dense model's training loss with 4.2 times fewer
FLOPs (text 3.4, image 5.3). With causal routers, as decoding needs them, it is worse than MoMa.

    moejax train --config moma_mod       # or moma_mod:small: laptop CPU, built-in data, float32
    moejax train --config moma_mod:2.3b  # the paper's sizes: 110m 635m 2.3b, bfloat16

A quarter of the tokens of eight rows, by sigmoid scores, runs every second block, before the split
by modality; more layers make up for it. Outside of training a predictor decides; experts choose as
in training (``moma:aux`` has routers for that). Departures: the predictor is trained along.
Parameters of ``moma_mod``: 7.88M in total, 2.38M active. Val loss after 300
steps on CPU (seed 0): text 6.30 nats a token (unigram 6.49), image 5.55 nats a code (6.21).
"""

from moejax.config import load_config_dict

# The size of ``moma`` with its data, width, layers, heads, hidden width, parameters.
SIZES = {
    "110m": ("90m", 512, 14, 8, 1365, 317_609_472, 112_138_752),
    "635m": ("435m", 1024, 40, 16, 2730, 2_996_621_312, 648_384_512),
    "2.3b": ("1.4b", 2304, 32, 18, 6144, 11_896_373_504, 2_383_692_032),
}
ARGS = ("", "small", *SIZES)
# fmt: off
INFERRED = (
    "model.depth.branch", "model.depth.causal_loss", "model.depth.gate", "model.depth.group",
    "model.moe.hidden",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict(f"moma:{SIZES[arg][0]}" if arg in SIZES else "moma")
    model, depth, about = config.model, config.model.depth, config.about
    model.block_pattern = ("mod:moe", "moe")
    depth.capacity, depth.gate, depth.causal_rule = 0.25, "sigmoid", "predictor"
    # The tokens of a device's batch compete.
    depth.group = 8
    if arg in SIZES:
        _, model.d_model, model.num_layers, model.num_heads, model.moe.hidden, *counts = SIZES[arg]
        model.ffn_hidden = (model.moe.hidden,)
    else:
        counts = 7_884_544, 2_379_520
    about.mechanism_test = "tests/papers/test_depth.py::test_so_many_tokens_run_so_many_blocks"
    about.approximate = (*about.approximate, *INFERRED)
    about.total_params, about.active_params = counts
    return config
