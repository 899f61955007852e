"""The Pallas grouped matmuls for TPU, interpreted: value and every gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import reference, tpu
from pallas_kernels.grouped_matmul.blocks import Blocks, Product, groups_blocks, rows_blocks
from pallas_kernels.grouped_matmul.tpu_groups import groups_matmul
from pallas_kernels.grouped_matmul.tpu_rows import Epilogue, rows_matmul
from tests.pallas_kernels.ladder import INTERPRETED, races_found

# No size is a multiple of a tile.
ROWS, INNER, OUTER = 75, 40, 72
SMALL = {"rows": 32, "inner": 128, "outer": 128, "step": 16}


def operands(groups, dtype=jnp.float32, inner=INNER, outer=OUTER):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, inner), dtype)
    w = jax.random.normal(keys[1], (groups, inner, outer), dtype)
    return x, w, jax.random.normal(keys[2], (ROWS, outer), dtype)


def identity(dtype):
    return Epilogue(lambda product: (product[None],), (), ((1, dtype),))


def products(x, w, dy, sizes, interpret, blocks, transpose_rhs=False):
    """(x w, x' dy) of the kernels, with tiles that do not divide anything."""
    options = {"blocks": blocks, "interpret": interpret}
    (out,) = rows_matmul(
        x[None], w, sizes, epilogue=identity(x.dtype), transpose_rhs=transpose_rhs, **options
    )
    return out[0], groups_matmul(
        x, dy[None], sizes, num_local=w.shape[0], out_dtype=jnp.float32, **options
    )


def expected(x, w, dy, sizes, transpose_rhs=False):
    out = reference.grouped_matmul(x, w, sizes, 0, transpose_rhs, x.dtype)
    return out, reference.grouped_matmul_t(x, dy, sizes, 0, w.shape[0], jnp.float32)


def test_every_pattern_of_empty_groups():
    """All 2^8 of eight groups; rows past the last hold NaN, empty groups are exactly zero."""
    x, w, dy = operands(8)
    blocks = Blocks(32, INNER, OUTER, 16)
    run = jax.jit(lambda x, dy, sizes: products(x, w, dy, sizes, True, blocks))
    plain = jax.jit(lambda x, dy, sizes: expected(x, w, dy, sizes))
    for filled in itertools.product([False, True], repeat=8):
        sizes = jnp.where(jnp.array(filled), jnp.array([9, 1, 16, 7, 3, 20, 2, 11]), 0)
        tail = (jnp.arange(ROWS) >= sizes.sum())[:, None]
        poisoned = jnp.where(tail, jnp.nan, x), jnp.where(tail, jnp.nan, dy)
        (out, out_t), (plain_out, plain_t) = run(*poisoned, sizes), plain(*poisoned, sizes)
        np.testing.assert_allclose(out, plain_out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out_t, plain_t, rtol=1e-5, atol=1e-5)
        assert np.all(np.asarray(out_t)[~np.array(filled)] == 0)
        assert np.all(np.asarray(out)[np.asarray(tail[:, 0])] == 0)


@pytest.mark.parametrize(
    "how, transpose_rhs",
    [("plain", False), ("plain", True), ("on_wait", False), ("on_wait", True), ("eager", False)],
)
def test_tiles_that_divide_nothing(how, transpose_rhs):
    """k, n and rows cut off tile; memory that was not written is NaN."""
    x, w, dy = operands(3, inner=200, outer=136)
    w = jnp.swapaxes(w, 1, 2) if transpose_rhs else w
    for sizes in ([30, 0, 40], [0, 0, 0], [0, 75, 0])[: 3 if how == "plain" else 2]:
        sizes = jnp.array(sizes)
        found = products(x, w, dy, sizes, INTERPRETED[how], Blocks(**SMALL), transpose_rhs)
        for ours, plain in zip(found, expected(x, w, dy, sizes, transpose_rhs), strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4)
        assert how != "eager" or not races_found()


@pytest.mark.parametrize("first, count", [(0, 3), (1, 1), (2, 1)])
def test_the_op_and_its_gradients_agree_with_the_reference(first, count):
    x, w, dy = operands(3)
    w = w[first : first + count]

    def results(backend, sizes):
        run = lambda x, w: grouped_matmul(
            x, w, sizes, group_offset=first, backend=backend, interpret=True
        )
        out, pullback = jax.vjp(run, x, w)
        return out, pullback(dy)

    run = {name: jax.jit(lambda s, name=name: results(name, s)) for name in ("tpu", "reference")}
    for sizes in ([30, 0, 40], [0, 75, 0], [5, 6, 7]):
        ours, plain = (run[name](jnp.array(sizes)) for name in ("tpu", "reference"))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain
        )


def test_bfloat16_sums_in_float32():
    x, w, dy = operands(3, jnp.bfloat16)
    sizes = jnp.array([30, 0, 40])
    found = products(x, w, dy, sizes, True, Blocks(32, INNER, OUTER, 16))
    wide = expected(*(a.astype(jnp.float32) for a in (x, w, dy)), sizes)
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    for ours, plain in zip(found, wide, strict=True):
        error = np.linalg.norm(np.float32(ours) - plain) / np.linalg.norm(plain)
        assert error < 1e-2
    np.testing.assert_allclose(found[1], wide[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("how", ["plain", "on_wait"])
def test_adding_to_what_is_there(how):
    x, w, dy = operands(3)
    there = jnp.ones((ROWS, OUTER)), jnp.ones((3, INNER, OUTER))
    sizes = jnp.array([30, 0, 40])
    options = {"group_offset": 0, "out_dtype": "float32", "interpret": INTERPRETED[how]}
    out = tpu.grouped_matmul(x, w, sizes, transpose_rhs=False, existing=there[0], **options)
    out_t = tpu.grouped_matmul_t(x, dy, sizes, num_local=3, existing=there[1], **options)
    plain = expected(x, w, dy, sizes)
    np.testing.assert_allclose(out, 1 + plain[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out_t, 1 + plain[1], rtol=1e-5, atol=1e-5)


def test_other_types_are_refused():
    x, w, _ = operands(3)
    with pytest.raises(NotImplementedError, match="float32 or bfloat16, not float16"):
        grouped_matmul(x.astype(jnp.float16), w, jnp.array([1, 2, 3]), backend="tpu")


def test_blocks_fit_and_divide_what_they_must():
    """Halves of a gated MLP are cut without a rest; weights that fit are read once for a group."""
    of = Product(8192, 2048, 1408, 8, views=2, column_bytes=6)
    for capacity in (64 << 20, 128 << 20):
        blocks = rows_blocks(of, capacity)
        assert 1408 % blocks.outer == 0 and blocks.outer % 128 == 0
    assert rows_blocks(of, 128 << 20).inner == 2048
    assert groups_blocks(Product(8192, 2048, 2816, 8, parts=2), 64 << 20).outer in (128, 1408)
    with pytest.raises(NotImplementedError, match="no tiles for a grouped product of 64 by 200"):
        rows_blocks(Product(64, 64, 200, 2, views=2), 64 << 20)


def test_steps_keep_what_is_multiplied_for_nothing_under_a_tenth():
    assert rows_blocks(Product(65536, 2048, 1024, 8), 128 << 20).step == 128
    assert rows_blocks(Product(65536, 2048, 1024, 64), 128 << 20).step == 64
