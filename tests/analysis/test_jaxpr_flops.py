"""The jaxpr walker against hand counts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.analysis.jaxpr_flops import UncountableError, count_flops
from pallas_kernels.costs import COSTS, Cost


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nominal(function, *args):
    cost = count_flops(function, *args)
    assert cost.visited == cost.nominal
    return cost.nominal


X, W = spec(6, 4), spec(4, 5)
MATMUL = 2 * 6 * 4 * 5


def test_dot_and_batched_einsum():
    assert nominal(jnp.dot, X, W) == MATMUL
    attend = lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k)
    assert nominal(attend, spec(2, 3, 4, 8), spec(2, 7, 4, 8)) == 2 * 2 * 4 * 3 * 7 * 8


def test_elementwise_gather_and_scatter_count_nothing():
    def step(x, i):
        return jnp.zeros((9, 4)).at[i].add(jnp.sin(x)[i % 6])

    assert nominal(step, X, spec(3, dtype=jnp.int32)) == 0


def test_scan_counts_its_body_once_for_each_step():
    square = spec(4, 4)
    scan = lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]
    assert nominal(scan, X, square) == 7 * 2 * 6 * 4 * 4
    nested = lambda x, w: lax.fori_loop(0, 3, lambda _, c: scan(c, w), x)
    assert nominal(nested, X, square) == 3 * 7 * 2 * 6 * 4 * 4


def test_backward_is_twice_forward_and_remat_adds_one():
    def loss(x, w):
        # Twice, so that the rematerialised forward is needed by the backward.
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    square = spec(4, 4)
    forward = nominal(loss, spec(6, 4), square)
    assert forward == 2 * 2 * 6 * 4 * 4
    both = jax.grad(loss, argnums=(0, 1))
    assert nominal(both, spec(6, 4), square) == 3 * forward
    # The last matmul's output is needed too: it goes through a sine.
    remat = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
    assert nominal(remat, spec(6, 4), square) == 4 * forward


def test_jit_and_custom_vjp():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    assert nominal(jax.jit(f), X, W) == MATMUL
    assert nominal(jax.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)), X, W) == 3 * MATMUL


def test_cond_and_platform_dependent_take_the_dearest_branch():
    def choose(p, x, w):
        return lax.cond(p, lambda: (x @ w) @ w.T @ w, lambda: x @ w)

    assert nominal(choose, spec(dtype=jnp.bool_), X, W) == 3 * MATMUL

    def by_platform(x, w):
        return lax.platform_dependent(
            x, w, cpu=lambda x, w: x @ w, default=lambda x, w: (x @ w) @ w.T @ w
        )

    assert nominal(by_platform, X, W) == 3 * MATMUL


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def split(x, w):
        specs = dict(in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
        return jax.shard_map(jnp.dot, **specs)(x, w)

    def repeated(x, w):
        return jax.shard_map(jnp.dot, in_specs=(P("a"), P()), out_specs=P("a"))(x, w)

    with jax.set_mesh(mesh):
        assert nominal(split, spec(16, 4), W) == 2 * 16 * 4 * 5
        # Rows that are whole along "b" are multiplied on each of its four devices.
        assert nominal(repeated, spec(16, 4), W) == 4 * 2 * 16 * 4 * 5


def test_ragged_dot_and_both_its_gradients():
    sizes = spec(3, dtype=jnp.int32)
    w_edf = spec(3, 4, 5)
    assert nominal(lax.ragged_dot, X, w_edf, sizes) == MATMUL
    loss = lambda x, w, s: lax.ragged_dot(x, w, s).sum()
    assert nominal(jax.grad(loss, argnums=(0, 1)), X, w_edf, sizes) == 3 * MATMUL


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    got = nominal(conv, spec(2, 8, 8, 4), spec(3, 3, 4 // groups, 6))
    assert got == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4 // groups)


def test_transposed_convolution_leaves_out_the_zeros():
    def conv(x, w):
        return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    cost = count_flops(conv, spec(1, 4, 4, 3), spec(2, 2, 3, 5))
    assert cost.nominal == 2 * (4 * 4 * 3) * (2 * 2 * 5)
    assert cost.visited == 4 * cost.nominal


def test_named_jit_is_looked_up_and_its_loop_not_entered(monkeypatch):
    monkeypatch.setitem(COSTS, "moejax_probe", Cost(6.0, 7.0))

    def moejax_probe(x, w):
        return lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w, x)

    cost = count_flops(lambda x, w: jax.jit(moejax_probe)(x, w) @ w, X, spec(4, 4))
    assert cost == Cost(6.0 + 2 * 6 * 4 * 4, 7.0 + 2 * 6 * 4 * 4)


def test_uncountable_loops_and_kernels_name_their_source():
    def search(x, w):
        return lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w, x)

    with pytest.raises(UncountableError, match=r"test_jaxpr_flops.py:\d+ \(.*search\)"):
        count_flops(search, X, spec(4, 4))

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    call = pl.pallas_call(kernel, out_shape=spec(8, 8), grid=(3,), interpret=True)
    with pytest.raises(UncountableError, match="a kernel holds a contraction"):
        count_flops(call, spec(8, 8))


def test_while_loop_without_contraction_is_free():
    count = lambda x: lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x)
    assert nominal(count, X) == 0


def test_grouped_matmul_costs_what_a_dense_one_does():
    from pallas_kernels import grouped_matmul

    rows, d, f = 64, 8, 16
    args = (spec(rows, d), spec(4, d, f), spec(4, dtype=jnp.int32))
    cost = count_flops(grouped_matmul, *args)
    assert cost.nominal == 2 * rows * d * f
    # At most one more tile for each group, and the padding of the last.
    assert cost.nominal < cost.visited <= 2 * (rows + 4 * 16) * d * f
    grads = jax.grad(lambda x, w, s: grouped_matmul(x, w, s).sum(), argnums=(0, 1))
    assert count_flops(grads, *args).nominal == 3 * cost.nominal
