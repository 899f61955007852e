"""DiffMoE, Shi et al. 2025, arXiv 2503.14487: experts choose among all patches of the batch.

Claim: where experts see the patches of all pictures at all noise levels in training, and a small
network foresees what they take, quality is that of a dense model with three times the parameters.

    moejax train --config diffmoe        # or diffmoe:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config diffmoe:s      # the authors' sizes: s b l xl, bfloat16

Each expert takes its even share of the batch's patches, those of its largest softmax scores, which
are weights too; every other block has experts. A causal router as wide as the model learns by
binary cross-entropy who is taken, without a gradient to the patches. Elsewhere it says how many
patches an expert takes: those for which it is surer than it was, on a moving average, of the last
one taken in training. That is the public code's way; with ``causal_rule="aux_router"`` it chooses
each patch itself. Sizes and training of b, l, xl are those of ProMoE's repository. Departures: the
causal router has no biases; a batch is a microbatch, on any mesh; else as ``dit`` says.
Device, minutes, quality: not measured.
"""

from moejax.config import load_config_dict

# The size of ``dit``, experts, parameters in all and active.
SIZES = {
    "s": ("s2", 16, 139_944_304, 33_775_984),
    "b": ("b2", 8, 332_014_144, 133_833_280),
    "l": ("l2", 8, 1_175_025_776, 470_382_704),
    "xl": ("xl2", 8, 1_733_813_120, 693_363_584),
}
ARGS = ("", "small", *SIZES)


def get_config(arg=""):
    base, experts, *counts = SIZES.get(arg, ("", 8, 801_344, 342_592))
    config = load_config_dict(f"dit:{base}" if base else "dit")
    model, moe, about = config.model, config.model.moe, config.about
    model.learned_range = config.objective.learned_range = False
    config.objective.update(process="flow", schedule="cosine")
    config.objective.times.distribution = "logit_normal"
    model.block_pattern = ("dense", "moe")
    moe.update(num_experts=experts, hidden=4 * model.d_model, activation="gelu", routing_group=0)
    moe.score.options = {"init_std": 0.006}
    moe.router.name = "expert_choice"
    moe.router.options = {
        "normalise": "softmax",
        "capacity_factor": 1.0,
        "rounding": "down",
        "causal_rule": "aux_count",
    }
    moe.update(causal_router=True, causal_router_hidden=model.d_model, causal_router_decay=0.95)
    moe.losses = ({"name": "causal_router", "coefficient": 1.0},)
    # The weight of the capacity predictor's loss is inferred.
    about.approximate += ("model.moe.losses",)
    if base:
        config.train.steps = 500_000
    if arg == "s":
        # At 128 pixels, as in the authors' own config.
        model.update(image_size=16, num_heads=16)
        config.data.update(image_size=128, batch_size=512)
        about.approximate += ("train.steps",)
    about.paper, about.family = "arXiv 2503.14487", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_dit_experts.py::test_experts_choose_from_the_batch"
    about.total_params, about.active_params = counts
    return config
