"""Experts of several layers in one pool (ReXMoE, arXiv 2510.17483)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# The key is that of the layer, which noise and capacity draw from too.
_DRAW = 3


def open_experts(
    step: Int[Array, ""], num_experts: int, layers: int, steps: tuple[int, int]
) -> Int[Array, ""]:
    """How many of a pool's ``layers * num_experts`` a layer may choose from at a step.

    ``floor((1 + (layers - 1) (t - t_s) / (t_e - t_s)) num_experts)`` with ``steps = (t_s, t_e)``;
    the layer's own before, and all after (progressive scaling routing, section 3.3).
    """
    first, last = steps
    done = jnp.clip((step - first) / max(last - first, 1), 0, 1)
    # What rounding, as of 41 * (1 / 41), put a hair below a whole number is that number.
    more = jnp.floor((layers - 1) * num_experts * done + 1e-4)
    return num_experts + more.astype(jnp.int32)


def pool_mask(
    step: Int[Array, ""],
    num_experts: int,
    layers: int,
    own: int,
    steps: tuple[int, int],
    rng: Array | None,
) -> Bool[Array, " e"]:
    """Which experts of the pool a layer may choose at this step: its own, and some drawn anew.

    The paper masks ``layers * num_experts - open_experts`` experts at random in each iteration and
    does not say that a layer's own are never among them; here they never are.

    Args:
      step: of training.
      num_experts: of one layer; expert i of layer l has number ``l * num_experts + i``.
      layers: that share the pool.
      own: number of this layer in the pool.
      steps: first and last of the time over which the pool is opened.
      rng: None opens experts in the order of their numbers.
    """
    e = layers * num_experts
    of_own = jnp.arange(e) // num_experts == own
    if rng is None:
        draw = jnp.arange(e, dtype=jnp.float32)
    else:
        draw = jax.random.uniform(jax.random.fold_in(rng, _DRAW), (e,))
    rank = jnp.argsort(jnp.argsort(jnp.where(of_own, -1.0, draw)))
    return of_own | (rank < open_experts(step, num_experts, layers, steps))
