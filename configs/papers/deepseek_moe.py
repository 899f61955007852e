"""DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066: many small experts, and some for all tokens.

Claim: experts cut into parts, more of them active, and shared ones that every token runs
specialise better: with 2B parameters, 0.3B active, and 100B tokens the loss on the Pile is
1.808, that of GShard 1.867, of Switch 1.881, of hashed tokens 1.932, of the dense model 2.060.

    moejax train --config deepseek_moe   # or :small: laptop CPU, built-in data, float32
    moejax train --config deepseek_moe:16b   # the paper's sizes: 2b 16b 145b, bfloat16

``small`` cuts four experts as wide as the dense layer in four: one shared, three active of
fifteen, the FLOPs of ``chameleon``. Departures: data of ``chameleon``'s sizes; cosine schedule,
not steps.
Parameters of ``deepseek_moe``: 4.73M in total, 2.37M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

# layers, d_model, heads; experts, active ones, their width, shared ones; dense layers first, width.
SIZES = {
    "2b": (9, 1280, 10, 63, 7, 864, 1, 0, 3456),
    "16b": (28, 2048, 16, 64, 6, 1408, 2, 1, 10_944),
    "145b": (62, 4096, 32, 128, 12, 1408, 4, 1, 11_264),
}
# vocabulary, learning rate, expert loss, device loss, total and active parameters.
MORE = {
    "2b": (8192, 1.08e-3, 0.01, 0.0, 1_991_733_760, 319_582_720),
    "16b": (102_400, 4.2e-4, 0.001, 0.0, 16_375_728_128, 2_828_650_496),
    "145b": (102_400, 3e-4, 0.003, 0.05, 144_482_226_176, 22_056_783_872),
}
ARGS = ("", "small", *SIZES)
# fmt: off
INFERRED = (
    "data.batch_size", "data.image_tokenizer", "data.source", "data.text_tokenizer",
    "model.ffn_hidden", "model.first_blocks", "model.moe.hidden", "model.moe.losses",
    "model.rope_theta", "model.vocab_size", "optim.final_fraction", "optim.schedule", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg in SIZES else "chameleon")
    model, moe, optim, about = config.model, config.model.moe, config.optim, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    if arg in SIZES:
        size = SIZES[arg]
        model.num_layers, model.d_model, model.num_heads = size[:3]
        moe.num_experts, moe.top_k, moe.hidden, shared, dense, width = size[3:]
        model.vocab_size, optim.learning_rate, expert_loss, device_loss, *counts = MORE[arg]
        model.first_blocks, model.ffn_hidden = ("untied",) * dense, (width,)
        config.data.batch_size, config.data.sequence_length = 2048, 2048
        config.train.steps, optim.warmup_steps = 25_000, 2000
        about.approximate = INFERRED
    else:
        moe.num_experts, moe.top_k, moe.hidden, shared = 15, 3, 128, 1
        expert_loss, device_loss, counts = 0.01, 0.0, (4_725_376, 2_366_080)
    moe.shared_hidden = shared * moe.hidden
    moe.losses = ({"name": "deepseek_expert", "coefficient": expert_loss},)
    if device_loss:
        device = {"name": "deepseek_device", "coefficient": device_loss}
        moe.losses += ({**device, "options": {"devices": 4}},)
    about.paper, about.family = "arXiv 2401.06066", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_shared_experts.py::test_deepseek_moe_shares_an_expert_between_all_tokens"
    )
    about.total_params, about.active_params = counts
    return config
