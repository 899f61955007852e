"""Chain-of-Experts, Wang et al. 2025, arXiv 2506.18945: experts work on each other's output.

Claim: a layer's experts run C times, half as many at a time for C = 2, each time chosen anew
from the result so far: at equal compute the validation loss (mathematics) falls from 1.20 to
1.12.

    moejax train --config coe            # or coe:small: laptop CPU, built-in data, float32
    moejax train --config coe:544m       # bfloat16

``x_c = x_(c-1) + sum_k g_k E_k(x_(c-1))``, a router for each c, shared experts in each.
``small`` has the FLOPs of ``chameleon``. Departures: the layer sees a norm of its input, and its
outer residual carries the input itself; attention is not MLA; 544M counts the routed experts
alone; data of ``chameleon``'s sizes.
Parameters of ``coe``: 3.16M in total, 2.28M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "544m")
INFERRED = ("model.moe.losses", "model.norm_placement")
# fmt: off
INFERRED_OF_SIZES = (
    "data.image_tokenizer", "data.source", "data.text_tokenizer", "model.num_heads",
    "model.rope_theta", "model.vocab_size", "optim.final_fraction", "optim.schedule",
    "optim.warmup_steps", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg == "544m" else "chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    about.approximate = INFERRED
    if arg == "544m":
        model.d_model, model.num_layers, model.num_heads = 1024, 4, 8
        # Eight experts in two iterations.
        moe.num_experts, moe.top_k, moe.hidden = 63, 4, 704
        config.data.batch_size, config.data.sequence_length = 64, 512
        about.approximate += INFERRED_OF_SIZES
        counts = (705_168_384, 229_377_024)
    else:
        moe.num_experts, moe.top_k, moe.hidden = 15, 3, 64
        counts = (3_160_192, 2_275_456)
    moe.iterations, moe.shared_hidden = 2, moe.hidden
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    about.paper, about.family = "arXiv 2506.18945", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_reuse.py::test_coe_runs_its_experts_twice"
    about.total_params, about.active_params = counts
    return config
