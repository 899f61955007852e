"""OpenMoE, Xue et al. 2024, arXiv 2402.01739: experts beside a dense layer that every token runs.

Claim: in these decoders tokens are routed by what they are and hardly by their context, early in
training and for good; with fixed capacities the last tokens of a sequence are dropped.

    moejax train --config openmoe        # or openmoe:small: laptop CPU, built-in data, float32
    moejax train --config openmoe:8b     # the paper's sizes: base 8b 34b, bfloat16

``x + MoE(norm x) + FFN(norm x)`` in every second (base, 34b: fourth, 8b: sixth) layer, two experts
a token. Departures: evaluation drops nobody; next token alone, where the paper has UL2; Adafactor's
rate falls by a cosine, not by an inverse root; the data are those of ``chameleon``'s sizes.
Parameters of ``openmoe``: 5.51M in total, 3.15M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

# experts, every so many layers, d_model, FFN width, heads, head size, layers, batch, steps, counts.
SIZES = {
    "base": (16, 4, 768, 3072, 12, 64, 12, 128, 500_000, 649_943_808, 352_672_512),
    "8b": (32, 6, 2048, 8192, 24, 128, 24, 2048, 100_000, 8_779_827_200, 2_740_029_440),
    "34b": (32, 4, 3072, 12288, 24, 128, 32, 2048, 100_000, 34_611_465_216, 7_432_375_296),
}
ARGS = ("", "small", *SIZES)
INFERRED = ("model.moe.capacity", "model.moe.capacity_factor", "model.norm_placement")
# fmt: off
INFERRED_OF_SIZES = (
    "data.image_tokenizer", "data.source", "data.text_tokenizer", "model.rope_theta",
    "model.tie_embeddings", "model.vocab_size", "optim.final_fraction", "optim.schedule",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:7b" if arg in SIZES else "chameleon")
    model, moe, optim, about = config.model, config.model.moe, config.optim, config.about
    model.norm_placement, model.qk_norm = "pre", "none"
    moe.num_experts, moe.top_k, every, counts = 8, 2, 2, (5_506_176, 3_146_880)
    about.approximate = INFERRED
    if arg in SIZES:
        size = SIZES[arg]
        moe.num_experts, every, model.d_model, width, model.num_heads, model.head_size = size[:6]
        model.num_layers, config.data.batch_size, config.train.steps, *counts = size[6:]
        model.ffn_hidden, config.data.sequence_length = (width,), 2048
        model.vocab_size, model.tie_embeddings = 256_384, True
        optim.name, optim.learning_rate, optim.warmup_steps = "adafactor", 0.01, 10_000
        about.approximate = (*INFERRED, *INFERRED_OF_SIZES)
    model.block_pattern = ("untied",) * (every - 1) + ("moe",)
    moe.hidden = moe.shared_hidden = model.ffn_hidden[0]
    moe.capacity, moe.capacity_factor = "order", 1.25
    moe.losses = ({"name": "switch", "coefficient": 0.01}, {"name": "z", "coefficient": 1e-4})
    config.objective.z_loss = 1e-3
    about.paper, about.family = "arXiv 2402.01739", "mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_shared_experts.py::test_openmoe_runs_a_dense_layer_beside"
    )
    about.total_params, about.active_params = counts
    return config
