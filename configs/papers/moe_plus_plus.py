"""MoE++, Jin et al. 2024, arXiv 2410.07348: some experts do nothing, and tokens may prefer them.

Claim: beside experts with weights, experts that give zero, the input, or a mixture of it with a
vector cost nothing and leave more for tokens that need it: 0.6B parameters go from 44.3 to 45.6
on average after 100B tokens, with experts a quarter faster.

    moejax train --config moe_plus_plus  # or :small: laptop CPU, built-in data, float32
    moejax train --config moe_plus_plus:7b   # the paper's sizes: 0.6b 1b 2b 7b, bfloat16

The logits of the layer before take part in the choice; loss and capacity (of all 2 T choices) give
an expert with weights tau times the share of one without. As in the paper, not in its code: weights
are not divided by their sum, inputs not multiplied by 2. Departures: evaluation drops nobody; data
and vocabulary of ``chameleon``'s sizes.
Parameters of ``moe_plus_plus``: 4.73M in total, 2.05M active. Device, minutes, expected loss:
not measured.
"""

from moejax.config import load_config_dict

# experts; zero, copy and constant ones; layers, d_model, width, heads; parameters.
SIZES = {
    "0.6b": (8, 1, 1, 2, 12, 768, 2048, 12, 582_146_496, 197_109_389),
    "1b": (16, 1, 1, 2, 12, 768, 2048, 12, 1_035_208_128, 214_173_120),
    "2b": (32, 1, 1, 6, 12, 768, 2048, 12, 1_941_487_104, 214_482_432),
    "7b": (16, 1, 1, 2, 24, 1536, 4096, 16, 7_676_619_648, 1_108_339_584),
}
ARGS = ("", "small", *SIZES)
# fmt: off
INFERRED = (
    "data.image_tokenizer", "data.source", "data.text_tokenizer", "model.rope_theta",
    "model.tie_embeddings", "model.vocab_size", "optim.b2", "optim.schedule", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg in SIZES else "chameleon")
    model, moe, optim, about = config.model, config.model.moe, config.optim, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    moe.num_experts, moe.zero_experts, moe.copy_experts, moe.constant_experts = 8, 1, 1, 2
    moe.top_k, moe.hidden, counts, tau = 2, 256, (4_727_488, 2_053_619), 0.75
    if arg in SIZES:
        size = SIZES[arg]
        moe.num_experts, moe.zero_experts, moe.copy_experts, moe.constant_experts = size[:4]
        model.num_layers, model.d_model, moe.hidden, model.num_heads, *counts = size[4:]
        # 4M tokens in a batch.
        config.data.batch_size, config.data.sequence_length = 2048, 2048
        optim.learning_rate, optim.final_fraction, optim.warmup_steps = 5e-4, 0.1, 2000
        about.approximate = INFERRED
    moe.score.gating_residual = True
    moe.capacity, moe.capacity_factor, moe.capacity_tau = "order", 1.1, tau
    moe.losses = ({"name": "heterogeneous", "coefficient": 0.01, "options": {"tau": tau}},)
    about.paper, about.family = "arXiv 2410.07348", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_weightless_experts.py::test_moe_plus_plus_has_experts_without_weights"
    )
    about.total_params, about.active_params = counts
    return config
