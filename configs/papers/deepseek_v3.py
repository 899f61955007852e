"""DeepSeek-V3, DeepSeek-AI 2024, arXiv 2412.19437: its routing, balanced by a bias and no loss.

Claim: a bias that takes part in the choice of experts alone, moved after each step by the sign
of the load's error, keeps 256 experts balanced; no token is dropped in training or after it.

    moejax train --config deepseek_v3    # or :small: laptop CPU, built-in data, float32
    moejax train --config deepseek_v3:671b   # bfloat16

Sigmoid scores, the best groups of experts by the sum of their two best, the best experts in
these, weights over their sum times 2.5. Departures: attention with grouped keys and values (8
heads) for MLA, no prediction of further tokens, the rate of the bias never falls to 0, data and
schedule of ``chameleon``'s sizes.
Parameters of ``deepseek_v3``: 4.22M in total, 2.30M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "671b")
# fmt: off
INFERRED = (
    "data.batch_size", "data.image_tokenizer", "data.source", "data.text_tokenizer",
    "model.num_kv_heads", "model.rope_theta", "model.vocab_size", "optim.final_fraction",
    "optim.learning_rate", "optim.schedule", "optim.warmup_steps", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg == "671b" else "chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("moe",)
    if arg == "671b":
        model.d_model, model.num_layers, model.first_blocks = 7168, 61, ("untied",) * 3
        model.num_heads, model.num_kv_heads, model.head_size = 128, 8, 128
        model.ffn_hidden, model.vocab_size = (18_432,), 129_280
        moe.num_experts, moe.top_k, moe.hidden, groups = 256, 8, 2048, (8, 4)
        about.approximate = INFERRED
        counts = (674_836_098_560, 41_361_976_832)
    else:
        model.num_kv_heads, model.first_blocks = 2, ("untied",)
        moe.num_experts, moe.top_k, moe.hidden, groups = 16, 3, 128, (4, 2)
        counts = (4_215_984, 2_299_056)
    moe.shared_hidden = moe.hidden
    moe.router.options = {
        "normalise": "sigmoid",
        "renormalise": True,
        "scale": 2.5,
        "num_groups": groups[0],
        "top_groups": groups[1],
        "group_score": "top2",
    }
    moe.balance.name, moe.balance.rate = "sign", 0.001
    moe.losses = ({"name": "deepseek_sequence", "coefficient": 1e-4},)
    about.paper, about.family = "arXiv 2412.19437", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_balance.py::test_deepseek_v3_moves_the_choice_by_a_bias"
    )
    about.total_params, about.active_params = counts
    return config
