"""How many experts a token runs, for the accounting of parameters and FLOPs."""

import math

from moejax.config.moe import MoEConfig
from moejax.config.trunk import TrunkConfig
from moejax.nn.moe_checks import router_options
from moejax.routing import ROUTERS
from moejax.routing.scores import SCORES


def ffn_choices(moe: MoEConfig) -> float:
    """Experts with weights that a token runs on average, in one iteration.

    What the router chooses (for a router without a fixed number, the most that it may, or the most
    that there are places for), less the share of experts without weights.
    """
    router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
    options = {**router.defaults(), **router_options(moe)}
    choices = router.choices(moe.columns, options)
    if moe.capacity != "none":
        choices *= min(1.0, moe.capacity_factor)
    return min(choices * moe.ffn_share, float(moe.pool))


def expert_rows(moe: MoEConfig, length: int) -> float:
    """Rows of experts with weights for each token of a row of that length, in one iteration.

    What :func:`ffn_choices` says; of soft routing the slots over the tokens that share them.
    """
    slots = soft_slots(moe)
    return slots / (max(1, moe.routing_group) * length) if slots else ffn_choices(moe)


def soft_slots(moe: MoEConfig) -> int:
    """Slots of all experts, for a router that mixes tokens into slots; 0 for others."""
    router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
    if router.slots is None:
        return 0
    return moe.pool * router.slots({**router.defaults(), **router_options(moe)})


def film_products(model: TrunkConfig) -> float:
    """Multiply-adds of a token in experts of kind "film": what all share, and their vectors."""
    d, moe = model.d_model, model.moe
    return 2.0 * d * (d + moe.num_experts + (moe.hidden or max(model.ffn_hidden)))


def router_products(model: TrunkConfig) -> float:
    """Multiply-adds of a token's logits, in one iteration, and of constant experts' mixtures.

    What is small is multiplied for all: by the scores of every modality, and for every constant
    expert, of which one is kept.
    """
    moe, d = model.moe, model.d_model
    router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
    columns = router.columns(moe.columns, {**router.defaults(), **router_options(moe)})
    scored = columns - moe.unscored_experts
    score = SCORES.get(moe.score.name, field="model.moe.score.name")
    towers = len(model.modalities) if moe.score.per_modality else 1
    shapes = score.shapes(d, scored, towers, **moe.score.options)
    products = sum(math.prod(shape) for shape, _ in shapes.values() if len(shape) > 2)
    options = {**score.defaults(), **moe.score.options}
    if options.get("dropout", 0):
        # In training; elsewhere there is one pass.
        products *= options["passes"]
    if moe.score.gating_residual:
        products += columns**2
    if moe.causal_router:
        products += (moe.causal_router_hidden or d // 2) * (d + columns)
    return float(products + moe.constant_experts * 3 * d)
