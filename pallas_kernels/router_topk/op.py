"""The public router top-k, with its gradient in closed form."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends import ROW_BACKENDS, check_backend
from pallas_kernels.router_topk import reference, tpu
from pallas_kernels.varying import cast_to_common_varying

SCORES = ("softmax", "sigmoid", "none")


class RouterTopK(NamedTuple):
    """What a router chose.

    Attributes:
      gates: scores of the chosen experts, renormalised or not.
      ids: the experts, by falling score (plus bias); of equal ones the lowest comes first.
      lse: logarithm of the sum of exponentials of the logits: what a z loss squares.
      score_sum: of each expert over the valid tokens.
      load: valid tokens that chose each expert.
    """

    gates: Float[Array, "t k"]
    ids: Int[Array, "t k"]
    lse: Float[Array, " t"]
    score_sum: Float[Array, " e"]
    load: Int[Array, " e"]


def router_topk(
    logits_te: Float[Array, "t e"],
    k: int,
    bias_e: Float[Array, " e"] | None = None,
    valid_t: Bool[Array, " t"] | None = None,
    *,
    scores: str = "softmax",
    renormalise: bool = False,
    epsilon: float = 0.0,
    backend: str = "auto",
    interpret: Any = False,
) -> RouterTopK:
    """The top k experts of each token, as ``lax.top_k`` of its scores chooses them.

    Args:
      logits_te: of the router; all that follows is in float32.
      k: experts of a token.
      bias_e: added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437); it has no
        gradient.
      valid_t: tokens that count in ``score_sum`` and ``load``, by default all.
      scores: "softmax", "sigmoid" or "none", the logits themselves.
      renormalise: divide the gates by their sum (plus ``epsilon``).
      epsilon: see there.
      backend: ``reference`` and ``xla`` (``lax.top_k``; autodiff, and the gradient in closed form),
        ``tpu`` (Pallas; until hardware shows it faster only where it is asked for), ``auto``
        (``xla``).
      interpret: runs the Pallas kernel anywhere, slowly, as in ``pl.pallas_call``.

    Raises:
      ValueError: unknown backend or scores, or more experts chosen than there are.
      NotImplementedError: ``tpu``, for 128 or more experts of a token.
    """
    check_backend("router_topk", backend, ROW_BACKENDS)
    if scores not in SCORES:
        raise ValueError(f"router_topk has no scores {scores!r}: softmax, sigmoid or none")
    if not 0 < k <= logits_te.shape[1]:
        raise ValueError(f"router_topk: k is {k}, of {logits_te.shape[1]} experts")
    if valid_t is None:
        valid_t = jnp.ones(logits_te.shape[0], bool)
    options = _Options(k, scores, renormalise, epsilon)
    if backend == "reference":
        found = reference.router_topk(logits_te, bias_e, valid_t, **options._asdict())
        return RouterTopK(*found)
    bias_e = jnp.zeros(logits_te.shape[1]) if bias_e is None else bias_e
    operands = cast_to_common_varying(logits_te, bias_e, valid_t)
    found: Any = _router_topk(options, backend, interpret, *operands)
    return RouterTopK(*found)


class _Options(NamedTuple):
    k: int
    scores: str
    renormalise: bool
    epsilon: float


def _forward(options: _Options, backend, interpret, logits_te, bias_e, valid_t):
    if backend != "tpu":
        return reference.router_topk(logits_te, bias_e, valid_t, **options._asdict())
    return tpu.router_topk(logits_te, bias_e, valid_t, interpret=interpret, **options._asdict())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _router_topk(options, backend, interpret, logits_te, bias_e, valid_t):
    return _forward(options, backend, interpret, logits_te, bias_e, valid_t)


def _router_topk_fwd(options, backend, interpret, logits_te, bias_e, valid_t):
    found = _forward(options, backend, interpret, logits_te, bias_e, valid_t)
    return found, (logits_te, bias_e, valid_t, found[1])


def _router_topk_bwd(options: _Options, backend, interpret, residuals, cotangents):
    """Jacobians of softmax and sigmoid, met only where a score was chosen or is summed."""
    del backend, interpret
    logits_te, bias_e, valid_t, ids_tk = residuals
    dgates_tk, _, dlse_t, dsum_e, _ = cotangents
    s_te = reference.score(logits_te, options.scores)
    chosen_tk = jnp.take_along_axis(s_te, ids_tk, axis=-1)
    if options.renormalise:
        total_t1 = chosen_tk.sum(axis=-1, keepdims=True) + options.epsilon
        inner_t1 = (dgates_tk * chosen_tk).sum(axis=-1, keepdims=True) / total_t1
        dgates_tk = (dgates_tk - inner_t1) / total_t1
    ds_te = jnp.where(valid_t[:, None], dsum_e[None], 0)
    experts = jnp.arange(s_te.shape[1], dtype=ids_tk.dtype)
    # A column at a time: no scatter, and no [t, k, e].
    for j in range(options.k):
        ds_te += jnp.where(ids_tk[:, j : j + 1] == experts[None], dgates_tk[:, j : j + 1], 0)
    probabilities_te = (
        s_te if options.scores == "softmax" else reference.score(logits_te, "softmax")
    )
    if options.scores == "softmax":
        ds_te = s_te * (ds_te - (s_te * ds_te).sum(axis=-1, keepdims=True))
    elif options.scores == "sigmoid":
        ds_te = s_te * (1 - s_te) * ds_te
    dlogits_te = ds_te + dlse_t[:, None] * probabilities_te
    return dlogits_te.astype(logits_te.dtype), jnp.zeros_like(bias_e), None


_router_topk.defvjp(_router_topk_fwd, _router_topk_bwd)
