"""How many experts a token runs, for the accounting of parameters and FLOPs."""

from moejax.config.moe import MoEConfig
from moejax.nn.moe import router_options
from moejax.routing import ROUTERS


def ffn_choices(moe: MoEConfig) -> float:
    """Experts with weights that a token runs on average, in one iteration.

    What the router chooses (for a router without a fixed number, the most that it may), less the
    share that experts without weights have when all are chosen alike.
    """
    router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
    options = {**router.defaults(), **router_options(moe)}
    choices = router.choices(moe.columns, options)
    routed = moe.pool + moe.weightless
    return min(choices * moe.pool / routed, float(moe.pool))
