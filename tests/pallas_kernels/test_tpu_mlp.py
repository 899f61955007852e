"""The grouped MLP on TPU, interpreted: value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.untied import swiglu
from pallas_kernels import grouped_mlp, sort_by_group
from pallas_kernels.grouped_matmul import tpu_groups, tpu_rows
from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.grouped_mlp import ragged
from pallas_kernels.grouped_mlp import tpu as fused_mlp
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import choices_to_rows, rows_to_choices
from tests.pallas_kernels.ladder import INTERPRETED, record_races

T, D, GROUPS, K = 40, 24, 3, 2


def close(ours, plain):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * np.abs(b).max()),
        ours,
        plain,
    )


def operands(d, wide, f, first):
    """(floats, token, row, sizes): some choices have no group, others none with a weight."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    wi, wo = normal(keys[1], GROUPS, d, wide)[first:], normal(keys[2], GROUPS, f, d)[first:]
    floats = normal(keys[0], T, d), wi, wo, normal(keys[3], T, K), normal(keys[4], T, d)
    ids = jax.random.randint(keys[5], (T, K), 0, GROUPS + 2)
    by_group = sort_by_group(ids.reshape(-1), GROUPS)
    row = jnp.where(ids < GROUPS, by_group.inverse.reshape(T, K), T * K)
    return floats, by_group.order // K, row, by_group.sizes


def results(floats, *layout, gated=True, **options):
    """(out, gradients of x, wi, wo and gates) of the op."""
    *arguments, cotangent = floats

    def run(x, wi, wo, gates):
        return grouped_mlp(x, wi, wo, *layout, gates if gated else None, interpret=True, **options)

    def both():
        out, pullback = jax.vjp(run, *arguments)
        return out, pullback(cotangent)

    return jax.jit(both)()


@pytest.mark.parametrize(
    "activation, wide, f, gated, first",
    [
        (swiglu, 256, 128, True, 0),
        (swiglu, 256, 128, False, 1),
        (jax.nn.gelu, 40, 40, True, 1),
        # Halves that are not cut at whole lanes, and an error function: XLA's activation.
        (swiglu, 10, 5, True, 0),
    ],
)
def test_the_mlp_agrees_with_the_reference(activation, wide, f, gated, first):
    run = functools.partial(
        results,
        *operands(D, wide, f, first),
        gated=gated,
        activation=activation,
        group_offset=first,
    )
    close(run(backend="tpu"), run(backend="reference"))


@pytest.mark.parametrize("how", [pytest.param("on_wait", marks=pytest.mark.slow), "eager"])
def test_the_whole_mlp_reads_nothing_that_is_not_there(how, monkeypatch):
    """Several tiles each way, the last cut off; memory that was not written holds NaN, as do tokens
    and cotangents of whom no choice has a weight. No kernel has a race.
    """
    first = 1
    floats, token, row, sizes = operands(200, 512, 256, first)
    states = record_races(monkeypatch)
    for module in (tpu_rows, tpu_groups):
        monkeypatch.setattr(module, "tiles", lambda kernel, of: Blocks(32, 128, 128, 16))
    begin = sizes[:first].sum()
    nobody = ~((row >= begin) & (row < sizes.sum())).any(axis=1, keepdims=True)
    assert 0 < nobody.sum() < T
    x, wi, wo, gates, dout = floats
    x, dout = (jnp.where(nobody, jnp.nan, values) for values in (x, dout))
    of = Operands(x, wi, wo, token, row, sizes, choices_to_rows(gates, token, row))
    options = {"activation": swiglu, "group_offset": first, "interpret": INTERPRETED[how]}
    # Kernel by kernel: the interpreter's memory is one for all that run at once.
    out, h_prf = fused_mlp.forward(of, keep_hidden=True, **options)
    *gradients, dscale = fused_mlp.backward(of, h_prf, dout, **options)
    ours = out, (*gradients, rows_to_choices(dscale, row))
    plain = {"activation": swiglu, "group_offset": first, "backend": "reference"}
    close(ours, results(floats, token, row, sizes, **plain))
    assert len(states) == 6 and not any(state.races_found for state in states)


@pytest.mark.parametrize("fused_first", [True, False])
def test_one_direction_may_have_no_tiles(fused_first):
    """`auto` then has it by ragged_dot, whatever the other direction kept."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    x, dout = normal(keys[0], T, D), normal(keys[1], T, D)
    wi, wo = normal(keys[2], GROUPS, D, 256), normal(keys[3], GROUPS, 128, D)
    by_group = sort_by_group(jax.random.randint(keys[4], (T,), 0, GROUPS), GROUPS)
    scale = normal(keys[5], T)
    of = Operands(x, wi, wo, by_group.order, by_group.inverse[:, None], by_group.sizes, scale)
    options = {"activation": swiglu, "group_offset": 0}
    fused = (
        functools.partial(fused_mlp.forward, interpret=True),
        functools.partial(fused_mlp.backward, interpret=True),
    )
    plain = ragged.forward, ragged.backward
    first, second = (fused[0], plain[1]) if fused_first else (plain[0], fused[1])
    mixed, expected = (
        jax.jit(lambda f=f, b=b: b(of, f(of, keep_hidden=True, **options)[1], dout, **options))()
        for f, b in ((first, second), plain)
    )
    close(mixed, expected)
