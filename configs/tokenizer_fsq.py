"""The image tokenizer ``builtin:fsq``: 32x32 pictures <-> 64 codes of 1,000, trained on emoji.

Finite scalar quantisation (arXiv 2309.15505) of a convolutional autoencoder's 8x8 grid.

    moejax train --config tokenizer_fsq
    moejax eval --workdir runs/tokenizer_fsq
    python tools/export_image_tokenizer.py --workdir runs/tokenizer_fsq

962k parameters; 18 minutes on two CPU cores (28 beside other work). Expected: train loss 0.019, val
PSNR 23.5 dB, where k-means patch codes at equal bits reach 21.8 (experiments/tokenizer_fsq).
"""

from moejax.config import default_config

ARGS = ("",)


def get_config(arg=""):
    config = default_config("fsq_autoencoder", "autoencode")
    config.about.update(
        paper="arXiv 2309.15505",
        family="tokenizer",
        total_params=962_356,
        active_params=962_356,
        mechanism_test="tests/models/test_tokenizer.py::"
        "test_reconstruction_depends_on_the_picture_through_its_codes_only",
    )
    config.data.update(format="images", batch_size=32)
    # Squared error alone: PSNR is what is compared.
    config.objective.update(l1=0.0, l2=1.0)
    config.optim.update(
        learning_rate=3e-3, warmup_steps=50, final_fraction=0.02, weight_decay=0.02, b2=0.98
    )
    config.train.update(steps=10_000, checkpoint_every=1000)
    config.log.every = 50
    config.eval.update(every=2000, metrics=("reconstruction",), split="val")
    return config
