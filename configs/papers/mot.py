"""Mixture-of-Transformers, Liang et al. 2024, arXiv 2411.04996: codes (Chameleon) and latents.

Claim: with QKV, output projection, feed-forward and norms of each modality's own, and one attention
over all, the 7B model reaches the dense model's validation losses in 55.8% of its FLOPs.

    moejax train --config mot            # or mot:small: laptop CPU, built-in data, float32
    moejax train --config mot:7b         # the paper's sizes: 37m 94m 443m 880m 1.5b 7b, bfloat16
    moejax train --config mot:transfusion_small   # and _160m, _760m, _1.4b, _7b

A size is that of the parameters one token meets (7b: 13.49B in total, 7.01B active). It needs data
with tokenizers of 65,536 ids in all. The dense baseline is ``chameleon`` at the same size.
Parameters of ``mot``: 3.41M in total, 2.36M active. On two CPU cores 300 steps take 4 minutes; val
loss (seed 0): text 6.13 nats a token (unigram 6.49), image 5.50 nats a code (6.21).
"""

from moejax.config import default_config, load_config_dict

# d_model, layers, heads, sequences in a batch, steps, total and active parameters.
SIZES = {
    "37m": (256, 4, 8, 256, 160_000, 40_375_296, 36_964_864),
    "94m": (512, 8, 8, 256, 160_000, 121_654_272, 94_381_568),
    "443m": (1024, 24, 16, 256, 160_000, 750_886_912, 442_552_320),
    "880m": (1536, 24, 24, 512, 120_000, 1_560_437_760, 880_882_176),
    "1.5b": (2048, 24, 16, 512, 120_000, 2_734_899_200, 1_501_667_328),
    "7b": (4096, 32, 32, 768, 120_000, 13_489_430_528, 7_013_150_720),
}
# The Transfusion setting is the ``transfusion`` config of that size untied: its total parameters.
TRANSFUSION = {
    "small": 3_170_560,
    "160m": 277_022_208,
    "760m": 1_460_063_232,
    "1.4b": 2_601_062_400,
    "7b": 13_221_765_120,
}
ARGS = ("", "small", *SIZES, *(f"transfusion_{size}" for size in TRANSFUSION))
# What the paper does not fix for this setting; the optimizer is that of its Transfusion setting.
# fmt: off
INFERRED = (
    "data.batch_size", "data.drop_text", "data.image_tokenizer", "data.order", "data.source",
    "data.text_tokenizer", "model.qk_norm", "model.untie.final_norm", "objective.z_loss",
    "optim.b1", "optim.b2", "optim.clip_norm", "optim.eps", "optim.final_fraction",
    "optim.learning_rate", "optim.schedule", "optim.warmup_steps", "optim.weight_decay",
)
# fmt: on


def get_config(arg=""):
    setting, _, size_name = arg.rpartition("_")
    config = load_config_dict(f"transfusion:{size_name}") if setting else default_config()
    model, data, optim = config.model, config.data, config.optim
    for name in model.untie:
        model.untie[name] = True
    model.norm_placement = "post_branch"
    config.about.paper, config.about.family = "arXiv 2411.04996", "mixture-of-transformers"
    config.about.mechanism_test = "tests/papers/test_mot.py::test_modalities_have_own_weights"
    if setting:
        config.about.total_params = TRANSFUSION[size_name]
        return config
    model.qk_norm = "layer"
    if arg in ("", "small"):
        model.d_model, model.num_layers, model.num_heads = 128, 4, 4
        # Rows of four records each, as in ``quickstart``.
        data.batch_size, data.sequence_length, config.train.steps = 8, 304, 300
        total, active = 3_408_640, 2_358_656
    else:
        size = SIZES[arg]
        model.d_model, model.num_layers, model.num_heads = size[:3]
        data.batch_size, config.train.steps, total, active = size[3:]
        model.vocab_size, model.dtype, model.remat = 65_536, "bfloat16", "full"
        data.sequence_length, data.image_size, data.drop_text = 4096, 512, 0.0
        optim.learning_rate, optim.final_fraction, optim.warmup_steps = 3e-4, 0.05, 4000
        optim.weight_decay, optim.clip_norm, optim.b1, optim.b2 = 0.1, 1.0, 0.9, 0.95
        config.mesh.data, config.mesh.fsdp = 1, -1
        config.train.checkpoint_every, config.log.every = 5000, 100
        config.about.approximate = INFERRED
    # Two thirds of 4 d, rounded up to a multiple of 256 (the reference code's SwiGLU).
    model.ffn_hidden = (-(-(8 * model.d_model // 3) // 256) * 256,)
    config.about.total_params, config.about.active_params = total, active
    return config
