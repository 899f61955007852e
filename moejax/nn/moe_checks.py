"""What a layer of experts can be made of: the options of its router, and mistakes by field."""

from typing import Any

from moejax.config.checks import require
from moejax.config.moe import MoEConfig
from moejax.config.trunk import TrunkConfig
from moejax.routing import ROUTERS, check_options, check_router, check_router_loss, check_score


def router_options(moe: MoEConfig) -> dict[str, Any]:
    """The options of the config's router; ``top_k`` is a field of its own."""
    options = dict(moe.router.options)
    if "top_k" in ROUTERS.get(moe.router.name, field="model.moe.router.name").defaults():
        options["top_k"] = moe.top_k
    return options


def check_moe(config: TrunkConfig) -> None:
    """UserError, by field, for what a layer of experts cannot be made of."""
    moe = config.moe
    require(
        moe.num_experts > 0, "model.moe.num_experts", "must be positive where blocks have experts"
    )
    choices = moe.pool + moe.weightless
    check_router(moe.router.name, router_options(moe), choices, causal_model=config.causal)
    check_score(moe.score.name, moe.score.options)
    require(
        moe.score.input == "token" or config.modulated,
        "model.moe.score.input",
        f"{moe.score.input!r} is what a model with a condition tells its rows (dit); use 'token'",
    )
    require(
        moe.score.input == "token" or moe.score.name != "attributes",
        "model.moe.score.input",
        "is 'token' for the score 'attributes', which sees the modality alone",
    )
    require(
        "attributes" not in moe.score.options,
        "model.moe.score.options.attributes",
        "is the number of modalities; leave it out",
    )
    for i, loss in enumerate(moe.losses):
        check_router_loss(loss.name, loss.options, f"model.moe.losses[{i}]")
    noise = router_options(moe)
    require(
        "load" not in [loss.name for loss in moe.losses]
        or (noise.get("noise") == "gaussian" and noise.get("noise_scale", 1.0) > 0),
        "model.moe.losses",
        "'load' is about noise; it needs model.moe.router.options.noise=gaussian",
    )
    require(
        "causal_router" not in [loss.name for loss in moe.losses] or moe.causal_router,
        "model.moe.causal_router",
        "the loss 'causal_router' needs model.moe.causal_router=True",
    )
    own_router = ROUTERS.get(moe.router.name)
    require(
        moe.kind == "mlp" or own_router.slots is None,
        "model.moe.kind",
        f"experts of kind {moe.kind!r} have no slots; router {moe.router.name!r} needs 'mlp'",
    )
    for field, none in (("capacity", "none"), ("losses", ())):
        require(
            own_router.slots is None or getattr(moe, field) == none,
            f"model.moe.{field}",
            f"router {moe.router.name!r} mixes tokens, and none is chosen or dropped; use {none}",
        )
    require(
        moe.balance.name == "none" or own_router.biased,
        "model.moe.balance.name",
        f"router {moe.router.name!r} has no use for a bias",
    )
    require(
        not moe.shared_competing or own_router.competing,
        "model.moe.shared_competing",
        f"router {moe.router.name!r} gives shared experts no weights; 0 adds them as they are",
    )
    kind = f"controller {moe.balance.name!r}"
    own = {"ffn_share": 1.0} if moe.balance.name == "increment" else {}
    check_options(kind, own, moe.balance.options, "model.moe.balance.options")
    rule = router_options(moe).get("causal_rule")
    require(
        rule not in ("aux_router", "aux_count") or moe.causal_router,
        "model.moe.causal_router",
        f"causal_rule={rule!r} needs model.moe.causal_router=True",
    )
    _check_prototypes(moe)


def _check_prototypes(moe: MoEConfig) -> None:
    """What ProMoE is made of fits together."""
    require(
        "contrastive" not in [loss.name for loss in moe.losses]
        or (moe.score.name == "cosine" and not moe.score.per_modality),
        "model.moe.losses",
        "'contrastive' is about prototypes that all modalities share; it needs "
        "model.moe.score.name=cosine and per_modality=False",
    )
    if not moe.unscored_experts:
        return
    require(
        ROUTERS.get(moe.router.name).slots is None,
        "model.moe.unscored_experts",
        f"router {moe.router.name!r} mixes tokens and sends them nowhere",
    )
    factor = moe.router.options.get("capacity_factor", 1.0)
    require(
        factor >= 1,
        "model.moe.router.options.capacity_factor",
        "below 1 leaves out tokens that may choose nothing but model.moe.unscored_experts",
    )
