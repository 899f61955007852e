"""Every op, value and gradients, exported for each platform from a machine that has only a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.ops.untied import swiglu
from pallas_kernels import (
    combine_rows,
    dispatch_rows,
    gather_tokens,
    grouped_matmul,
    grouped_mlp,
    router_topk,
    scatter_tokens,
    sort_by_group,
)

T, K, GROUPS, D, F = 64, 2, 3, 2048, 128


def layout():
    ids = jax.random.randint(jax.random.key(0), (T * K,), 0, GROUPS)
    by_group = sort_by_group(ids, GROUPS)
    return by_group.order // K, by_group.inverse.reshape(T, K), by_group.sizes


def op(name, **options):
    """(function of floats, their shapes) with what is no float bound."""
    token, row, sizes = layout()
    index = jnp.arange(0, T, 3)[None]
    taken = index.shape[1]
    mlp = lambda x, wi, wo, gates: grouped_mlp(
        x, wi, wo, token, row, sizes, gates, activation=swiglu, **options
    )
    functions = {
        "grouped_matmul": (
            lambda x, w: grouped_matmul(x, w, sizes, **options),
            ((T * K, D), (GROUPS, D, F)),
        ),
        "grouped_mlp": (mlp, ((T, D), (GROUPS, D, 2 * F), (GROUPS, F, D), (T, K))),
        "dispatch_rows": (
            lambda x, scale: dispatch_rows(x, token, row, scale, **options),
            ((T, D), (T * K,)),
        ),
        "combine_rows": (
            lambda y, gates: combine_rows(y, token, row, gates, **options),
            ((T * K, D), (T, K)),
        ),
        "router_topk": (
            lambda logits: router_topk(logits, K, renormalise=True, **options),
            ((T, 2 * GROUPS),),
        ),
        "gather_tokens": (lambda x: gather_tokens(x, index, **options), ((1, T, D),)),
        "scatter_tokens": (
            lambda x, update, weight: scatter_tokens(x, update, index, weight, **options),
            ((1, T, D), (1, taken, D), (1, taken)),
        ),
    }
    return functions[name]


OPS = [
    *("grouped_matmul", "grouped_mlp", "dispatch_rows", "combine_rows"),
    *("router_topk", "gather_tokens", "scatter_tokens"),
]


def value_and_gradients(function):
    """Of the sum of squares of all outputs that are floats; and the outputs."""

    def loss(*floats):
        out = function(*floats)
        wide = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x.astype(jnp.float32) ** 2).sum() for x in wide), out

    def run(*floats):
        return jax.value_and_grad(loss, argnums=range(len(floats)), has_aux=True)(*floats)

    return run


def exported(name, platform, dtype, checks=(), **options):
    function, shapes = op(name, **options)
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    run = jax.jit(value_and_gradients(function))
    found = export.export(run, platforms=(platform,), disabled_checks=checks)(*arguments)
    assert found.platforms == (platform,)
    return found


@pytest.mark.parametrize("name", OPS)
def test_on_a_cpu_the_exported_program_is_the_op(name):
    assert jax.default_backend() == "cpu"
    function, shapes = op(name)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    floats = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    ours = exported(name, "cpu", jnp.float32).call(*floats)
    plain = jax.jit(value_and_gradients(function))(*floats)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_without_a_mesh_the_program_is_one_of_xla(name, platform):
    text = exported(name, platform, jnp.bfloat16).mlir_module()
    assert "tpu_custom_call" not in text and "mosaic_gpu" not in text


@pytest.mark.parametrize("name", OPS)
def test_for_a_tpu_the_kernels_are_in_the_program(name):
    device = AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = exported(name, "tpu", jnp.bfloat16, backend="tpu").mlir_module()
    assert "tpu_custom_call" in text and "ragged_dot" not in text


@pytest.mark.parametrize("name", ["grouped_matmul", "grouped_mlp"])
def test_for_a_gpu_the_kernels_are_in_the_program(name):
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    text = exported(name, "cuda", jnp.bfloat16, checks, backend="gpu").mlir_module()
    assert "mosaic_gpu" in text and "ragged_dot" not in text
