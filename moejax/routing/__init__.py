"""Routing as pure functions: which experts a token goes to, with which weights, at what loss."""

# Importing these registers their routers and losses.
from moejax.routing import balance_losses as _balance_losses
from moejax.routing import contrastive as _contrastive
from moejax.routing import entropy_losses as _entropy_losses
from moejax.routing import expert_choice as _expert_choice
from moejax.routing import fixed as _fixed
from moejax.routing import soft as _soft
from moejax.routing import top_k as _top_k
from moejax.routing import top_p as _top_p
from moejax.routing import uncertain as _uncertain
from moejax.routing.balance import CONTROLLERS, fair_counts, update_bias
from moejax.routing.capacity import expert_capacity, heterogeneous_capacity, limit_capacity
from moejax.routing.checks import check_router, check_router_loss, check_score
from moejax.routing.fixed import without_score
from moejax.routing.losses import ROUTER_LOSSES, RouterLoss
from moejax.routing.perturb import jitter
from moejax.routing.plan import (
    ROUTERS,
    Router,
    RouterInputs,
    RoutingPlan,
    SoftPlan,
    check_options,
    keyword_defaults,
    router,
)
from moejax.routing.reuse import open_experts, pool_mask
from moejax.routing.scores import (
    SCORES,
    Score,
    add_previous,
    allowed_experts,
    modality_attributes,
)
from moejax.routing.stats import routing_statistics, summarise
from moejax.routing.threshold import last_taken, move_threshold

__all__ = [
    "CONTROLLERS",
    "ROUTERS",
    "ROUTER_LOSSES",
    "SCORES",
    "Router",
    "RouterInputs",
    "RouterLoss",
    "RoutingPlan",
    "Score",
    "SoftPlan",
    "add_previous",
    "allowed_experts",
    "check_options",
    "check_router",
    "check_router_loss",
    "check_score",
    "expert_capacity",
    "fair_counts",
    "heterogeneous_capacity",
    "jitter",
    "keyword_defaults",
    "last_taken",
    "limit_capacity",
    "modality_attributes",
    "move_threshold",
    "open_experts",
    "pool_mask",
    "router",
    "routing_statistics",
    "summarise",
    "update_bias",
    "without_score",
]
