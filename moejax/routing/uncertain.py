"""Scores that count for less where they are unsure: several passes of the router with dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config.checks import require
from moejax.routing.scores import Params, Shapes, linear, score


def _check(passes: int, dropout: float) -> None:
    field = "model.moe.score.options"
    require(passes >= 1, f"{field}.passes", f"must be at least 1, got {passes}")
    require(0 <= dropout < 1, f"{field}.dropout", f"must be in [0, 1), got {dropout:g}")


def _parameters(
    d: int,
    e: int,
    m: int,
    *,
    init_std: float = 0.02,
    passes: int = 5,
    dropout: float = 0.1,
) -> Shapes:
    _check(passes, dropout)
    return {"router_mde": ((m, d, e), jax.nn.initializers.normal(init_std))}


@score("uncertain", _parameters, draws=True)
def uncertain(
    params: Params,
    x_snd: Float[Array, "s n d"],
    modality_sn: Int[Array, "s n"],
    rng: Array | None,
    *,
    passes: int = 5,
    dropout: float = 0.1,
) -> Float[Array, "s n e"]:
    """``mean_m l_m / (1 + var_m l_m)`` over ``passes`` of ``l_m = drop(x) W`` in training.

    The uncertainty-aware router of MoFME (arXiv 2312.16610), in the plainest form that is one: a
    logit shrinks to 0 where dropout moves it. The authors' code averages whitened, centred weights
    of passes that are all alike (docs/decisions.md); there, as here, evaluation takes
    the plain logits ``x W``. One pass, or no dropout, is the plain router always. ``var`` is over
    the passes, without Bessel's correction.
    """
    if rng is None or passes == 1 or dropout == 0:
        return linear(params, x_snd, modality_sn)

    def one_pass(key):
        kept = jax.random.bernoulli(key, 1 - dropout, x_snd.shape)
        return linear(params, jnp.where(kept, x_snd / (1 - dropout), 0), modality_sn)

    logits_psne = jax.lax.map(one_pass, jax.random.split(rng, passes))
    return logits_psne.mean(axis=0) / (1 + logits_psne.var(axis=0))
