"""A dense vision transformer on Fashion-MNIST: the baseline of the vision models with experts.

    apt-get install dataset-fashion-mnist
    moejax train --config vit            # laptop CPU, float32
    moejax train --config vit:emoji      # the ten categories of the built-in emoji

The 28x28 pictures are 49 patches of 4x4, mirrored at random in training. The held-out split
``val`` is a twelfth of the published training pictures; ``test`` is the published one. Of the
categories of emoji one, Component, is in the training split alone. Two CPU cores: 9 minutes (15 of
processor time), 90.2% of ``test`` (seed 0).
"""

from moejax.config import default_config

ARGS = ("", "emoji")


def get_config(arg=""):
    config = default_config("vit", "classification")
    config.about.update(
        paper="arXiv 2010.11929",
        family="vision-transformer",
        total_params=198_922,
        active_params=198_922,
        mechanism_test="tests/models/test_vit.py::test_all_patches_see_each_other",
    )
    config.model.update(num_classes=10, num_layers=4, d_model=64, num_heads=2, ffn_hidden=(168,))
    config.model.image_size = config.data.image_size = 28
    config.data.update(source="fashion_mnist:default", batch_size=64)
    config.objective.augment.flip = "all"
    config.optim.update(learning_rate=2e-3, warmup_steps=100, weight_decay=0.05, b2=0.98)
    config.train.update(steps=12_000, checkpoint_every=2000)
    config.log.every = 100
    config.eval.update(every=2000, metrics=("accuracy",))
    if arg == "emoji":
        # Or local:emoji3m, four art styles of the same.
        config.data.source = "builtin:emoji32"
        config.model.image_size = config.data.image_size = 32
        config.objective.augment.update(crop_padding=2, flip="allowed")
    return config
