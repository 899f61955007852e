"""The public grouped matmul, with its gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import check_backend
from pallas_kernels.grouped_matmul import programs, reference
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
    interpret: Any = False,
) -> Float[Array, "t f"]:
    """``out[r] = x[r] @ w[g(r) - group_offset]`` for rows sorted by group.

    Args:
      x_td: rows; the first ``group_sizes[0]`` belong to group 0, and so on.
      w_edf: weights of groups ``group_offset ... group_offset + e - 1``, [e, d, f]
        ([e, f, d] with ``transpose_rhs``).
      group_sizes: rows of every group; their sum is at most t.
      out_dtype: of the result, by default that of ``x_td``; sums are in float32 or wider.
      backend: ``reference`` (every group for every row), ``xla`` (row tiles on CPU,
        ``lax.ragged_dot`` on TPU and GPU), ``tpu`` and ``gpu`` (Pallas) or ``auto`` (``tpu`` in
        programs for TPUs, ``xla`` elsewhere).
      interpret: runs the Pallas kernel anywhere, slowly, as in ``pl.pallas_call``.

    Returns:
      [t, f]; rows of groups without a local weight, and rows past the last group, are zero. Their
      contents in ``x_td`` do not matter, nor do their cotangents.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu`` or ``gpu``, for shapes and types that it does not know.
    """
    check_backend("grouped_matmul", backend)
    dtype_name = jnp.dtype(out_dtype or x_td.dtype).name
    options = _Options(group_offset, transpose_rhs, dtype_name, backend, interpret)
    return _grouped_matmul(options, *cast_to_common_varying(x_td, w_edf, group_sizes))


class _Options(NamedTuple):
    group_offset: int
    transpose_rhs: bool
    out_dtype: str
    backend: str
    interpret: Any


def _forward(options: _Options, x_td, w_edf, group_sizes):
    fields = options._asdict()
    if options.backend == "reference":
        del fields["backend"], fields["interpret"]
        return reference.grouped_matmul(x_td, w_edf, group_sizes, **fields)
    return programs.grouped_matmul(x_td, w_edf, group_sizes, **fields)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(options, x_td, w_edf, group_sizes):
    return _forward(options, x_td, w_edf, group_sizes)


def _grouped_matmul_fwd(options, x_td, w_edf, group_sizes):
    return _forward(options, x_td, w_edf, group_sizes), (x_td, w_edf, group_sizes)


def _grouped_matmul_bwd(options: _Options, residuals, dout_tf):
    x_td, w_edf, group_sizes = residuals
    dx_options = options._replace(
        transpose_rhs=not options.transpose_rhs, out_dtype=x_td.dtype.name
    )
    dx_td = _forward(dx_options, dout_tf, w_edf, group_sizes)
    if options.backend == "reference":
        run = reference.grouped_matmul_t
    else:
        run = functools.partial(
            programs.grouped_matmul_t, backend=options.backend, interpret=options.interpret
        )
    left, right = (dout_tf, x_td) if options.transpose_rhs else (x_td, dout_tf)
    dw_edf = run(
        left,
        right,
        group_sizes,
        group_offset=options.group_offset,
        num_local=w_edf.shape[0],
        out_dtype=w_edf.dtype.name,
    )
    return dx_td, dw_edf, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
