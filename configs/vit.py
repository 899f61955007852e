"""A dense vision transformer on Fashion-MNIST: the baseline of the vision models with experts.

    apt-get install dataset-fashion-mnist
    moejax train --config vit            # laptop CPU, float32
    moejax train --config vit:emoji      # the ten categories of the built-in emoji

The 28x28 pictures have a black edge of 2 pixels: 64 patches of 4x4. They are moved by up to 2
pixels and mirrored in training. The held-out split ``val`` is a twelfth of the published training
pictures; ``test`` is the published one. Of the categories of emoji one, Component, is in the
training split alone.
"""

from moejax.config import default_config

ARGS = ("", "emoji")


def get_config(arg=""):
    config = default_config("vit", "classification")
    config.about.update(
        paper="arXiv 2010.11929",
        family="vision-transformer",
        total_params=448_906,
        active_params=448_906,
        mechanism_test="tests/models/test_vit.py::test_all_patches_see_each_other",
    )
    config.model.update(num_classes=10, num_layers=4, d_model=96, num_heads=3, ffn_hidden=(256,))
    config.data.update(source="fashion_mnist:default", batch_size=64)
    config.objective.augment.update(crop_padding=2, flip="all")
    config.optim.update(learning_rate=2e-3, warmup_steps=100, weight_decay=0.05, b2=0.98)
    config.train.update(steps=3000, checkpoint_every=500)
    config.log.every = 50
    config.eval.update(every=500, metrics=("accuracy",))
    if arg == "emoji":
        # Or local:emoji3m, four art styles of the same.
        config.data.source = "builtin:emoji32"
        config.objective.augment.flip = "allowed"
    return config
