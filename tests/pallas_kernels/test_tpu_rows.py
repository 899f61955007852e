"""The Pallas kernels of rows, tokens and the router for TPU, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    combine_rows,
    dispatch_rows,
    gather_tokens,
    router_topk,
    scatter_tokens,
    sort_by_group,
)
from pallas_kernels.rows import tpu, xla
from tests.pallas_kernels.ladder import INTERPRETED, races_found

WIDTHS = {jnp.float32: 1024, jnp.bfloat16: 2048}


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("how", INTERPRETED)
def test_rows_are_copied_and_summed(how, dtype, monkeypatch):
    """Several blocks, the last cut off; rows of nobody hold NaN."""
    monkeypatch.setattr(tpu, "_BLOCK", 16)
    x = jax.random.normal(jax.random.key(0), (20, WIDTHS[dtype])).astype(dtype)
    x = x.at[7].set(jnp.nan)
    index = jax.random.randint(jax.random.key(1), (40, 2), -2, 25)
    index = jnp.where(index == 7, -1, index)
    weight = jax.random.normal(jax.random.key(2), (40, 2))
    inside = jnp.where(index < 0, 20, index)
    ours = tpu.sum_rows(x, index, weight, interpret=INTERPRETED[how])
    plain = xla.sum_rows(x.astype(jnp.float32), inside, weight)
    close(np.float32(ours), plain, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6, atol=1e-6)
    copied = tpu.gather_rows(x, index[:, 0], interpret=INTERPRETED[how])
    np.testing.assert_array_equal(copied, xla.gather_rows(x, inside[:, 0]))
    assert how != "eager" or not races_found()


def test_dispatch_and_combine_agree_with_the_reference():
    t, k, groups, d = 12, 2, 3, 1024
    keys = jax.random.split(jax.random.key(0), 4)
    x, gates = jax.random.normal(keys[0], (t, d)), jax.random.normal(keys[1], (t, k))
    ids = jax.random.randint(keys[2], (t, k), 0, groups + 1)
    by_group = sort_by_group(ids.reshape(-1), groups)
    row = jnp.where(ids < groups, by_group.inverse.reshape(t, k), t * k)
    token = by_group.order // k
    scale = jax.random.normal(keys[3], (t * k,))

    def results(backend):
        options = {"backend": backend, "interpret": True}

        def run(x, scale, gates):
            rows = dispatch_rows(x, token, row, scale, **options)
            return combine_rows(jnp.tanh(rows), token, row, gates, **options)

        out, pullback = jax.vjp(run, x, scale, gates)
        return out, pullback(jnp.cos(out))

    close(jax.jit(results, static_argnums=0)("tpu"), results("reference"), rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_tiles_are_refused():
    with pytest.raises(NotImplementedError, match=r"a multiple of 1,024.*float32 \(1,000\)"):
        tpu.gather_rows(jnp.zeros((4, 1000)), jnp.zeros(4, int), interpret=True)
    with pytest.raises(NotImplementedError, match="row indices"):
        tpu.gather_rows(jnp.zeros((4, 1024)), jnp.zeros(200_000, int), interpret=True)


@pytest.mark.parametrize("how", INTERPRETED)
def test_tokens_are_gathered_and_added_back(how, monkeypatch):
    """Tokens that are not taken stay as they are, bit for bit."""
    monkeypatch.setattr(tpu, "_BLOCK", 8)
    b, t, c, d = 2, 30, 9, 1024
    keys = jax.random.split(jax.random.key(0), 4)
    x, update = jax.random.normal(keys[0], (b, t, d)), jax.random.normal(keys[1], (b, c, d))
    weight = jax.random.normal(keys[2], (b, c))
    index = jnp.sort(jax.random.permutation(keys[3], jnp.arange(t))[: b * c].reshape(b, c), axis=1)
    options = {"backend": "tpu", "interpret": INTERPRETED[how]}
    taken = gather_tokens(x, index, **options)
    np.testing.assert_array_equal(taken, gather_tokens(x, index, backend="reference"))
    out = scatter_tokens(x, update, index, weight, **options)
    close(out, scatter_tokens(x, update, index, weight, backend="reference"), rtol=1e-6, atol=1e-6)
    untouched = np.ones((b, t), bool)
    untouched[np.arange(b)[:, None], index] = False
    np.testing.assert_array_equal(np.asarray(out)[untouched], np.asarray(x)[untouched])
    assert how != "eager" or not races_found()


@pytest.mark.parametrize("backend", ["xla", "tpu"])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_tokens(backend, weighted):
    b, t, c, d = 2, 16, 5, 1024
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (b, t, d)), jax.random.normal(keys[1], (b, c))
    index = jnp.array([[0, 3, 4, 9, 15], [1, 2, 3, 4, 5]])

    def results(backend):
        options = {"backend": backend, "interpret": True}

        def run(x, weight):
            update = jnp.tanh(gather_tokens(x, index, **options))
            return scatter_tokens(x, update, index, weight if weighted else None, **options)

        out, pullback = jax.vjp(run, x, weight)
        return out, pullback(jnp.cos(out))

    close(jax.jit(results, static_argnums=0)(backend), results("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("biased", [True, False])
def test_router_chooses_as_top_k_does(scores, biased):
    """Ties, all-equal and masked rows included; two blocks, the last cut off."""
    t, e, k = 600, 20, 4
    logits = jax.random.normal(jax.random.key(0), (t, e)).round(1)
    logits = logits.at[0].set(0.5).at[1].set(-jnp.inf).at[1, 5].set(0.0)
    bias = 0.3 * jax.random.normal(jax.random.key(1), (e,)) if biased else None
    valid = jnp.arange(t) % 3 > 0
    # Minus infinity times a mask of zeros would be no number.
    logits = jnp.where(jnp.isinf(logits) & (scores == "none"), -9.0, logits)
    options = {"k": k, "scores": scores, "renormalise": True, "epsilon": 1e-6}
    ours, plain = (
        router_topk(logits, bias_e=bias, valid_t=valid, backend=name, interpret=True, **options)
        for name in ("tpu", "reference")
    )
    np.testing.assert_array_equal(ours.ids, plain.ids)
    np.testing.assert_array_equal(ours.load, plain.load)
    assert int(ours.load.sum()) == k * int(valid.sum())
    close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_router_gradient_is_that_of_autodiff(backend, scores, renormalise):
    t, e, k = 24, 10, 3
    logits = jax.random.normal(jax.random.key(0), (t, e))
    bias = jax.random.normal(jax.random.key(1), (e,))
    valid = jnp.arange(t) % 4 > 0

    def loss(logits, backend):
        found = router_topk(
            logits,
            k,
            bias,
            valid,
            scores=scores,
            renormalise=renormalise,
            epsilon=1e-3,
            backend=backend,
            interpret=True,
        )
        weights = jnp.arange(1.0, k + 1)[None]
        return (
            (weights * found.gates**2).sum()
            + (jnp.cos(found.lse)).sum()
            + (found.score_sum * jnp.arange(e)).sum()
        )

    gradients = [jax.grad(loss)(logits, name) for name in (backend, "reference")]
    close(*gradients, rtol=1e-4, atol=1e-5)


def test_wrong_options_are_named():
    logits = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match="no scores 'relu'"):
        router_topk(logits, 1, scores="relu")
    with pytest.raises(ValueError, match="k is 4, of 3 experts"):
        router_topk(logits, 4)
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        gather_tokens(jnp.zeros((1, 2, 4)), jnp.zeros((1, 1), int), backend="cuda")
