"""Chameleon, arXiv 2405.09818: one dense decoder over interleaved text and image codes.

Claim: trained on both from the start, one softmax over text tokens and image codes holds up to 34B
with QK-norm, norms on the branch outputs and z-loss, without dropout. The sizes are those of the
dense baseline of Mixture-of-Transformers (arXiv 2411.04996): ``mot`` with everything shared.

    moejax train --config chameleon      # or chameleon:small: laptop CPU, built-in data, float32
    moejax train --config chameleon:7b   # 37m 94m 443m 880m 1.5b 7b, bfloat16

A size needs data with tokenizers of 65,536 ids in all, 8,192 of them image codes (1,024 an image).
Parameters of ``chameleon``: 2.36M, all active. On two CPU cores 300 steps take 4 minutes; val loss
(seed 0): text 6.25 nats a token (unigram 6.49), image 5.54 nats a code (6.21).
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "37m", "94m", "443m", "880m", "1.5b", "7b")
# What only the config of Mixture-of-Transformers has to guess.
UNTIED_ALONE = ("model.qk_norm", "model.untie.final_norm")


def get_config(arg=""):
    config = load_config_dict(f"mot:{arg}")
    for name in config.model.untie:
        config.model.untie[name] = False
    about = config.about
    about.approximate = tuple(name for name in about.approximate if name not in UNTIED_ALONE)
    about.paper, about.family = "arXiv 2405.09818", "dense"
    about.mechanism_test = "tests/papers/test_chameleon.py::test_all_weights_are_shared"
    about.total_params = about.active_params
    return config
