"""EWA, 2023, arXiv 2308.06093: experts that are averaged into the dense ViT that they came from.

Claim: a vision transformer whose feed-forward layers are trained as several experts, each on a
random part of the patches and averaged with the others a little after every step, ends as a dense
one that is better than the same trained densely.

    moejax train --config ewa            # or :small: laptop CPU, Fashion-MNIST, float32
    moejax convert dense --workdir runs/ewa --to runs/ewa_dense
    moejax eval --workdir runs/ewa_dense --split test

Every other block has 4 experts, which begin equal. There is no router (its weights are never read):
patches are dealt out by lot, with weight 1. After each step an expert is mixed with the mean of the
others, whose weight grows from 0 to ``optim.share_rate``. The model with experts is for training
alone: in evaluation it deals patches out in order, which stands for nothing; only the dense model
is to be judged. Its parameters are those of ``vit``, the baseline. Which blocks have experts, how
many, and the rate are not the paper's. Device, minutes, expected accuracy: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small")


def get_config(arg=""):
    config = load_config_dict("vit")
    moe, about = config.model.moe, config.about
    config.model.block_pattern = ("dense", "moe")
    moe.num_experts, moe.top_k, moe.equal_init = 4, 1, True
    moe.router.name = "random_partition"
    config.optim.share_rate = 0.3
    about.paper, about.family = "arXiv 2308.06093", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_ewa.py::test_experts_are_shared_after_each_step"
    about.approximate = (
        "model.block_pattern",
        "model.moe.num_experts",
        "optim.share_rate",
        "optim.share_steps",
    )
    about.total_params, about.active_params = 392_970, 199_434
    return config
