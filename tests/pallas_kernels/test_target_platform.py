"""`auto` looks at the platform that a program is compiled for, not at the one it is made on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.ops.untied import modality_layout, swiglu, untied_linear
from pallas_kernels import grouped_mlp, sort_by_group


def linear(x_btd, w_mdf, modality_bt):
    return untied_linear(x_btd, w_mdf, modality_layout(modality_bt, 2))


def mlp(x_td, wi_edf, wo_efd, ids_t):
    order, inverse, sizes = sort_by_group(ids_t, 2)
    return grouped_mlp(x_td, wi_edf, wo_efd, order, inverse[:, None], sizes, activation=swiglu)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PROGRAMS = {
    "grouped_matmul": (linear, (floats(2, 64, 32), floats(2, 32, 48), jnp.zeros((2, 64), int))),
    "grouped_mlp": (
        mlp,
        (floats(128, 32), floats(2, 32, 64), floats(2, 32, 32), jnp.zeros(128, int)),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("target", ["cpu", "tpu", "cuda"])
def test_the_grouped_product_is_that_of_the_target(name, target):
    assert jax.default_backend() == "cpu"
    function, arguments = PROGRAMS[name]
    gradient = jax.grad(lambda *args: function(*args).sum(), argnums=(0, 1))
    for program in (function, gradient):
        lowered = jax.jit(program).trace(*arguments).lower(lowering_platforms=(target,))
        # On a CPU a loop over row tiles; elsewhere the ragged product of the platform.
        assert ("chlo.ragged_dot" in lowered.as_text()) == (target != "cpu")


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v6 lite"), ("cuda", "NVIDIA H200")])
def test_a_mesh_says_which_device_it_is(name, platform, kind):
    """On TPUs the Pallas kernels; those for GPUs only where they are asked for."""
    device = AbstractDevice(kind, 1, platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    function, arguments = PROGRAMS[name]
    gradient = jax.grad(lambda *args: function(*args).sum(), argnums=(0, 1))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    assert ("chlo.ragged_dot" in text) == (platform == "cuda")
