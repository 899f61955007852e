"""Hunyuan-Large, Sun et al. 2024, arXiv 2411.02265: who finds no place goes where one is left.

Claim: one shared expert and one of 16 for each token; tokens beyond an expert's capacity are
sent to experts with places left, at random; the 16 learn at 0.31 of the rate, as each sees a
16th of a batch.

    moejax train --config hunyuan_large  # or :small: laptop CPU, built-in data, float32
    moejax train --config hunyuan_large:389b   # bfloat16

``small`` has the FLOPs of ``chameleon``. Departures: layers do not share keys and values (CLA);
the released code sets no finite capacity, so its factor is ours; data of ``chameleon``'s sizes.
Parameters of ``hunyuan_large``: 5.05M in total, 2.30M active. Device, minutes, expected loss:
not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "389b")
INFERRED = ("model.moe.capacity_factor", "model.moe.losses", "model.moe.routing_group")
# fmt: off
INFERRED_OF_SIZES = (
    "data.batch_size", "data.image_tokenizer", "data.source", "data.text_tokenizer",
    "model.ffn_hidden", "model.moe.hidden", "model.rope_theta", "model.vocab_size",
    "optim.final_fraction", "optim.learning_rate", "optim.schedule", "optim.warmup_steps",
    "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg == "389b" else "chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    about.approximate = INFERRED
    if arg == "389b":
        model.d_model, model.num_layers = 6400, 64
        model.num_heads, model.num_kv_heads = 80, 8
        model.vocab_size, model.ffn_hidden = 128_512, (18_304,)
        moe.num_experts, moe.hidden = 16, 18_304
        about.approximate += INFERRED_OF_SIZES
        counts = (389_782_739_200, 52_403_411_200)
    else:
        model.num_kv_heads = 2
        moe.num_experts, moe.hidden = 8, 256
        counts = (5_049_472, 2_296_960)
    moe.top_k, moe.shared_hidden = 1, moe.hidden
    moe.capacity, moe.capacity_factor = "recycle", 1.0
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    config.optim.groups = ({"match": "moe/experts/", "scale": 0.31},)
    about.paper, about.family = "arXiv 2411.02265", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_hunyuan_large.py::test_dropped_tokens_are_recycled"
    about.total_params, about.active_params = counts
    return config
