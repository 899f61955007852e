"""LMFusion, Shi et al. 2024, arXiv 2412.15188: a frozen text model learns to draw.

Claim: an image tower that starts as a copy of the text model's own weights, and is alone trained
with the Transfusion loss, adds image understanding and generation and leaves the text as it was.

    moejax train --config lmfusion:text                 # the text model, from scratch
    moejax train --config lmfusion --config.train.init_from=runs/lmfusion_text
    moejax train --config lmfusion:8b --config.train.init_from=DIR    # a model of Llama 3's shape

Text tower, embedding and head are frozen: text-only logits stay the same bit for bit. Pictures go
in and out through a U-Net. Parameters of ``lmfusion``: 3.39M, 2.34M for a token. Device, minutes
and expected loss: not measured.
"""

from moejax.config import default_config, load_config_dict

ARGS = ("", "text", "8b")
# The paper was not at hand: its recipe is known from the notes of others.
# fmt: off
INFERRED = (
    "data.batch_size", "data.drop_text", "data.image_tokenizer", "data.source",
    "data.text_tokenizer", "model.ffn_hidden", "model.latents.unet_width", "model.num_kv_heads",
    "model.rope_theta", "model.vocab_size", "objective.image_weight", "optim.learning_rate",
    "optim.warmup_steps", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("mot:transfusion_7b" if arg == "8b" else "mot:transfusion_small")
    model, about = config.model, config.about
    model.norm_placement = "pre"
    model.latents.adapter = "unet"
    about.paper, about.family = "arXiv 2412.15188", "mixture-of-transformers"
    about.mechanism_test = "tests/papers/test_lmfusion.py::test_text_logits_stay_bit_for_bit"
    if arg == "text":
        for name in model.untie:
            model.untie[name] = False
        model.modalities = ("text",)
        model.latents.channels = 0
        # A caption is a dozen tokens: rows of text alone are short.
        config.data.sequence_length = 64
        with config.unlocked():
            config.objective = default_config().objective
        config.eval.metrics = ("likelihood",)
        about.family = "dense"
        about.total_params = about.active_params = 2_102_400
        return config
    config.train.init_broadcast = True
    config.optim.freeze = ("stack/.*@text", "final_norm/.*@text", "embedding_vd", "head_dv")
    if arg == "8b":
        model.num_kv_heads, model.ffn_hidden, model.rope_theta = 8, (14_336,), 500_000.0
        model.vocab_size, model.latents.unet_width = 128_256, 512
        about.approximate = INFERRED
        about.total_params, about.active_params = 15_039_623_176, 8_060_035_080
    else:
        about.total_params, about.active_params = 3_387_592, 2_337_864
    return config
