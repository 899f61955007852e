"""Transfusion, Zhou et al. 2024, arXiv 2408.11039: next text token and diffusion in one model.

Claim: one transformer that predicts text tokens and denoises the latents of pictures between them
reaches Chameleon's FID at 7B with 0.029 of its FLOPs, CIDEr with 0.218, C4 perplexity with 0.489.

    moejax train --config transfusion        # or transfusion:small: laptop CPU, built-in data
    moejax train --config transfusion:7b     # the paper's 160m 370m 760m 1.4b 7b, bfloat16

Pictures are latents of an autoencoder without quantiser (``builtin:kl``; the sizes: 32 x 32 x 8 of
a 256-pixel picture, patches of 2 x 2). ``--config.model.latents.adapter=unet`` puts a U-Net around
the decoder instead of linear maps; ``--config.objective.process=flow`` is rectified flow.
Parameters of ``transfusion``: 2.12M, all active. Device, minutes, expected loss: not measured.
"""

from moejax.config import default_config

# d_model, layers, heads, feed-forward width, parameters.
SIZES = {
    "160m": (768, 16, 12, 2048, 163_750_656),
    "370m": (1024, 24, 16, 2816, 375_636_992),
    "760m": (1536, 24, 24, 4096, 780_510_720),
    "1.4b": (2048, 24, 16, 5632, 1_367_836_672),
    "7b": (4096, 32, 32, 11008, 6_745_493_504),
}
ARGS = ("", "small", *SIZES)
# fmt: off
INFERRED = (
    "data.batch_size", "data.drop_text", "data.image_tokenizer", "data.source",
    "data.text_tokenizer", "model.ffn_hidden", "model.latents.unet_width", "model.norm_placement",
    "model.qk_norm", "model.vocab_size", "objective.z_loss",
)
# fmt: on


def get_config(arg=""):
    config = default_config("decoder", "transfusion")
    model, data, optim = config.model, config.data, config.optim
    model.norm_placement, model.qk_norm = "pre", "none"
    model.latents.channels = 8
    data.image_tokenizer, data.text_first_share = "builtin:kl", 0.8
    config.objective.process, config.objective.image_weight = "ddpm", 5.0
    config.eval.metrics = ("likelihood", "denoising")
    config.about.paper, config.about.family = "arXiv 2408.11039", "dense"
    config.about.mechanism_test = (
        "tests/models/test_transfusion.py::"
        "test_patches_of_one_picture_see_each_other_unless_the_mask_is_causal"
    )
    if arg in ("", "small"):
        model.d_model, model.num_layers, model.num_heads, model.ffn_hidden = 128, 4, 4, (512,)
        model.vocab_size = 4112
        data.batch_size, data.sequence_length, config.train.steps = 16, 160, 300
        total = 2_120_832
    else:
        model.d_model, model.num_layers, model.num_heads, width, total = SIZES[arg]
        model.ffn_hidden = (width,)
        model.vocab_size, model.dtype, model.remat = 32_768, "bfloat16", "full"
        model.latents.grid, model.latents.patch = 32, 2
        data.batch_size, data.sequence_length, data.image_size = 512, 4096, 256
        optim.learning_rate, optim.final_fraction, optim.warmup_steps = 3e-4, 0.05, 4000
        optim.weight_decay, optim.clip_norm, optim.b1, optim.b2 = 0.1, 1.0, 0.9, 0.95
        config.mesh.data, config.mesh.fsdp = 1, -1
        config.train.steps, config.train.checkpoint_every, config.log.every = 250_000, 5000, 100
        config.about.approximate = INFERRED
    config.about.total_params = config.about.active_params = total
    return config
