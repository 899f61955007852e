"""Transport plans in which every expert has few tokens: sparsity-constrained optimal transport.

Liu, Puigcerver, Blondel 2022, arXiv 2209.15466; one of the routers that arXiv 2401.15969 compares.
"""

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.routing.normalise import share
from moejax.routing.select import best_of_each


def sparse_columns(
    scores: Float[Array, "s n e"],
    mask: Bool[Array, "s n e"],
    count_se: Int[Array, "s e"],
    total_se: Float[Array, "s e"],
) -> Float[Array, "s n e"]:
    """Each column projected on the scaled simplex, with at most ``count`` entries that are not 0.

    Of all columns >= 0 with the sum ``total`` and so few entries, the nearest one: that of the
    largest unmasked scores, of equal ones the earlier (Kyrillidis et al., arXiv 1206.1529,
    algorithm 1). All 0 where ``count`` is 0 or everything is masked. The gradient is that of the
    projection with its entries given.
    """
    lowest = jnp.where(mask, scores, jnp.inf).min(axis=1, keepdims=True)
    # The projection is the same for scores that are moved together.
    lowest = lax.stop_gradient(jnp.where(jnp.isfinite(lowest), lowest, 0))
    moved = jnp.where(mask, scores - lowest, 0)
    total = total_se[:, None]

    def level(kept, values):
        number = kept.sum(axis=1, keepdims=True, dtype=values.dtype)
        return (jnp.where(kept, values, 0).sum(axis=1, keepdims=True) - total) / jnp.maximum(
            number, 1
        )

    def shrink(state):
        kept, _ = state
        fewer = kept & (fixed > level(kept, fixed))
        return fewer, (fewer != kept).any()

    # What lies below the level of those that are left is 0; the level then rises (Michelot 1986).
    fixed = lax.stop_gradient(moved)
    begin = best_of_each(fixed, mask, count_se)
    kept, _ = lax.while_loop(lambda state: state[1], shrink, (begin, begin.any()))
    return jnp.where(kept, moved - level(kept, moved), 0)


def sparse_transport(
    similarity: Float[Array, "s n e"],
    mask: Bool[Array, "s n e"],
    count_se: Int[Array, "s e"],
    *,
    gamma: float = 1.0,
    iterations: int = 20,
    learning_rate: float = 0.01,
) -> Float[Array, "s n e"]:
    """The plan T that maximises ``<T, similarity> - gamma / 2 |T|^2`` with few tokens a column.

    Rows of tokens that may choose are to sum to 1, and the columns to what each expert would get if
    every token gave all experts that it may choose the same, as in
    :func:`moejax.routing.normalise.sinkhorn`. A column has at most ``count`` entries that are not
    0. The semi-dual problem has one price for each token, which Adam improves from 0, as in the
    authors' code: so columns sum to what they should, rows as nearly as the prices have come.

    Args:
      similarity: the larger, the more of a token an expert takes.
      mask: where a token may go.
      count_se: the most tokens of each expert.
      gamma: the larger, the more evenly an expert takes its tokens.
      iterations: steps of Adam.
      learning_rate: of Adam.

    The gradient is that of the last projection; the prices have none.
    """
    total_se = share(mask.astype(similarity.dtype)).sum(axis=1)
    wanted_sn = mask.any(axis=-1).astype(similarity.dtype)
    adam = optax.adam(learning_rate)

    def plan_at(price_sn, similarity):
        return sparse_columns((similarity + price_sn[..., None]) / gamma, mask, count_se, total_se)

    def step(_, state):
        price_sn, moments = state
        # The gradient of the semi-dual: what a token gives away less what it has to give.
        too_much_sn = plan_at(price_sn, lax.stop_gradient(similarity)).sum(axis=-1) - wanted_sn
        change_sn, moments = adam.update(too_much_sn, moments)
        return price_sn + change_sn, moments

    begin = jnp.zeros_like(wanted_sn)
    price_sn, _ = lax.fori_loop(0, iterations, step, (begin, adam.init(begin)))
    return plan_at(lax.stop_gradient(price_sn), similarity)
