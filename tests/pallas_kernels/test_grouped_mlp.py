"""The grouped MLP: tile loop and ragged_dot against the plain definition, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.untied import swiglu
from pallas_kernels import grouped_mlp, sort_by_group
from pallas_kernels.costs import COSTS
from pallas_kernels.grouped_mlp import loop, ragged
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import choices_to_rows

T, D, F, GROUPS, K = 90, 6, 5, 3, 2


def layout(kind):
    ids = {
        "uniform": jax.random.randint(jax.random.key(0), (T, K), 0, GROUPS),
        "none": jax.random.randint(jax.random.key(1), (T, K), 0, GROUPS + 2),
        "one": jnp.ones((T, K), jnp.int32),
        # 62, 60 and 58 rows: no multiples of a tile, and no token in two groups.
        "apart": jnp.asarray(np.repeat(np.arange(GROUPS), [31, 30, 29])[:, None].repeat(K, 1)),
    }[kind]
    by_group = sort_by_group(ids.reshape(-1), GROUPS)
    row = jnp.where(ids < GROUPS, by_group.inverse.reshape(T, K), T * K)
    return by_group.order // K, row, by_group.sizes


def operands(first=0, count=GROUPS, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(2), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
    wi, wo = normal(keys[1], GROUPS, D, 2 * F), normal(keys[2], GROUPS, F, D)
    local = slice(first, first + count)
    return normal(keys[0], T, D), wi[local], wo[local], normal(keys[3], T, K), normal(keys[4], T, D)


def results(backend, gated=True, first=0, **options):
    x, wi, wo, gates, cotangent = operands(first, **options)

    @jax.jit
    def run(token, row, sizes, x):
        def mlp(x, wi, wo, gates):
            gates = gates if gated else None
            more = {"activation": swiglu, "group_offset": first, "backend": backend}
            return grouped_mlp(x, wi, wo, token, row, sizes, gates, **more)

        out, pullback = jax.vjp(mlp, x, wi, wo, gates)
        return out, pullback(cotangent)

    return lambda kind, x=x: run(*layout(kind), x)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("first, count", [(0, 3), (1, 1), (1, 2)])
def test_xla_agrees_with_the_reference(first, count, gated):
    ours, plain = (results(name, gated, first, count=count) for name in ("xla", "reference"))
    for kind in ("uniform", "none", "one"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours(kind), plain(kind)
        )


@pytest.mark.parametrize("first, count", [(0, 3), (1, 1)])
def test_ragged_dot_path_agrees_with_the_loop(first, count):
    """What TPU and GPU run; here on CPU, where ``auto`` never takes it."""
    x, wi, wo, gates, cotangent = operands(first, count)
    options = {"activation": swiglu, "group_offset": first}

    def program(kernel):
        def run(token, row, sizes):
            scale = choices_to_rows(gates, token, row)
            of = Operands(x, wi, wo, token, row, sizes, scale)
            out, h = kernel.forward(of, keep_hidden=True, **options)
            return out, h, kernel.backward(of, h, cotangent, **options)

        return jax.jit(run)

    programs = program(loop), program(ragged)
    for kind in ("uniform", "none", "one"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
            *(run(*layout(kind)) for run in programs),
        )


def test_tokens_of_nobody_may_hold_nan():
    x = operands()[0]
    token, row, _ = layout("none")
    lonely = np.all(np.asarray(row) == T * K, axis=1)
    assert lonely.any()
    run = results("xla")
    clean = run("none")
    poisoned = run("none", jnp.where(lonely[:, None], jnp.nan, x))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert np.all(clean[0][lonely] == 0) and np.all(clean[1][0][lonely] == 0)


def test_nan_of_one_group_stays_there():
    """Tiles reach into the rows of the next group; what those hold is never summed."""
    x, (_, row, _) = operands()[0], layout("apart")
    middle = np.asarray((row[:, 0] >= 62) & (row[:, 0] < 122))
    run = results("xla")
    _, (clean_dx, *clean) = run("apart")
    _, (dx, *poisoned) = run("apart", jnp.where(middle[:, None], jnp.nan, x))
    np.testing.assert_array_equal(dx[~middle], clean_dx[~middle])
    for got, expected in zip(poisoned[:2], clean[:2], strict=True):
        assert np.isnan(got[1]).all()
        np.testing.assert_array_equal(got[np.array([0, 2])], expected[np.array([0, 2])])


def test_bfloat16_sums_in_float32():
    plain = results("reference")("uniform")
    narrow = results("xla", dtype=jnp.bfloat16)("uniform")
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(plain), strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
        assert error < 0.02


def test_declared_cost():
    from moejax.analysis.jaxpr_flops import count_flops

    x, wi, wo, gates, _ = operands()
    run = lambda x: grouped_mlp(x, wi, wo, *layout("one"), gates, activation=swiglu)
    forward = 2 * T * K * D * 3 * F
    cost = count_flops(run, x)
    assert cost.nominal == forward
    assert forward < cost.visited <= forward * (1 + GROUPS * 7 / (T * K))
    loss = lambda x, wi, wo: grouped_mlp(x, wi, wo, *layout("one"), gates, activation=swiglu).sum()
    assert count_flops(jax.grad(loss, (0, 1, 2)), x, wi, wo).nominal == 3 * forward
    assert any(name.startswith("moejax_grouped_mlp_backward") for name in COSTS)


def test_unknown_backend_is_refused():
    x, wi, wo, gates, _ = operands()
    with pytest.raises(ValueError, match="no backend 'fast'"):
        grouped_mlp(x, wi, wo, *layout("one"), gates, activation=swiglu, backend="fast")
