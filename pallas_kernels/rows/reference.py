"""The plain definition; its gradients are what autodiff makes of it (row scatters among them)."""

import jax.numpy as jnp


def dispatch_rows(x_td, token, row, scale):
    del row
    inside = (token >= 0) & (token < x_td.shape[0])
    out_rd = x_td[jnp.where(inside, token, 0)]
    if scale is not None:
        out_rd = (out_rd * scale[:, None]).astype(x_td.dtype)
    return jnp.where(inside[:, None], out_rd, 0)


def combine_rows(y_rd, token, row, gates):
    del token
    inside = (row >= 0) & (row < y_rd.shape[0])
    out_tkd = jnp.where(inside[:, :, None], y_rd[jnp.where(inside, row, 0)], 0)
    if gates is not None:
        out_tkd = out_tkd * gates[:, :, None]
    return out_tkd.sum(axis=1).astype(y_rd.dtype)
