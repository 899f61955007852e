"""The network against plain convolutions, with weights drawn for the test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.efficientnet import (
    BN_EPSILON,
    STAGES,
    depthwise,
    efficientnet_features,
    fold_batch_norms,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")
WIDTH = 6


def convolve(x, kernel_ochw, stride, groups=1):
    """As torch's weights lie: [out, in, i, j]."""
    kernel = jnp.asarray(kernel_ochw).transpose(2, 3, 1, 0)
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 7), (4, 2)])
def test_depthwise_is_the_grouped_convolution(kernel, stride, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, WIDTH)), jnp.float32)
    kernel_ijd = rng.normal(size=(kernel, kernel, WIDTH)).astype(np.float32)
    expected = convolve(x, kernel_ijd.transpose(2, 0, 1)[:, None], stride, groups=WIDTH)
    got = jax.jit(depthwise, static_argnums=2)(x, kernel_ijd, stride)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def draw_state():
    """A state dict of the network's names, every layer ``WIDTH`` channels wide but the head."""
    rng = np.random.default_rng(1)
    state = {}

    def draw(convolution, norm, shape):
        fan_in = np.prod(shape[1:])
        state[f"{convolution}.weight"] = rng.normal(size=shape) / np.sqrt(fan_in)
        for name in ("weight", "running_var"):
            state[f"{norm}.{name}"] = rng.uniform(0.5, 2, shape[0])
        for name in ("bias", "running_mean"):
            state[f"{norm}.{name}"] = rng.normal(size=shape[0]) / 2

    draw("_conv_stem", "_bn0", (WIDTH, 3, 3, 3))
    kernels = (3, 3, 5, 3, 5, 5, 3)
    blocks = [
        (e, k) for (e, _, repeats), k in zip(STAGES, kernels, strict=True) for _ in range(repeats)
    ]
    for number, (expansion, kernel) in enumerate(blocks):
        name = f"_blocks.{number}"
        inner = WIDTH * (2 if expansion > 1 else 1)
        if expansion > 1:
            draw(f"{name}._expand_conv", f"{name}._bn0", (inner, WIDTH, 1, 1))
        draw(f"{name}._depthwise_conv", f"{name}._bn1", (inner, 1, kernel, kernel))
        draw(f"{name}._project_conv", f"{name}._bn2", (WIDTH, inner, 1, 1))
    draw("_conv_head", "_bn1", (2 * WIDTH, WIDTH, 1, 1))
    return state


def plain_features(state, images):
    """The network as its paper has it: every convolution one of lax, every norm by itself."""

    def layer(x, convolution, norm, stride=1, groups=1):
        x = convolve(x, state[f"{convolution}.weight"].astype(np.float32), stride, groups)
        gain, bias, mean, variance = (
            jnp.asarray(state[f"{norm}.{name}"], jnp.float32)[None, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / jnp.sqrt(variance + BN_EPSILON) * gain + bias

    relu6 = lambda x: jnp.minimum(jnp.maximum(x, 0), 6)
    x = relu6(layer((jnp.asarray(images, jnp.float32) - 127) / 128, "_conv_stem", "_bn0", 2))
    number = 0
    for expansion, first_stride, repeats in STAGES:
        for repeat in range(repeats):
            name, before = f"_blocks.{number}", x
            if expansion > 1:
                x = relu6(layer(x, f"{name}._expand_conv", f"{name}._bn0"))
            stride = 1 if repeat else first_stride
            x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride, groups=x.shape[-1])
            x = layer(relu6(x), f"{name}._project_conv", f"{name}._bn2")
            x = x + before if repeat else x
            number += 1
    return relu6(layer(x, "_conv_head", "_bn1")).mean(axis=(1, 2))


def test_the_network_is_its_layers_one_by_one():
    state = draw_state()
    images = np.random.default_rng(2).integers(0, 256, (2, 37, 33, 3), np.uint8)
    got = jax.jit(efficientnet_features)(fold_batch_norms(state), images)
    assert got.shape == (2, 2 * WIDTH) and (got > 0).mean() > 0.05
    expected = jax.jit(lambda images: plain_features(state, images))(images)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(got[0] - got[1]).max() > 1e-2
