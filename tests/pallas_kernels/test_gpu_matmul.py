"""The Pallas grouped matmuls for NVIDIA GPUs: interpreted where this jax can, and on hardware."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from moejax.ops.untied import swiglu
from pallas_kernels import grouped_matmul, grouped_mlp, sort_by_group
from pallas_kernels.grouped_matmul import gpu, reference

# Whole tiles: the interpreter has no copies that end at the last row, as the hardware's do.
ROWS, INNER, OUTER, GROUPS = 192, 128, 192, 3
SIZES = ([100, 0, 56], [0, 192, 0], [0, 0, 0])
SMALL = gpu.Blocks(64, 64, 64, 2, 1)
# The interpreter of jax 0.10 has no transposed tiles.
TRANSPOSES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def operands(first=0):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, INNER), jnp.bfloat16)
    w = jax.random.normal(keys[1], (GROUPS, INNER, OUTER), jnp.bfloat16)[first:]
    return x, w, jax.random.normal(keys[2], (ROWS, OUTER), jnp.bfloat16)


def poisoned(x, sizes):
    return jnp.where(jnp.arange(ROWS)[:, None] < sum(sizes), x, jnp.nan)


def close(a, b):
    """To one unit of bfloat16 of the largest, with sums in float32."""
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_interpreted_product(transpose_rhs, first):
    """Tiles that two groups share, empty groups, and rows past the last that hold NaN."""
    if transpose_rhs and not TRANSPOSES:
        pytest.skip("this jax does not interpret transposed tiles")
    x, w, _ = operands(first)
    options = {"group_offset": first, "transpose_rhs": transpose_rhs, "out_dtype": jnp.bfloat16}
    for sizes in SIZES:
        groups = jnp.array(sizes, jnp.int32)
        weight = jnp.swapaxes(w, 1, 2) if transpose_rhs else w
        out = gpu.grouped_matmul(
            poisoned(x, sizes),
            weight,
            groups,
            blocks=SMALL,
            interpret=InterpretGPUParams(),
            **options,
        )
        wide = (a.astype(jnp.float32) for a in (x, weight))
        plain = reference.grouped_matmul(*wide, groups, first, transpose_rhs, jnp.float32)
        close(out, plain)
        outside = np.ones(ROWS, bool)
        outside[sum(sizes[:first]) : sum(sizes)] = False
        assert np.all(np.float32(out)[outside] == 0)


@pytest.mark.skipif(not TRANSPOSES, reason="this jax does not interpret transposed tiles")
def test_interpreted_sums_over_groups():
    x, _, dy = operands()
    for sizes in SIZES:
        groups = jnp.array(sizes, jnp.int32)
        out = gpu.grouped_matmul_t(
            poisoned(x, sizes),
            poisoned(dy, sizes),
            groups,
            group_offset=0,
            num_local=GROUPS,
            out_dtype=jnp.float32,
            blocks=SMALL,
            interpret=InterpretGPUParams(),
        )
        wide = (a.astype(jnp.float32) for a in (x, dy))
        plain = reference.grouped_matmul_t(*wide, groups, 0, GROUPS, jnp.float32)
        np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-4)
        assert np.all(np.asarray(out)[np.array(sizes) == 0] == 0)


def test_what_it_does_not_know_is_named():
    x, w, _ = operands()
    sizes = jnp.array(SIZES[0], jnp.int32)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, not float32 by bfloat16"):
        grouped_matmul(x.astype(jnp.float32), w, sizes, backend="gpu")
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        grouped_matmul(x[:, :100], w[:, :100, :90], sizes, backend="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 64])
def test_on_hardware_value_and_gradients(groups):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2000, 512), jnp.bfloat16)
    w = jax.random.normal(keys[1], (groups, 512, 384), jnp.bfloat16) / 512**0.5
    dy = jax.random.normal(keys[2], (2000, 384), jnp.bfloat16)
    share = np.random.default_rng(0).dirichlet(np.full(groups, 0.3))
    ends = np.round(np.cumsum(share) * 1900).astype(int)
    sizes = jnp.asarray(np.diff(ends, prepend=0), jnp.int32)

    def results(backend):
        out, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        return out, pullback(dy)

    jax.tree.map(close, jax.jit(lambda: results("gpu"))(), jax.jit(lambda: results("xla"))())


@pytest.mark.gpu
def test_on_hardware_the_mlp():
    t, d, f, e, k = 512, 256, 128, 8, 2
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    x, dy = normal(keys[0], t, d), normal(keys[1], t, d)
    wi, wo = normal(keys[2], e, d, 2 * f) / d**0.5, normal(keys[3], e, f, d) / f**0.5
    gates = jax.random.uniform(keys[4], (t, k))
    ids = jax.random.randint(keys[5], (t * k,), 0, e)
    by_group = sort_by_group(ids, e)

    def results(backend):
        run = lambda x, wi, wo, gates: grouped_mlp(
            x,
            wi,
            wo,
            by_group.order // k,
            by_group.inverse.reshape(t, k),
            by_group.sizes,
            gates,
            activation=swiglu,
            backend=backend,
        )
        out, pullback = jax.vjp(run, x, wi, wo, gates)
        return out, pullback(dy)

    jax.tree.map(close, jax.jit(lambda: results("gpu"))(), jax.jit(lambda: results("xla"))())
