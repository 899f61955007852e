"""Patch adapters: shapes, time, skips, gradients, and pictures inside of packed rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.schema import DecoderConfig, LatentConfig
from moejax.data.latents import PatchCodec
from moejax.nn.patch_adapter import LinearAdapter, UNetAdapter, patch_adapter
from moejax.nn.unet import ResidualBlock, UNet
from moejax.ops.patchify import patchify

GRID, CHANNELS, D = 4, 3, 6
# Two pictures of four patches, text around and between them; one picture; none.
IMAGE_ID = np.array(
    [
        [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [0] * 16,
    ],
    np.int32,
)


def config(adapter, patch=2):
    latents = LatentConfig(CHANNELS, patch, GRID, adapter, unet_width=8)
    return DecoderConfig(d_model=D, num_heads=1, latents=latents)


class RoundTrip(nn.Module):
    """The adapter with a stack of no layers between its halves."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, latents, times, image_id):
        adapter = patch_adapter(self.config, "adapter")
        patches, memory = adapter.encode(latents, times, image_id)
        return patches, adapter.decode(patches, memory)


@functools.cache
def program(kind, patch=2):
    module = RoundTrip(config(kind, patch))
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))


def inputs(image_id=IMAGE_ID, size=12, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(*image_id.shape, size)).astype(np.float32)
    # One time for each picture, as in training.
    times = 0.3 * image_id + 0.1 * np.arange(1, len(image_id) + 1)[:, None]
    inside = image_id > 0
    return latents * inside[..., None], (times * inside).astype(np.float32), image_id


@functools.cache
def fresh_params(kind, patch=2):
    module = RoundTrip(config(kind, patch))
    arguments = inputs(np.asarray(IMAGE_ID), size=patch**2 * CHANNELS)
    return meta.unbox(jax.jit(module.init)(jax.random.key(0), *arguments))["params"]


@functools.cache
def params(kind, patch=2):
    """Initial values, with noise on them: nothing is at zero."""
    leaves, tree = jax.tree.flatten(fresh_params(kind, patch))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


KINDS = pytest.mark.parametrize("kind", ["linear", "unet"])


def test_the_config_chooses_the_adapter():
    assert type(patch_adapter(config("linear"), "a")) is LinearAdapter
    assert type(patch_adapter(config("unet"), "a")) is UNetAdapter


@KINDS
@pytest.mark.parametrize("patch", [1, 2])
def test_shapes(kind, patch):
    # Sixteen patches of one latent, or four of two by two.
    image_id = np.ones((2, 16), np.int32) if patch == 1 else IMAGE_ID
    latents, times, image_id = inputs(image_id, size=patch**2 * CHANNELS)
    patches, predicted = program(kind, patch)(params(kind, patch), latents, times, image_id)
    assert patches.shape == (*image_id.shape, D)
    assert predicted.shape == latents.shape
    assert predicted.dtype == jnp.float32


@KINDS
def test_the_first_prediction_is_zero(kind):
    _, predicted = program(kind)(fresh_params(kind), *inputs())
    assert np.abs(np.asarray(predicted)).max() == 0


@KINDS
def test_time_changes_both_halves(kind):
    latents, times, image_id = inputs()
    at = lambda times: program(kind)(params(kind), latents, times, image_id)
    for one, other in zip(at(times), at(0.9 * times), strict=True):
        changed = np.abs(np.asarray(one - other)).max(axis=-1)
        assert changed[image_id > 0].min() > 1e-4


@KINDS
def test_every_parameter_gets_a_gradient(kind):
    latents, times, image_id = inputs()

    def loss(params):
        _, predicted = program(kind)(params, latents, times, image_id)
        return jnp.square(predicted * (image_id > 0)[..., None] - latents).mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params(kind))):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


@KINDS
def test_a_picture_is_the_same_wherever_it_stands(kind):
    """In a packed row as alone, and whatever the other picture of its row is."""
    latents, times, image_id = inputs()
    patches, predicted = program(kind)(params(kind), latents, times, image_id)
    spans = {(0, 1): slice(1, 5), (0, 2): slice(11, 15), (1, 1): slice(6, 10)}
    for (row, _), span in spans.items():
        alone = (latents[row, span], times[row, span], np.ones(4, np.int32))
        one, other = program(kind)(params(kind), *(x[None] for x in alone))
        np.testing.assert_allclose(patches[row, span], one[0], atol=1e-5)
        np.testing.assert_allclose(predicted[row, span], other[0], atol=1e-5)
    latents[0, 11:15] += 1
    again, _ = program(kind)(params(kind), latents, times, image_id)
    np.testing.assert_array_equal(again[0, 1:5], patches[0, 1:5])
    assert np.abs(np.asarray(again - patches))[0, 11:15].min() > 0


def test_the_unet_says_nothing_outside_of_pictures():
    for values in program("unet")(params("unet"), *inputs()):
        assert np.abs(np.asarray(values)[IMAGE_ID == 0]).max() == 0


def test_the_unet_joins_patches_and_the_linear_adapter_does_not():
    latents, times, image_id = inputs()
    moved = latents.copy()
    moved[1, 6] += 1
    for kind in ("linear", "unet"):
        before, after = (
            program(kind)(params(kind), x, times, image_id)[0] for x in (latents, moved)
        )
        changed = np.abs(np.asarray(before - after)).max(axis=-1) > 1e-5
        assert changed[1, 6] and changed[1, 7:10].all() == (kind == "unet")


def test_eight_devices_equal_one():
    latents, times, image_id = (np.concatenate([x[:2]] * 4) for x in inputs())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put((latents, times, image_id), jax.NamedSharding(mesh, jax.P("data")))

    @jax.jit
    def gradients(params, latents, times, image_id):
        def loss(params):
            patches, predicted = program("unet")(params, latents, times, image_id)
            return jnp.square(predicted).mean() + jnp.square(patches).mean()

        return jax.grad(loss)(params)

    one = gradients(params("unet"), latents, times, image_id)
    eight = gradients(params("unet"), *spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight)


def make_unet(factor, blocks=2, zero_out=False):
    unet = UNet(CHANNELS, 8, D, factor, jnp.float32, blocks, zero_out)
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=(2, GRID, GRID, CHANNELS)).astype(np.float32)
    time = rng.normal(size=(2, 5)).astype(np.float32)

    def both(unet, noisy, time):
        tokens, skips = unet.down(noisy, time)
        return unet.up(tokens, skips, time)

    variables = meta.unbox(unet.init(jax.random.key(0), noisy, time, method=both))
    return unet, variables, noisy, time


@pytest.mark.parametrize("factor", [1, 2])
def test_unet_shapes(factor):
    unet, variables, noisy, time = make_unet(factor)
    tokens, skips = unet.apply(variables, noisy, time, method="down")
    assert tokens.shape == (2, (GRID // factor) ** 2, D)
    assert [skip.shape for skip in skips] == [(2, GRID, GRID, 8)] * 2
    out = unet.apply(variables, tokens, skips, time, method="up")
    assert out.shape == noisy.shape


def test_every_skip_is_used():
    unet, variables, noisy, time = make_unet(2)
    tokens, skips = unet.apply(variables, noisy, time, method="down")

    def total(skips):
        out = unet.apply(variables, tokens, skips, time, method="up")
        return jnp.square(out).sum()

    for grad in jax.grad(total)(skips):
        assert float(jnp.abs(grad).min()) > 0


def test_tokens_of_the_unet_come_row_by_row():
    """One block sees two latents to each side, more than the first token's two by two."""
    unet, variables, noisy, time = make_unet(2, blocks=1)
    token = lambda noisy: unet.apply(variables, noisy, time, method="down")[0]
    # With the convolutions' centres alone, a token sees its own latents only.
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    variables = jax.tree.map(lambda x: x * centre if x.shape[:2] == (3, 3) else x, variables)
    slope = jax.jacobian(lambda noisy: token(noisy)[0].sum(axis=-1))(jnp.asarray(noisy))
    seen = np.abs(np.asarray(slope))[:, 0].max(axis=-1) > 1e-7
    for index, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        expected = np.zeros((GRID, GRID), bool)
        expected[row : row + 2, column : column + 2] = True
        np.testing.assert_array_equal(seen[index], expected)


def test_the_unet_reads_patches_as_the_codec_cuts_them():
    class Grid:
        channels, grid, version = CHANNELS, (GRID, GRID), "grid"

        def encode(self, images):
            return images

    latents = np.random.default_rng(0).normal(size=(2, GRID**2, CHANNELS)).astype(np.float32)
    cut = PatchCodec(Grid(), 2).encode(latents)
    expected = patchify(latents.reshape(2, GRID, GRID, CHANNELS), 2).reshape(2, 4, -1)
    np.testing.assert_array_equal(cut, expected)


def test_zero_out_is_optional():
    for zero_out in (True, False):
        unet, variables, noisy, time = make_unet(1, zero_out=zero_out)
        tokens, skips = unet.apply(variables, noisy, time, method="down")
        out = unet.apply(variables, tokens, skips, time, method="up")
        assert (np.abs(np.asarray(out)).max() == 0) == zero_out


def test_residual_block_against_its_formula():
    block = ResidualBlock(4, jnp.float32)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32)
    time = jnp.asarray(rng.normal(size=(1, 5)), jnp.float32)
    p = meta.unbox(block.init(jax.random.key(0), x, time))["params"]
    p = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), jnp.float32), p)

    def norm(x, scale):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale

    def conv(x, weights):
        """On a grid of one cell a convolution is its centre."""
        middle = weights["conv_ijdf"].shape[0] // 2
        return x @ weights["conv_ijdf"][middle, middle] + weights["conv_bias_f"]

    silu = lambda x: x / (1 + np.exp(-x))
    flat = np.asarray(x)[0, 0, 0]
    hidden = conv(silu(norm(flat, p["_Norm_0"]["norm_scale_d"])), p["conv_1"])
    hidden = hidden + silu(np.asarray(time[0])) @ p["time_cf"]
    hidden = conv(silu(norm(hidden, p["_Norm_1"]["norm_scale_d"])), p["conv_2"])
    expected = conv(flat, p["shortcut"]) + hidden
    found = block.apply({"params": p}, x, time)[0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
