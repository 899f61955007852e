"""The continuous image tokenizer ``builtin:kl``: 32x32 pictures <-> an 8x8 grid of latent vectors.

The autoencoder of ``tokenizer_fsq`` without its quantiser: a normal posterior with a small weight
on its divergence from the standard normal (arXiv 2112.10752, section 3.1), for models that denoise
latents (arXiv 2408.11039).

    moejax train --config tokenizer_kl
    moejax eval --workdir runs/tokenizer_kl
    python tools/export_image_tokenizer.py --workdir runs/tokenizer_kl

836k parameters; 23 minutes on one CPU core (34 beside other work). Expected: train loss 0.0153, val
PSNR 28.5 dB, where FSQ's codes reach 23.5 and as many principal components of the patches 21.9
(experiments/tokenizer_kl).
"""

from moejax.config import default_config

ARGS = ("",)


def get_config(arg=""):
    config = default_config("kl_autoencoder", "autoencode")
    config.about.update(
        paper="arXiv 2112.10752",
        family="tokenizer",
        total_params=836_416,
        active_params=836_416,
        mechanism_test="tests/models/test_latent_codec.py::"
        "test_the_divergence_pulls_the_posterior_to_the_standard_normal",
    )
    config.data.update(format="images", batch_size=32)
    config.objective.update(l1=0.0, l2=1.0, kl=5e-3)
    config.optim.update(
        learning_rate=3e-3, warmup_steps=50, final_fraction=0.02, weight_decay=0.02, b2=0.98
    )
    config.train.update(steps=8000, checkpoint_every=1000)
    config.log.every = 50
    config.eval.update(every=2000, metrics=("reconstruction",), split="val")
    return config
