"""What a config may say about a router: unknown names, ill-typed or impossible options."""

from collections.abc import Mapping
from typing import Any

from moejax.config.checks import require, require_one_of
from moejax.errors import UserError
from moejax.routing.losses import ROUTER_LOSSES
from moejax.routing.plan import ROUTERS, check_options
from moejax.routing.scores import SCORES

FIELD = "model.moe.router"


def require_option(condition: bool, name: str, message: str) -> None:
    """UserError that names the router's option ``name``, unless ``condition``."""
    # How many experts a token has is a field of its own: it is not about the router alone.
    require(condition, "model.moe.top_k" if name == "top_k" else f"{FIELD}.options.{name}", message)


def require_choice(options: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    """UserError unless the option ``name`` is one of ``choices``."""
    shown = ", ".join(repr(choice) for choice in choices)
    require_option(options[name] in choices, name, f"{options[name]!r} is none of {shown}")


def require_at_least(options: Mapping[str, Any], name: str, least: int | float) -> None:
    """UserError unless the option ``name`` is ``least`` or more."""
    value = options[name]
    require_option(value >= least, name, f"must be at least {least:g}, got {value:g}")


def require_above_zero(options: Mapping[str, Any], name: str) -> None:
    """UserError unless the option ``name`` is positive."""
    require_option(options[name] > 0, name, f"must be positive, got {options[name]:g}")


def require_top_k(options: Mapping[str, Any], num_experts: int) -> None:
    """UserError unless 1 <= top_k <= ``num_experts``."""
    k = options["top_k"]
    require_option(k >= 1, "top_k", f"must be at least 1, got {k}")
    require_option(
        k <= num_experts,
        "top_k",
        f"{k} experts of {num_experts} cannot be chosen; lower it or raise model.moe.num_experts",
    )


def require_shares(options: Mapping[str, Any]) -> None:
    """UserError for weights over their sum where they may be negative."""
    require_option(
        not options["renormalise"] or options["normalise"] != "identity",
        "renormalise",
        "weights of normalise='identity' may be negative, and have no shares; leave it False",
    )


def check_router(
    name: str, options: Mapping[str, Any], num_experts: int, causal_model: bool
) -> None:
    """UserError, by the name of the field, unless a model can have this router.

    Args:
      name: of the router.
      options: those that are set; the others have their defaults.
      num_experts: how many experts a token chooses from.
      causal_model: whether its tokens are generated one after the other.
    """
    router = ROUTERS.get(name, field=f"{FIELD}.name")
    defaults = router.defaults()
    check_options(f"router {name!r}", defaults, options, f"{FIELD}.options")
    full = {**defaults, **options}
    router.check(num_experts, full)
    rule = full.get("causal_rule", "")
    if rule:
        require_choice(full, "causal_rule", router.causal_rules)
    if not causal_model or router.causal or rule:
        return
    reason = f"router {name!r} compares a token with those that come after it"
    if not router.causal_rules:
        raise UserError(f"{FIELD}.name: {reason}, which no decoder can; choose another router")
    raise UserError(
        f"{FIELD}.options.causal_rule: {reason}; say how a decoder chooses without them: "
        f"{', '.join(router.causal_rules)}"
    )


def check_score(name: str, options: Mapping[str, Any]) -> None:
    """UserError, by the name of the field, unless there is such a score with such options."""
    score = SCORES.get(name, field="model.moe.score.name")
    _check_plain(f"score {name!r}", score, options, "model.moe.score.options")


def check_router_loss(name: str, options: Mapping[str, Any], field: str) -> None:
    """UserError unless there is such a loss with such options; ``field`` is the loss's own."""
    loss = ROUTER_LOSSES.get(name, field=f"{field}.name")
    _check_plain(f"router loss {name!r}", loss, options, f"{field}.options")


def _check_plain(kind: str, entry: Any, options: Mapping[str, Any], field: str) -> None:
    """Options of an entry that says the values of those that are names (``choices``)."""
    check_options(kind, entry.defaults(), options, field)
    for name, allowed in entry.choices.items():
        if name in options:
            require_one_of(options[name], allowed, f"{field}.{name}")
