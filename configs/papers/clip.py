"""CLIP, Radford et al. 2021, arXiv 2103.00020: pictures and texts in one space.

Claim: which text belongs to which picture of a large batch is enough to learn features of pictures
that find texts, and classes by the names of the classes alone.

    moejax train --config clip           # laptop CPU, emoji with their English names, float32
    moejax train --config clip:emoji3m   # four art styles, twelve languages
    moejax eval --workdir runs/clip --split test

``emoji3m`` is made by `moejax prepare emoji3m`.

A vision transformer and a tower of texts of the same blocks; a symmetric softmax over the batch,
whose scale begins at 1 / 0.07 and ends at 100 at most. Departures: pictures of one concept family,
also in another style or language, are positives of each other (``objective.positives``), each
with its part of the target; texts see both directions and are pooled by their mean. The size is
ours: what CLIP was trained on is not to be had from here. Device, minutes, recalls: not measured.
"""

from moejax.config import default_config

ARGS = ("", "emoji3m")
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "hi", "sw", "tr", "pl", "ja")


def get_config(arg=""):
    config = default_config("two_towers", "contrastive")
    config.about.update(
        paper="arXiv 2103.00020",
        family="contrastive",
        total_params=968_161,
        active_params=968_161,
        mechanism_test="tests/ops/test_contrastive.py::test_clip_by_hand",
        approximate=("model.d_model", "model.num_layers", "optim.learning_rate"),
    )
    config.model.update(num_layers=3, d_model=96, num_heads=3, ffn_hidden=(256,), text_length=24)
    config.model.text.num_layers = 2
    config.data.update(source="builtin:emoji32", batch_size=64, sequence_length=24)
    config.objective.augment.update(crop_padding=3, flip="allowed")
    config.optim.update(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1, b2=0.98)
    config.train.update(steps=1500, checkpoint_every=500)
    config.log.every = 50
    config.eval.update(every=500, metrics=("retrieval",))
    if arg == "emoji3m":
        config.data.source = "local:emoji3m"
        config.data.languages = LANGUAGES
        config.train.steps = 6000
    return config
