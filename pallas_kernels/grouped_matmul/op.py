"""The public grouped matmul, with its gradients."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.varying import cast_to_common_varying


def grouped_matmul(
    x_td: Float[Array, "t d"],
    w_edf: Float[Array, "e _ _"],
    group_sizes: Int[Array, " groups"],
    *,
    group_offset: int = 0,
    transpose_rhs: bool = False,
    out_dtype=None,
    backend: str = "auto",
) -> Float[Array, "t f"]:
    """``out[r] = x[r] @ w[g(r) - group_offset]`` for rows sorted by group.

    Args:
      x_td: rows; the first ``group_sizes[0]`` belong to group 0, and so on.
      w_edf: weights of groups ``group_offset ... group_offset + e - 1``, [e, d, f]
        ([e, f, d] with ``transpose_rhs``).
      group_sizes: rows of every group; their sum is at most t.
      out_dtype: of the result, by default that of ``x_td``; sums are in float32 or wider.
      backend: ``reference`` (every group for every row), ``xla`` (row tiles on CPU,
        ``lax.ragged_dot`` on TPU and GPU) or ``auto`` (``xla``).

    Returns:
      [t, f]; rows of groups without a local weight, and rows past the last group, are zero. Their
      contents in ``x_td`` do not matter, nor do their cotangents.

    Raises:
      ValueError: unknown backend.
    """
    if backend not in ("auto", "xla", "reference"):
        raise ValueError(f"grouped_matmul has no backend {backend!r}: auto, xla or reference")
    dtype_name = jnp.dtype(out_dtype or x_td.dtype).name
    options = (group_offset, transpose_rhs, dtype_name, backend == "reference")
    return _grouped_matmul(options, *cast_to_common_varying(x_td, w_edf, group_sizes))


def _forward(options, x_td, w_edf, group_sizes):
    group_offset, transpose_rhs, out_dtype, use_reference = options
    run = reference.grouped_matmul if use_reference else xla.grouped_matmul
    return run(
        x_td,
        w_edf,
        group_sizes,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        out_dtype=out_dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(options, x_td, w_edf, group_sizes):
    return _forward(options, x_td, w_edf, group_sizes)


def _grouped_matmul_fwd(options, x_td, w_edf, group_sizes):
    return _forward(options, x_td, w_edf, group_sizes), (x_td, w_edf, group_sizes)


def _grouped_matmul_bwd(options, residuals, dout_tf):
    group_offset, transpose_rhs, _, use_reference = options
    x_td, w_edf, group_sizes = residuals
    dx_options = (group_offset, not transpose_rhs, x_td.dtype.name, use_reference)
    dx_td = _forward(dx_options, dout_tf, w_edf, group_sizes)
    run = reference.grouped_matmul_t if use_reference else xla.grouped_matmul_t
    left, right = (dout_tf, x_td) if transpose_rhs else (x_td, dout_tf)
    dw_edf = run(
        left,
        right,
        group_sizes,
        group_offset=group_offset,
        num_local=w_edf.shape[0],
        out_dtype=w_edf.dtype.name,
    )
    return dx_td, dw_edf, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
