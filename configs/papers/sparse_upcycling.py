"""Sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055: experts that begin as a dense layer.

Claim: a mixture of experts that begins with copies of a trained dense model passes it with about
half of the compute that the dense model took.

    moejax train --config vit            # the dense model, then one of:
    moejax train --config sparse_upcycling:upcycle --config.train.init_from=runs/vit
    moejax train --config sparse_upcycling:upcycle_top2 --config.train.init_from=runs/vit
    moejax train --config sparse_upcycling     # or :small: the same from scratch

Every other block has 8 experts, all copies of the block's dense layer; routers are drawn, all else
is taken over. Each expert takes a quarter of a picture's patches, and a patch's weights are divided
by their sum: at step 0 it gets what it got from the dense layer, unless no expert takes it.
``upcycle_top2`` chooses two experts for each patch instead, and so is equal for all of them. As in
the paper for vision (recalled, not read): every second layer, two experts for a patch on average,
weights that sum to 1. Departure: the optimizer begins anew, as all runs do that begin from another.
The baseline is ``vit``, trained on. Device, minutes, expected accuracy: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "small", "upcycle", "upcycle_top2")


def get_config(arg=""):
    config = load_config_dict("vit")
    moe, about = config.model.moe, config.about
    config.model.block_pattern = ("dense", "moe")
    moe.num_experts, moe.top_k = 8, 2
    if arg == "upcycle_top2":
        moe.router.options = {"renormalise": True}
        moe.losses = ({"name": "switch", "coefficient": 0.01},)
    else:
        moe.router.name = "expert_choice"
        moe.router.options = {
            "capacity_factor": 2.0,
            "normalise": "softmax",
            "rounding": "down",
            "weights": "share",
        }
    if arg.startswith("upcycle"):
        config.train.init_experts = (0,) * moe.num_experts
        config.train.init_rename = (
            ("moe/experts/wi_edf$", "ffn/wi_mdf"),
            ("moe/experts/wo_efd$", "ffn/wo_mfd"),
        )
    else:
        moe.equal_init = True
    about.paper, about.family = "arXiv 2212.05055", "vision-mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_upcycled_vision.py::test_an_upcycled_model_is_its_dense_source"
    )
    about.approximate = (
        "model.block_pattern",
        "model.moe.num_experts",
        "model.moe.router.options",
        "model.moe.routing_group",
    )
    about.total_params, about.active_params = 651_530, 264_458
    return config
