"""SigLIP, Zhai et al. 2023, arXiv 2303.15343: a sigmoid for each pair of picture and text.

Claim: the softmax over the batch can be left out; yes or no for each pair learns as well, and
better in small batches.

    moejax train --config siglip           # laptop CPU, emoji with their English names, float32
    moejax train --config siglip:emoji3m   # four art styles, twelve languages

As ``clip`` but for the loss, a scale that begins at 10 without a limit, and a learned bias that
begins at -10. All records of a concept family are positives of each other, each pair by itself.
The size is ours. Device, minutes, recalls: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "emoji3m")


def get_config(arg=""):
    config = load_config_dict(f"clip:{arg}" if arg else "clip")
    config.objective.loss = "siglip"
    config.model.update(initial_scale=10.0, max_scale=0.0, learn_bias=True, initial_bias=-10.0)
    about = config.about
    about.paper = "arXiv 2303.15343"
    about.total_params += 1
    about.active_params += 1
    about.mechanism_test = "tests/ops/test_contrastive.py::test_siglip_by_hand"
    return config
