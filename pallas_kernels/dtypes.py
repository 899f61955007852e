"""Of what type sums are."""

import jax.numpy as jnp


def sum_dtype(*arrays):
    """Of sums over products of ``arrays`` (None among them): float32 or wider."""
    given = (array for array in arrays if array is not None)
    return jnp.promote_types(jnp.result_type(*given), jnp.float32)
