"""The public row dispatch and combine, each the other's gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import ROW_BACKENDS, check_backend
from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.rows import reference, tpu, xla
from pallas_kernels.varying import cast_to_common_varying


def dispatch_rows(
    x_td: Float[Array, "t d"],
    token: Int[Array, " rows"],
    row: Int[Array, "t k"],
    scale: Float[Array, " rows"] | None = None,
    *,
    backend: str = "auto",
    interpret: Any = False,
) -> Float[Array, "rows d"]:
    """``out[r] = scale[r] * x[token[r]]``, with a gradient that gathers too.

    Args:
      x_td: tokens.
      token: of each row; a row whose token is not in [0, t) is zero.
      row: where choice k of token t lies; ``rows`` where it has no such choice. Rows that no
        choice points to are unused: whatever their cotangents hold, NaN included, goes nowhere.
      scale: of each row, by default 1.
      backend: ``reference`` (autodiff, with scatters), ``xla``, ``tpu`` (Pallas; until hardware
        shows it faster only where it is asked for) or ``auto`` (``xla``).
      interpret: runs the Pallas kernel anywhere, slowly, as in ``pl.pallas_call``.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu``, for rows that it cannot copy.
    """
    check_backend("dispatch_rows", backend, ROW_BACKENDS)
    operands = _common(x_td, token, row, scale)
    if backend == "reference":
        return reference.dispatch_rows(*operands)
    return _dispatch(_Options(backend, interpret), *operands)


def combine_rows(
    y_rd: Float[Array, "rows d"],
    token: Int[Array, " rows"],
    row: Int[Array, "t k"],
    gates: Float[Array, "t k"] | None = None,
    *,
    backend: str = "auto",
    interpret: Any = False,
) -> Float[Array, "t d"]:
    """``out[t] = sum_k gates[t, k] * y[row[t, k]]``, with a gradient that gathers too.

    Args:
      y_rd: rows; what unused ones hold, NaN included, does not matter. Their gradient is zero.
      token: of each row, as in :func:`dispatch_rows`; only the gradient needs it.
      row: as in :func:`dispatch_rows`; choices without a row add exactly zero.
      gates: by default 1. Sums are in float32 or wider, in the order of the choices.
      backend: as in :func:`dispatch_rows`; the reference takes [t, k, d] of memory.
      interpret: as in :func:`dispatch_rows`.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu``, for rows that it cannot copy.
    """
    check_backend("combine_rows", backend, ROW_BACKENDS)
    operands = _common(y_rd, token, row, gates)
    if backend == "reference":
        return reference.combine_rows(*operands)
    return _combine(_Options(backend, interpret), *operands)


class _Options(NamedTuple):
    backend: str
    interpret: Any

    def gather(self, x_td, token, scale=None):
        if self.backend != "tpu":
            return xla.gather_rows(x_td, token, scale)
        return tpu.gather_rows(x_td, token, scale, interpret=self.interpret)

    def sum(self, y_rd, row, gates=None):
        if self.backend != "tpu":
            return xla.sum_rows(y_rd, row, gates)
        return tpu.sum_rows(y_rd, row, gates, interpret=self.interpret)


def _common(values, token, row, factors):
    if factors is None:
        return *cast_to_common_varying(values, token, row), None
    return cast_to_common_varying(values, token, row, factors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(options: _Options, x_td, token, row, scale):
    return options.gather(x_td, token, scale)


def _dispatch_fwd(options: _Options, x_td, token, row, scale):
    return options.gather(x_td, token, scale), (x_td, token, row, scale)


def _dispatch_bwd(options: _Options, residuals, dout_rd):
    x_td, token, row, scale = residuals
    gates = None if scale is None else xla.rows_to_choices(scale, row)
    dx_td = options.sum(dout_rd, row, gates).astype(x_td.dtype)
    if scale is None:
        return dx_td, None, None, None
    used = xla.is_rows_choice(token, row).any(axis=1)
    dscale = _row_dots(dout_rd, options.gather(x_td, token))
    return dx_td, None, None, jnp.where(used, dscale, 0).astype(scale.dtype)


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(options: _Options, y_rd, token, row, gates):
    return options.sum(y_rd, row, gates)


def _combine_fwd(options: _Options, y_rd, token, row, gates):
    # Without gates the gradient does not depend on the rows: none is kept.
    kept = None if gates is None else y_rd
    return options.sum(y_rd, row, gates), (kept, token, row, gates)


def _combine_bwd(options: _Options, residuals, dout_td):
    y_rd, token, row, gates = residuals
    used = xla.is_rows_choice(token, row).any(axis=1)
    if gates is None:
        nobody = dout_td.shape[0]
        return options.gather(dout_td, jnp.where(used, token, nobody)), None, None, None
    dout_rd = options.gather(dout_td, token)
    scale = xla.choices_to_rows(gates, token, row)
    dy_rd = jnp.where(used[:, None], dout_rd.astype(scale.dtype) * scale[:, None], 0)
    dgates = xla.rows_to_choices(_row_dots(y_rd, dout_rd), row)
    return dy_rd.astype(y_rd.dtype), None, None, dgates.astype(gates.dtype)


_combine.defvjp(_combine_fwd, _combine_bwd)


def _row_dots(a_rd, b_rd):
    """[rows], without a contraction: they are a row's worth of multiplies, not a matmul."""
    return (a_rd.astype(sum_dtype(a_rd, b_rd)) * b_rd).sum(axis=1)
