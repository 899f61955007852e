"""Routers in Vision Mixture of Experts, Liu et al. 2024, arXiv 2401.15969: six of them, alike.

Claim: at the same cost experts that choose tokens are mostly better than tokens that choose
experts, and soft mixtures better than both.

    moejax train --config vision_routers:softmax_token    # laptop CPU, Fashion-MNIST, float32
    moejax train --config vision_routers:sparse_expert
    moejax train --config vision_routers:sparse_expert_clip

The argument is the router: ``softmax_token`` (the default), ``sinkhorn_token``, ``softmax_expert``,
``sinkhorn_expert``, ``sparse_expert`` (optimal transport with at most so many tokens for each
expert), ``soft``; ``dense`` has none. With ``_clip`` it is that of the pictures' tower of ``clip``,
on four art styles of emoji (`moejax prepare emoji3m`). All have the FLOPs of ``dense`` within 1%,
with experts as wide as its MLP: a token has one expert, or one on average, and there are as many
places as tokens. Of soft routing 40 slots for 49 patches (48 for 64 beside texts) cost that, with
the mixing in and out. What a plan costs, sums without a matrix product, is not in the FLOPs. Token
choice drops those who find no place, in their order, in evaluation those of the lowest weight.
Sparse routers see eight pictures together.

Departures: 8 experts for 32, in every other block, with SwiGLU; Fashion-MNIST for JFT-300M. What
the paper does where, but for the routers, is inferred from V-MoE and the authors' code. Accuracy
at 3e12 training FLOPs, 80.8 to 82.9%: experiments/vision_routers.
"""

from moejax.config import load_config_dict

BY_EXPERT = {"normalise": "softmax", "rounding": "down"}
# argument -> router, its options
ROUTERS = {
    "softmax_token": ("top_k", {"noise": "gaussian"}),
    "sinkhorn_token": ("sinkhorn", {}),
    "softmax_expert": ("expert_choice", BY_EXPERT),
    "sinkhorn_expert": ("expert_choice", {**BY_EXPERT, "plan": "sinkhorn"}),
    "sparse_expert": ("expert_choice", {**BY_EXPERT, "plan": "sparse"}),
    "soft": ("soft", {}),
}
PAIRS = "_clip"
ARGS = ("", "small", *ROUTERS, "dense", *(name + PAIRS for name in (*ROUTERS, "dense")))
# Parameters of the dense model; what experts add in all, for one token, with soft routing.
PICTURE_PARAMS = (217_354, 517_120, 1_024, 521_218)
PAIR_PARAMS = (968_353, 775_680, 1_536, 783_362)
# fmt: off
INFERRED = (
    "model.block_pattern", "model.moe.capacity_factor", "model.moe.eval_capacity",
    "model.moe.losses", "model.moe.router.options", "model.moe.routing_group",
)
# fmt: on


def get_config(arg=""):
    name = arg.removesuffix(PAIRS) if arg not in ("", "small") else "softmax_token"
    pairs = arg.endswith(PAIRS)
    config = load_config_dict("clip:emoji3m" if pairs else "vit")
    model, moe, about = config.model, config.model.moe, config.about
    model.num_layers, model.ffn_hidden = 4, (192,)
    about.paper, about.family = "arXiv 2401.15969", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_vision_routers.py::test_each_is_another_router"
    dense, added, added_active, added_soft = PAIR_PARAMS if pairs else PICTURE_PARAMS
    about.total_params = about.active_params = dense
    if name == "dense":
        return config
    about.total_params, about.active_params = dense + added, dense + added_active
    model.block_pattern = ("dense", "moe")
    moe.num_experts, moe.top_k, moe.equal_init = 8, 1, True
    moe.router.name, options = ROUTERS[name]
    moe.router.options = dict(options)
    moe.routing_group = 1 if name == "soft" else 8
    if name.endswith("token"):
        moe.capacity, moe.capacity_factor = "order", 1.0
        moe.eval_capacity, moe.eval_capacity_factor = "priority", 1.0
    if name == "softmax_token":
        names = ("importance", "load")
        moe.losses = tuple({"name": loss, "coefficient": 0.005} for loss in names)
    if name == "soft":
        moe.router.options.slots = 6 if pairs else 5
        moe.score.name, moe.score.options = "cosine", {"learn_scale": True}
        about.total_params = about.active_params = dense + added_soft
    about.approximate = INFERRED
    return config
