"""The grouped matmul: loop and ragged_dot against the plain definition, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.costs import COSTS
from pallas_kernels.grouped_matmul.loop import loop_matmul, loop_matmul_t
from pallas_kernels.grouped_matmul.ragged import ragged_matmul, ragged_matmul_t
from pallas_kernels.tiles import tile_sizes

ROWS, INNER, OUTER, GROUPS = 150, 12, 20, 3
SIZES = [(50, 60, 40), (0, 150, 0), (5, 0, 100), (0, 0, 0), (1, 1, 1), (149, 0, 1)]


def operands(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, INNER), dtype)
    w = jax.random.normal(keys[1], (GROUPS, INNER, OUTER), dtype)
    cotangent = jax.random.normal(keys[2], (ROWS, OUTER), dtype)
    return x, w, cotangent


def by_loop(x, w, sizes, first=0):
    out, row = np.zeros((len(x), w.shape[2]), np.float64), 0
    for group, size in enumerate(sizes):
        if first <= group < first + len(w):
            out[row : row + size] = np.float64(x[row : row + size]) @ np.float64(w[group - first])
        row += size
    return out


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_is_each_rows_own_product(backend, sizes):
    x, w, _ = operands()
    out = grouped_matmul(x, w, jnp.array(sizes), backend=backend)
    np.testing.assert_allclose(out, by_loop(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("first, count", [(0, 3), (1, 1), (1, 2), (2, 1)])
def test_xla_agrees_with_the_reference(first, count, transpose_rhs):
    x, w, cotangent = operands()
    w = w[first : first + count]
    w = jnp.swapaxes(w, 1, 2) if transpose_rhs else w

    def loss(backend, x, w, sizes):
        out = grouped_matmul(
            x, w, sizes, group_offset=first, transpose_rhs=transpose_rhs, backend=backend
        )
        return (out * cotangent).sum(), out

    both = jax.value_and_grad(loss, (1, 2), has_aux=True)
    for sizes in SIZES:
        results = [both(backend, x, w, jnp.array(sizes)) for backend in ("reference", "xla")]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *results)


@pytest.mark.parametrize("first", [0, 1])
def test_ragged_dot_path_agrees_with_the_loop(first):
    """What TPU and GPU run; here on CPU, where ``auto`` never takes it."""
    x, w, cotangent = operands()
    options = {"group_offset": first, "out_dtype": "float32"}

    def products(run, run_t):
        out = lambda sizes: run(x, w[first:], sizes, transpose_rhs=False, **options)
        out_t = lambda sizes: run_t(x, cotangent, sizes, num_local=GROUPS - first, **options)
        return jax.jit(lambda sizes: (out(sizes), out_t(sizes)))

    loop, ragged = products(loop_matmul, loop_matmul_t), products(ragged_matmul, ragged_matmul_t)
    for sizes in SIZES:
        by_loop, by_ragged_dot = loop(jnp.array(sizes)), ragged(jnp.array(sizes))
        np.testing.assert_allclose(by_ragged_dot[0], by_loop[0], atol=1e-5)
        np.testing.assert_allclose(by_ragged_dot[1], by_loop[1], atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_rows_past_the_groups_are_zero_and_may_hold_nan(backend):
    x, w, cotangent = operands()
    sizes = jnp.array([40, 0, 60])
    poisoned = x.at[100:].set(jnp.nan)

    def loss(x, w):
        out = grouped_matmul(x, w, sizes, backend=backend)
        return (out * cotangent).sum(), out

    (_, out), (dx, dw) = jax.value_and_grad(loss, (0, 1), has_aux=True)(poisoned, w)
    assert np.all(out[100:] == 0)
    assert np.all(dx[100:] == 0)
    assert np.all(dw[1] == 0), "the gradient of an empty group is exactly zero"
    assert np.isfinite(dw).all() and np.isfinite(out).all()


def test_bfloat16_sums_in_float32():
    x, w, _ = operands(jnp.bfloat16)
    out = grouped_matmul(x, w, jnp.array(SIZES[0]), out_dtype=jnp.float32)
    np.testing.assert_allclose(out, by_loop(x, w, SIZES[0]), atol=1e-4)


def test_declared_cost_is_that_of_the_worst_padding():
    x, w, _ = operands()
    jax.eval_shape(lambda: grouped_matmul(x, w, jnp.array(SIZES[0])))
    cost = COSTS[f"moejax_grouped_matmul_{ROWS}x{INNER}x{OUTER}_{GROUPS}of{GROUPS}"]
    assert cost.nominal == 2 * ROWS * INNER * OUTER
    padding = GROUPS * (tile_sizes(ROWS, GROUPS)[-1] - 1)
    assert cost.visited == 2 * (ROWS + padding) * INNER * OUTER


def test_unknown_backend_is_refused():
    x, w, _ = operands()
    with pytest.raises(ValueError, match="no backend 'fast'"):
        grouped_matmul(x, w, jnp.array(SIZES[0]), backend="fast")
