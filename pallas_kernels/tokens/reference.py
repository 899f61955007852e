"""The plain definition; its gradients are what autodiff makes of it."""

import jax.numpy as jnp


def gather_tokens(x_btd, index_bc):
    return jnp.take_along_axis(x_btd, index_bc[:, :, None], axis=1)


def scatter_tokens(base_btd, update_bcd, index_bc, weight_bc):
    if weight_bc is not None:
        update_bcd = update_bcd * weight_bc[:, :, None]
    rows = jnp.arange(base_btd.shape[0])[:, None]
    return base_btd.at[rows, index_bc].add(update_bcd.astype(base_btd.dtype))
