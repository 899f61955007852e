"""Dispatch and combine of rows: against the reference, gathers alone, nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import combine_rows, dispatch_rows, sort_by_group

T, D, EXPERTS = 30, 5, 4


def walk(jaxpr):
    """Every equation, inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for entry in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(entry, "jaxpr", entry)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)


def layout(k, seed=0):
    """Rows sorted by expert, the last 7 of them unused; a third of the choices are none."""
    ids = jax.random.randint(jax.random.key(seed), (T, k), 0, EXPERTS + 2)
    by_expert = sort_by_group(ids.reshape(-1), EXPERTS)
    used = int(by_expert.sizes.sum())
    rows = used + 7
    row = jnp.where(ids < EXPERTS, by_expert.inverse.reshape(T, k), rows)
    token = jnp.pad(by_expert.order[:used] // k, (0, 7), constant_values=3)
    return token, row, used


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def results(backend, op, values, token, row, factors, cotangent):
    def run(values, factors):
        return op(values, token, row, factors, backend=backend)

    out, pullback = jax.vjp(run, values, factors)
    return out, pullback(cotangent)


# 20 choices take the loop over those that are there.
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("op", [dispatch_rows, combine_rows])
def test_agrees_with_the_reference(op, with_factors, k):
    token, row, used = layout(k)
    rows = len(token)
    inside = (jnp.arange(rows) < used)[:, None]
    if op is dispatch_rows:
        factors = normal(1, rows) if with_factors else None
        # The reference knows no unused rows: its cotangents there are zero.
        operands = (normal(0, T, D), token, row, factors, jnp.where(inside, normal(2, rows, D), 0))
    else:
        factors = normal(1, T, k) if with_factors else None
        operands = (normal(0, rows, D), token, row, factors, normal(2, T, D))
    ours, reference = (results(backend, op, *operands) for backend in ("xla", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, reference)


@pytest.mark.parametrize("k", [3, 20])
def test_unused_rows_may_hold_nan(k):
    token, row, used = layout(k)
    rows = len(token)
    poison = jnp.where((jnp.arange(rows) < used)[:, None], 1.0, jnp.nan)
    gates = normal(1, T, k)
    clean = normal(0, rows, D)
    out, grads = results("xla", combine_rows, clean * poison, token, row, gates, normal(2, T, D))
    expected = results("xla", combine_rows, clean, token, row, gates, normal(2, T, D))
    jax.tree.map(np.testing.assert_array_equal, (out, grads[1]), (expected[0], expected[1][1]))
    assert np.all(grads[0][used:] == 0)
    scale = normal(3, rows)
    _, (dx, dscale) = results(
        "xla", dispatch_rows, normal(4, T, D), token, row, scale, clean * poison
    )
    assert np.isfinite(dx).all() and np.isfinite(dscale).all()
    assert np.all(dscale[used:] == 0)


def test_a_row_without_a_token_is_zero():
    token, row, _ = layout(2)
    token = token.at[-1].set(T).at[-2].set(-1)
    x = jnp.full((T, D), jnp.nan)
    for scale in (None, jnp.ones(len(token))):
        assert np.all(dispatch_rows(x, token, row, scale)[-2:] == 0)


@pytest.mark.parametrize("k", [3, 20])
def test_gathers_alone_in_the_memory_of_the_rows(k):
    token, row, _ = layout(k)

    def loss(x, gates):
        rows = dispatch_rows(x, token, row)
        return (combine_rows(jnp.sin(rows), token, row, gates) ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(normal(0, T, D), normal(1, T, k))
    most = max(len(token), T) * max(D, k)
    for eqn in walk(jaxpr.jaxpr):
        assert "scatter" not in eqn.primitive.name
        if eqn.primitive.name == "sort":
            assert all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in eqn.invars)
        # Nothing of the size [t, k, d].
        assert all(v.aval.size <= most for v in eqn.outvars)


def test_sort_by_group():
    groups = jnp.array([2, 0, 9, 2, -1, 0, 1])
    order, inverse, sizes = sort_by_group(groups, 3)
    np.testing.assert_array_equal(order, [1, 5, 6, 0, 3, 2, 4])
    np.testing.assert_array_equal(inverse[order], np.arange(7))
    np.testing.assert_array_equal(sizes, [2, 1, 2])


def test_sort_of_more_groups_than_fit_one_number():
    groups = jax.random.randint(jax.random.key(0), (50,), 0, 2**31 - 2)
    order, inverse, _ = jax.eval_shape(lambda g: sort_by_group(g, 2**31 - 2), groups)
    assert order.shape == inverse.shape == (50,)


def test_unknown_backend_is_refused():
    token, row, _ = layout(1)
    with pytest.raises(ValueError, match="no backend 'fast'"):
        dispatch_rows(normal(0, T, D), token, row, backend="fast")
