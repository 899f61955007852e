"""CLIP-MoE, Zhang et al. 2024, arXiv 2409.19291: experts from stages of one contrastive model.

Claim: feed-forward layers that were trained on, each time with negatives that the stages before
could not tell apart, are experts for different details, and one model of all of them finds more.

    moejax train --config clip_moe:stage --workdir runs/stage1 --config.train.init_from=runs/stage0
    moejax train --config clip_moe --workdir runs/clip_moe --config.train.init_from=runs/experts

docs/vision.md has the steps from ``clip`` to here. ``stage`` trains the feed-forward
layers of ``clip`` with negatives of the same cluster (``data.clusters``); the default has four of
them as experts, two for each token by a softmax whose weights are renormalised, and trains routers
alone, with a balance loss. Departures: all blocks of both towers have experts, there the last ones;
one caption, there a long and a short one; learning rates are ours. Recalls: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "stage")


def get_config(arg=""):
    config = load_config_dict("clip")
    model, moe, about = config.model, config.model.moe, config.about
    about.paper = "arXiv 2409.19291"
    config.train.steps = 500
    config.optim.learning_rate = 3e-4
    if arg == "stage":
        config.optim.freeze = ("^(?!.*/ffn/)",)
        about.mechanism_test = "tests/surgery/test_multiplet.py::test_a_stage_trains_mlps_alone"
        return config
    model.block_pattern = model.text.block_pattern = ("moe",)
    moe.num_experts, moe.top_k, moe.router.options = 4, 2, {"renormalise": True}
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    config.optim.freeze = ("^(?!.*/router/)",)
    about.mechanism_test = "tests/surgery/test_multiplet.py::test_equal_stages_are_their_base"
    about.total_params, about.active_params = 2_076_001, 1_338_721
    return config
