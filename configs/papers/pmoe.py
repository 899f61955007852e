"""pMoE, Chowdhury et al. 2023, arXiv 2306.04073: each expert takes the patches it values most.

Claim: where experts see only l of the n patches of a picture, those of the largest gate values, a
network needs fewer samples and fewer parameters, by a factor that is polynomial in n / l.

    moejax train --config pmoe           # or :small: laptop CPU, Fashion-MNIST, float32

Expert choice within each picture: each of 4 experts takes 12 of the 49 patches, and weighs them by
a softmax of its gate values over those 12. Gates begin near 0 (a standard deviation of 1e-4), so
that all 12 begin with about 1/12. Every other block has experts; the paper's networks are
convolutional, with one such layer. The baseline is ``vit``. Device, minutes, expected accuracy: not
measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")


def get_config(arg=""):
    config = load_config_dict("vit")
    moe, about = config.model.moe, config.about
    config.model.block_pattern = ("dense", "moe")
    moe.num_experts = 4
    moe.router.name = "expert_choice"
    # The mean number of experts of a patch: 49 patches x 1 over 4 experts, rounded down to 12.
    moe.router.options = {"capacity_factor": 1.0, "weights": "tokens", "rounding": "down"}
    moe.score.options = {"init_std": 1e-4}
    about.paper, about.family = "arXiv 2306.04073", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_pmoe.py::test_weights_are_a_softmax_over_the_patches"
    about.approximate = (
        "model.block_pattern",
        "model.moe.num_experts",
        "model.moe.router.options",
    )
    about.total_params, about.active_params = 392_970, 199_434
    return config
