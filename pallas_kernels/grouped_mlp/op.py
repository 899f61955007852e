"""The public grouped MLP, with its gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import check_backend
from pallas_kernels.grouped_mlp import programs, reference
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import choices_to_rows, rows_to_choices
from pallas_kernels.varying import cast_to_common_varying


def grouped_mlp(
    x_td: Float[Array, "t d"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    token: Int[Array, " rows"],
    row: Int[Array, "t k"],
    group_sizes: Int[Array, " groups"],
    gates: Float[Array, "t k"] | None = None,
    *,
    activation: Callable,
    group_offset: int = 0,
    expected_share: float = 1.0,
    backend: str = "auto",
    interpret: Any = False,
) -> Float[Array, "t d"]:
    """``out[t] = sum_k gates[t, k] * activation(x[t] @ wi[g]) @ wo[g]``, g the group of (t, k).

    Rows are gathered, multiplied and summed back in one piece, so that only the products of the
    first matrix are kept for the backward: the outputs of the experts are not, since the gradient
    of a gate is <activation(h), dout @ wo.T> (SonicMoE, arXiv 2512.14080).

    Args:
      x_td: tokens.
      wi_edf: first matrices of groups ``group_offset ... group_offset + e - 1``.
      wo_efd: second matrices.
      token: of each row; rows are sorted by group.
      row: where choice k of token t lies; ``rows`` where it has no such choice.
      group_sizes: rows of every group. Rows past their sum may hold any token.
      gates: by default 1. Of a choice without a row, or of a group without weights here, neither
        the gate nor the token has a gradient, and the choice adds exactly zero.
      activation: elementwise or halving, on the last axis; static.
      group_offset: of the first local group.
      expected_share: of the rows, those that belong to a group on average, for the count of FLOPs.
      backend: ``reference`` (every group for every row), ``xla`` (row tiles on CPU,
        ``lax.ragged_dot`` on TPU and GPU), ``tpu`` and ``gpu`` (Pallas) or ``auto`` (``tpu`` in
        programs for TPUs, ``xla`` elsewhere).
      interpret: runs the Pallas kernels anywhere, slowly, as in ``pl.pallas_call``.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu`` or ``gpu``, for shapes and types that it does not know.
    """
    check_backend("grouped_mlp", backend)
    options = _Options(activation, group_offset, expected_share, backend, interpret)
    operands = (x_td, wi_edf, wo_efd, token, row, group_sizes)
    if backend == "reference":
        options = {"activation": activation, "group_offset": group_offset}
        return reference.grouped_mlp(*operands, gates, **options)
    if gates is None:
        return _grouped_mlp(options, *cast_to_common_varying(*operands), None)
    return _grouped_mlp(options, *cast_to_common_varying(*operands, gates))


class _Options(NamedTuple):
    activation: Callable
    group_offset: int
    expected_share: float
    backend: str
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_mlp(options, x_td, wi_edf, wo_efd, token, row, group_sizes, gates):
    of = _operands(x_td, wi_edf, wo_efd, token, row, group_sizes, gates)
    return programs.forward(of, keep_hidden=False, **options._asdict())[0]


def _grouped_mlp_fwd(options, x_td, wi_edf, wo_efd, token, row, group_sizes, gates):
    of = _operands(x_td, wi_edf, wo_efd, token, row, group_sizes, gates)
    out_td, h_rf = programs.forward(of, keep_hidden=True, **options._asdict())
    return out_td, (of, h_rf, gates)


def _grouped_mlp_bwd(options, residuals, dout_td):
    of, h_rf, gates = residuals
    dx_td, dwi_edf, dwo_efd, dscale = programs.backward(of, h_rf, dout_td, **options._asdict())
    dgates = None if gates is None else rows_to_choices(dscale, of.row).astype(gates.dtype)
    return dx_td, dwi_edf, dwo_efd, None, None, None, dgates


def _operands(x_td, wi_edf, wo_efd, token, row, group_sizes, gates) -> Operands:
    scale = None if gates is None else choices_to_rows(gates, token, row)
    return Operands(x_td, wi_edf, wo_efd, token, row, group_sizes, scale)


_grouped_mlp.defvjp(_grouped_mlp_fwd, _grouped_mlp_bwd)
