"""Dynamic-DINO, Lu et al. 2025, arXiv 2507.17436: a dense layer becomes many fine experts.

Claim: a pretrained feed-forward layer, copied and cut into finer experts whose router begins such
that the cut copies stay together, is tuned as a mixture of experts without a drop at the start.

    moejax train --config vit            # the dense model, then:
    moejax train --config dynamic_dino:upcycle --config.train.init_from=runs/vit
    moejax train --config dynamic_dino   # or :small: the same from scratch

Of the paper this has the granularity decomposition alone, on a vision transformer: no detector, no
text. Each layer is copied 4 times, each copy cut by hidden units into 2 slices: 8 experts of half
the width. The router's columns for the slices of one copy begin equal, so that the 2 experts of a
patch are one whole copy; their weights sum to 2, and so each is 1. At step 0 ``upcycle`` gives what
the dense model gives. The numbers of copies and slices, and which blocks have experts, are not the
paper's. The baseline is ``vit``. Device, minutes, expected accuracy: not measured.
"""

from moejax.config import load_config_dict

COPIES, SLICES = 4, 2
ARGS = ("", "small", "upcycle")


def get_config(arg=""):
    config = load_config_dict("vit")
    model, moe, about = config.model, config.model.moe, config.about
    model.block_pattern = ("dense", "moe")
    moe.num_experts, moe.top_k = COPIES * SLICES, SLICES
    moe.hidden = model.ffn_hidden[0] // SLICES
    moe.router.options = {"renormalise": True, "scale": float(SLICES)}
    moe.score.options = {"alike": SLICES}
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    if arg == "upcycle":
        config.train.init_rename = (
            ("moe/experts/wi_edf$", "ffn/wi_mdf"),
            ("moe/experts/wo_efd$", "ffn/wo_mfd"),
        )
        config.train.init_experts, config.train.init_slices = (0,) * COPIES, SLICES
    about.paper, about.family = "arXiv 2507.17436", "vision-mixture-of-experts"
    about.mechanism_test = (
        "tests/papers/test_upcycled_vision.py::test_slices_of_a_copy_are_chosen_together"
    )
    about.approximate = (
        "model.block_pattern",
        "model.moe.losses",
        "model.moe.num_experts",
        "model.moe.router.options",
        "model.moe.top_k",
    )
    about.total_params, about.active_params = 393_482, 199_946
    return config
