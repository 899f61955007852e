"""The public gather and scatter of tokens, each the other's gradient."""

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import ROW_BACKENDS, check_backend
from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.tiles import zeros
from pallas_kernels.tokens import reference, tpu, xla
from pallas_kernels.varying import cast_to_common_varying


def gather_tokens(
    x_btd: Float[Array, "b t d"],
    index_bc: Int[Array, "b c"],
    *,
    backend: str = "auto",
    interpret: Any = False,
) -> Float[Array, "b c d"]:
    """``out[b, c] = x[b, index[b, c]]``.

    Args:
      x_btd: tokens.
      index_bc: which of them, in [0, t); none twice in a sequence.
      backend: ``reference`` (autodiff), ``xla``, ``tpu`` (Pallas; until hardware shows it faster
        only where it is asked for) or ``auto`` (``xla``).
      interpret: runs the Pallas kernel anywhere, slowly, as in ``pl.pallas_call``.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu``, for rows that it cannot copy.
    """
    check_backend("gather_tokens", backend, ROW_BACKENDS)
    if backend == "reference":
        return reference.gather_tokens(x_btd, index_bc)
    operands = cast_to_common_varying(x_btd, index_bc)
    return _gather(_Options(backend, interpret), x_btd.shape[1], *operands)


def scatter_tokens(
    base_btd: Float[Array, "b t d"],
    update_bcd: Float[Array, "b c d"],
    index_bc: Int[Array, "b c"],
    weight_bc: Float[Array, "b c"] | None = None,
    *,
    backend: str = "auto",
    interpret: Any = False,
) -> Float[Array, "b t d"]:
    """``base`` with ``weight[b, c] * update[b, c]`` added to token ``index[b, c]``.

    The other tokens are those of ``base``, bit for bit.

    Args:
      base_btd: tokens.
      update_bcd: what is added.
      index_bc: as in :func:`gather_tokens`.
      weight_bc: by default 1.
      backend: as in :func:`gather_tokens`.
      interpret: as in :func:`gather_tokens`.

    Raises:
      ValueError: unknown backend.
      NotImplementedError: ``tpu``, for rows that it cannot copy.
    """
    check_backend("scatter_tokens", backend, ROW_BACKENDS)
    if backend == "reference":
        return reference.scatter_tokens(base_btd, update_bcd, index_bc, weight_bc)
    given = (base_btd, update_bcd, index_bc)
    if weight_bc is None:
        operands = (*cast_to_common_varying(*given), None)
    else:
        operands = cast_to_common_varying(*given, weight_bc)
    return _scatter(_Options(backend, interpret), *operands)


class _Options(NamedTuple):
    backend: str
    interpret: Any

    def gather(self, x_btd, index_bc):
        if self.backend != "tpu":
            return xla.gather_tokens(x_btd, index_bc)
        return tpu.gather_tokens(x_btd, index_bc, interpret=self.interpret)

    def scatter(self, base_btd, update_bcd, index_bc, weight_bc):
        if self.backend != "tpu":
            return xla.scatter_tokens(base_btd, update_bcd, index_bc, weight_bc)
        return tpu.scatter_tokens(
            base_btd, update_bcd, index_bc, weight_bc, interpret=self.interpret
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(options: _Options, t: int, x_btd, index_bc):
    return options.gather(x_btd, index_bc)


def _gather_fwd(options: _Options, t: int, x_btd, index_bc):
    return options.gather(x_btd, index_bc), index_bc


def _gather_bwd(options: _Options, t: int, index_bc, dout_bcd):
    b, _, d = dout_bcd.shape
    zeros_btd = zeros((b, t, d), dout_bcd.dtype, like=dout_bcd)
    return options.scatter(zeros_btd, dout_bcd, index_bc, None), None


_gather.defvjp(_gather_fwd, _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scatter(options: _Options, base_btd, update_bcd, index_bc, weight_bc):
    return options.scatter(base_btd, update_bcd, index_bc, weight_bc)


def _scatter_fwd(options: _Options, base_btd, update_bcd, index_bc, weight_bc):
    # Without weights the gradient does not depend on the update: none is kept.
    kept = update_bcd if weight_bc is not None else update_bcd[:0]
    out = options.scatter(base_btd, update_bcd, index_bc, weight_bc)
    return out, (kept, index_bc, weight_bc)


def _scatter_bwd(options: _Options, residuals, dout_btd):
    update_bcd, index_bc, weight_bc = residuals
    taken_bcd = options.gather(dout_btd, index_bc)
    if weight_bc is None:
        return dout_btd, taken_bcd.astype(update_bcd.dtype), None, None
    wide = taken_bcd.astype(sum_dtype(taken_bcd, weight_bc))
    dupdate_bcd = (wide * weight_bc[:, :, None]).astype(update_bcd.dtype)
    dweight_bc = (wide * update_bcd).sum(axis=-1).astype(weight_bc.dtype)
    return dout_btd, dupdate_bcd, None, dweight_bc


_scatter.defvjp(_scatter_fwd, _scatter_bwd)
