"""Router top-k on TPU: k rounds of a maximum and the lowest index that has it.

Sorts and top-k do not lower to Mosaic. What belongs to a token is put side by side in one row of
lanes: its gates, then the log-sum-exp.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.router_topk.reference import gates_of, score
from pallas_kernels.versions import out_struct, tpu_params

_LANES = 128
_BLOCK = 512


def router_topk(
    logits_te, bias_e, valid_t, *, k, scores, renormalise, epsilon, interpret: Any = False
):
    """(gates, ids, lse, score_sum, load)."""
    t, e = logits_te.shape
    if k >= _LANES:
        raise NotImplementedError(f"the tpu backend chooses fewer than {_LANES} experts, not {k}")
    block = t if t < _BLOCK else _BLOCK
    row = pl.BlockSpec((block, _LANES), lambda i: (i, 0))
    whole = pl.BlockSpec((1, e), lambda i: (0, 0))
    numbers, ids, score_sum, load = pl.pallas_call(
        functools.partial(
            _kernel, k=k, scores=scores, renormalise=renormalise, epsilon=epsilon, tokens=t
        ),
        (
            out_struct((t, _LANES), jnp.float32, logits_te),
            out_struct((t, _LANES), jnp.int32, logits_te),
            out_struct((1, e), jnp.float32, logits_te),
            out_struct((1, e), jnp.float32, logits_te),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(-(-t // block),),
            in_specs=[
                pl.BlockSpec((block, e), lambda i: (i, 0)),
                whole,
                pl.BlockSpec((block, 1), lambda i: (i, 0)),
            ],
            out_specs=[row, row, whole, whole],
        ),
        compiler_params=tpu_params("arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=t * e * (4 + 5 * k),
            transcendentals=t * e,
            bytes_accessed=t * (e * logits_te.dtype.itemsize + 3 * _LANES * 4) + 3 * e * 4,
        ),
        interpret=interpret,
        name="router_topk",
    )(logits_te, bias_e[None].astype(jnp.float32), valid_t[:, None].astype(jnp.float32))
    return (
        numbers[:, :k],
        ids[:, :k],
        numbers[:, k],
        score_sum[0],
        load[0].astype(jnp.int32),
    )


def _kernel(
    logits_ref,
    bias_ref,
    valid_ref,
    numbers_ref,
    ids_ref,
    score_sum_ref,
    load_ref,
    *,
    k,
    scores,
    renormalise,
    epsilon,
    tokens,
):
    i = pl.program_id(0)
    block, e = logits_ref.shape
    logits = logits_ref[...].astype(jnp.float32)
    s = score(logits, scores)
    bids = s + bias_ref[...]
    expert = lax.broadcasted_iota(jnp.int32, (block, e), 1)
    lane = lax.broadcasted_iota(jnp.int32, (block, _LANES), 1)
    gates = jnp.zeros((block, _LANES), jnp.float32)
    ids = jnp.zeros((block, _LANES), jnp.int32)
    taken = jnp.zeros((block, e), jnp.float32)
    for j in range(k):
        open_bids = jnp.where(taken > 0, -jnp.inf, bids)
        best = (open_bids == open_bids.max(axis=1, keepdims=True)) & (taken == 0)
        chosen = jnp.where(best, expert, e).min(axis=1, keepdims=True)
        here = expert == chosen
        taken = jnp.where(here, 1.0, taken)
        gate = jnp.where(here, s, 0).sum(axis=1, keepdims=True)
        gates = jnp.where(lane == j, gate, gates)
        ids = jnp.where(lane == j, chosen, ids)
    ids_ref[...] = ids
    gates = gates_of(gates, renormalise, epsilon)
    top = logits.max(axis=1, keepdims=True)
    lse = top + jnp.log(jnp.exp(logits - top).sum(axis=1, keepdims=True))
    numbers_ref[...] = jnp.where(lane == k, lse, gates)
    # The last block may reach past the last token, where anything may be.
    row = i * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    counts = (row < tokens) & (valid_ref[...] > 0)

    @pl.when(i == 0)
    def _():
        score_sum_ref[...] = jnp.zeros_like(score_sum_ref)
        load_ref[...] = jnp.zeros_like(load_ref)

    score_sum_ref[...] += jnp.where(counts, s, 0).sum(axis=0, keepdims=True)
    load_ref[...] += jnp.where(counts, taken, 0).sum(axis=0, keepdims=True)
