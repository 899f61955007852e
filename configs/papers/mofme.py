"""MoFME, Zhang et al. 2023, arXiv 2312.16610: experts that only modulate shared features.

Claim: experts that scale and shift what one shared network computes do what whole networks do, with
a fraction of their parameters, and a router that is asked several times knows where it is unsure.

    moejax train --config mofme          # or :small: laptop CPU, Fashion-MNIST, float32

One gated layer ``gelu(x A) * (x B)`` and one adaptor are shared; each of 8 experts is a scale and a
shift of the features between them, of which a patch takes two, with weights that sum to 1. In
training the router is asked 5 times with dropout, and a logit counts for less where the answers
differ. Departures: the paper removes rain and snow from pictures, this finds their class; the
authors' code makes scale and shift from the features by a matrix for each expert; how the passes
are put together is ours (docs/decisions.md). The baseline is ``vit``. Device, minutes, expected
accuracy: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")


def get_config(arg=""):
    config = load_config_dict("vit")
    moe, about = config.model.moe, config.about
    config.model.block_pattern = ("moe",)
    moe.num_experts, moe.top_k, moe.kind, moe.activation = 8, 2, "film", "gelu"
    moe.router.options = {"normalise_first": False}
    moe.score.name = "uncertain"
    moe.score.options = {"passes": 5, "dropout": 0.1}
    about.paper, about.family = "arXiv 2312.16610", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_mofme.py::test_experts_modulate_shared_features"
    about.approximate = (
        "model.moe.kind",
        "model.moe.num_experts",
        "model.moe.score.options",
        "model.moe.top_k",
    )
    about.total_params = about.active_params = 194_826
    return config
