"""LongCat-Flash, Meituan 2025, arXiv 2509.01322: experts beside two dense layers, or none at all.

Claim: of 768 experts 256 give back their input, so a token runs as many of the others as it
needs (18.6B to 31.3B of 560B parameters, 27B on average); experts run beside two attentions and
two MLPs.

    moejax train --config longcat_flash  # or :small: laptop CPU, built-in data, float32
    moejax train --config longcat_flash:560b   # bfloat16

A bias moves after each step towards K_e experts with weights a token (8 of 12; ``small``: 2 of
3). ``small`` has two such layers, of the FLOPs of four of ``chameleon``. Departures: attention
with grouped keys and values for MLA; the controller is the increment alone; no loss between
devices.
Parameters of ``longcat_flash``: 3.48M in total, 2.30M active. Device, minutes, expected loss:
not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "560b")
INFERRED = ("model.moe.balance.options", "model.moe.balance.rate", "model.num_kv_heads")
# fmt: off
INFERRED_OF_SIZES = (
    "data.batch_size", "data.image_tokenizer", "data.source", "data.text_tokenizer",
    "model.head_size", "model.num_heads", "model.rope_theta", "model.vocab_size",
    "optim.final_fraction", "optim.learning_rate", "optim.schedule", "optim.warmup_steps",
    "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg == "560b" else "chameleon")
    model, moe, about = config.model, config.model.moe, config.about
    model.norm_placement, model.qk_norm, model.block_pattern = "pre", "none", ("shortcut_moe",)
    about.approximate = INFERRED
    if arg == "560b":
        model.num_layers, model.d_model, model.ffn_hidden = 28, 6144, (12_288,)
        model.num_heads, model.num_kv_heads, model.head_size = 64, 8, 128
        model.vocab_size = 131_072
        moe.num_experts, moe.copy_experts, moe.top_k, moe.hidden = 512, 256, 12, 2048
        about.approximate += INFERRED_OF_SIZES
        counts = (561_934_691_328, 29_224_528_896)
    else:
        model.num_layers, model.num_kv_heads, model.ffn_hidden = 2, 2, (256,)
        moe.num_experts, moe.copy_experts, moe.top_k, moe.hidden = 8, 4, 3, 256
        counts = (3_475_608, 2_295_960)
    moe.router.options = {"scale": 6.0}
    moe.balance.name, moe.balance.rate = "increment", 0.01
    moe.balance.options = {"ffn_share": 2 / 3}
    about.paper, about.family = "arXiv 2509.01322", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_longcat_flash.py::test_zero_experts_give_their_input_back"
    )
    about.total_params, about.active_params = counts
    return config
