"""Chameleon, arXiv 2405.09818: one dense decoder over interleaved text and image codes.

Claim: trained on both from the start, one softmax over text tokens and image codes holds up to 34B
with QK-norm, norms on the branch outputs and z-loss, without dropout. The sizes are those of the
dense baseline of Mixture-of-Transformers (arXiv 2411.04996): ``mot`` with everything shared.

    moejax train --config chameleon      # or chameleon:small: laptop CPU, built-in data, float32
    moejax train --config chameleon:7b   # 37m 94m 443m 880m 1.5b 7b, bfloat16

A size needs data with tokenizers of 65,536 ids in all, 8,192 of them image codes (1,024 an image).
Parameters of ``chameleon``: 2.36M, all active. Device, minutes and expected loss: not measured.
"""

from moejax.config import default_config

# d_model, layers, heads, sequences in a batch, steps, parameters.
SIZES = {
    "37m": (256, 4, 8, 256, 160_000, 36_964_864),
    "94m": (512, 8, 8, 256, 160_000, 94_381_568),
    "443m": (1024, 24, 16, 256, 160_000, 442_552_320),
    "880m": (1536, 24, 24, 512, 120_000, 880_882_176),
    "1.5b": (2048, 24, 16, 512, 120_000, 1_501_667_328),
    "7b": (4096, 32, 32, 768, 120_000, 7_013_150_720),
}
ARGS = ("", "small", *SIZES)
# What the paper does not fix for this setting; the optimizer is that of its Transfusion setting.
# fmt: off
INFERRED = (
    "data.batch_size", "data.drop_text", "data.image_tokenizer", "data.order", "data.source",
    "data.text_tokenizer", "objective.z_loss", "optim.b1", "optim.b2", "optim.clip_norm",
    "optim.eps", "optim.final_fraction", "optim.learning_rate", "optim.schedule",
    "optim.warmup_steps", "optim.weight_decay",
)
# fmt: on


def ffn_hidden(d_model: int) -> int:
    """Two thirds of 4 d, rounded up to a multiple of 256 (the reference code's SwiGLU)."""
    return -(-(8 * d_model // 3) // 256) * 256


def get_config(arg=""):
    config = default_config()
    model, data, optim = config.model, config.data, config.optim
    model.norm_placement, model.qk_norm = "post_branch", "layer"
    config.about.paper, config.about.family = "arXiv 2405.09818", "dense"
    config.about.mechanism_test = "tests/papers/test_chameleon.py::test_all_weights_are_shared"
    if arg in ("", "small"):
        model.d_model, model.num_layers, model.num_heads = 128, 4, 4
        # Rows of four records each, as in ``quickstart``.
        data.batch_size, data.sequence_length, config.train.steps = 8, 304, 300
        total = 2_358_656
    else:
        size = SIZES[arg]
        model.d_model, model.num_layers, model.num_heads = size[:3]
        data.batch_size, config.train.steps, total = size[3:]
        model.vocab_size, model.dtype, model.remat = 65_536, "bfloat16", "full"
        data.sequence_length, data.image_size, data.drop_text = 4096, 512, 0.0
        optim.learning_rate, optim.final_fraction, optim.warmup_steps = 3e-4, 0.05, 4000
        optim.weight_decay, optim.clip_norm, optim.b1, optim.b2 = 0.1, 1.0, 0.9, 0.95
        config.mesh.data, config.mesh.fsdp = 1, -1
        config.train.checkpoint_every, config.log.every = 5000, 100
        config.about.approximate = INFERRED
    model.ffn_hidden = (ffn_hidden(model.d_model),)
    config.about.total_params = config.about.active_params = total
    return config
