"""Gathers alone, in memory of the size of the rows whatever the number of choices.

``token`` and ``row`` are each other's inverse: sorted row r holds token ``token[r]``, and is the
choice j of that token for which ``row[token[r], j] == r``. So what a scatter would add up can be
gathered instead, in both directions.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.varying import cast_to_common_varying

# Choices summed one after the other in straight code; with more, most are taken to be empty.
_MAX_UNROLLED = 16


def gather_rows(x_td, token, scale=None):
    """``scale[r] * x[token[r]]``, zero where the token is not in [0, t)."""
    if scale is None:
        return x_td.at[token].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    inside = (token >= 0) & (token < x_td.shape[0])
    rows = x_td.at[token].get(mode="clip").astype(sum_dtype(x_td, scale)) * scale[:, None]
    return jnp.where(inside[:, None], rows, 0).astype(x_td.dtype)


def sum_rows(y_rd, row, gates=None):
    """``sum_j gates[t, j] * y[row[t, j]]`` over the choices whose row is less than rows."""
    (t, k), (rows, d) = row.shape, y_rd.shape
    dtype = sum_dtype(y_rd, gates)

    def choice(row_t, gate_t):
        out = y_rd.at[row_t].get(mode="clip").astype(dtype)
        if gate_t is not None:
            out = out * gate_t[:, None]
        return jnp.where((row_t < rows)[:, None], out, 0)

    if k <= _MAX_UNROLLED:
        columns = (choice(row[:, j], None if gates is None else gates[:, j]) for j in range(k))
        return functools.reduce(jnp.add, columns).astype(y_rd.dtype)

    # Each token's choices to the front: the loop ends with those of the token that has the most.
    order = jnp.argsort(row, axis=1, stable=True)
    row = jnp.take_along_axis(row, order, axis=1)
    gates = None if gates is None else jnp.take_along_axis(gates, order, axis=1)
    most = (row < rows).sum(axis=1).max()

    def add(j, total):
        gate_t = None if gates is None else lax.dynamic_index_in_dim(gates, j, 1, keepdims=False)
        return total + choice(lax.dynamic_index_in_dim(row, j, 1, keepdims=False), gate_t)

    # Inside shard_map the loop's carry must vary over the mesh as its body's result does.
    zeros, *_ = cast_to_common_varying(jnp.zeros((t, d), dtype), y_rd, row)
    return lax.fori_loop(0, most, add, zeros).astype(y_rd.dtype)


def is_rows_choice(token, row):
    """[rows, k] bool, true at the choice that the row is; nowhere for an unused row."""
    index = jnp.arange(token.shape[0], dtype=row.dtype)
    return row.at[token].get(mode="clip") == index[:, None]


def choices_to_rows(values_tk, token, row):
    """[rows], the value of the choice that each row is; zero for unused rows."""
    values = values_tk.at[token].get(mode="clip")
    return jnp.where(is_rows_choice(token, row), values, 0).sum(axis=1)


def rows_to_choices(values_r, row):
    """[t, k], the value of the row of each choice; zero where there is none."""
    return values_r.at[row].get(mode="fill", fill_value=0, wrap_negative_indices=False)
