"""By XLA, which is told that no token is taken twice."""

import jax.numpy as jnp

from pallas_kernels.dtypes import sum_dtype


def gather_tokens(x_btd, index_bc):
    """``x[b, index[b, c]]``."""
    rows = jnp.arange(x_btd.shape[0])[:, None]
    return x_btd.at[rows, index_bc].get(unique_indices=True, mode="promise_in_bounds")


def scatter_tokens(base_btd, update_bcd, index_bc, weight_bc):
    """``base`` with ``weight * update`` added at ``index``; sums are in float32 or wider."""
    if weight_bc is not None:
        wide = update_bcd.astype(sum_dtype(update_bcd, weight_bc)) * weight_bc[:, :, None]
        update_bcd = wide.astype(base_btd.dtype)
    rows = jnp.arange(base_btd.shape[0])[:, None]
    at = base_btd.at[rows, index_bc]
    return at.add(update_bcd.astype(base_btd.dtype), unique_indices=True, mode="promise_in_bounds")
