"""The continuous image tokenizer: the module, the frozen codec, and the built-in weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.config.schema import AutoencodeConfig, FSQAutoencoderConfig, KLAutoencoderConfig
from moejax.data.sources import open_source
from moejax.errors import UserError
from moejax.models.autoencoder import to_signed, to_uint8
from moejax.models.registry import MODELS
from moejax.models.tokenizer import (
    LatentCodec,
    builtin_codec_path,
    load_image_codec,
    load_latent_codec,
    save_image_codec,
    save_latent_codec,
)
from moejax.objectives import OBJECTIVES
from moejax.train.reconstruction import image_mse, to_psnr

TINY = KLAutoencoderConfig(
    image_size=8,
    patch_size=4,
    latent_channels=3,
    width=8,
    encoder_blocks=1,
    decoder_blocks=1,
    augment=False,
)
MODEL = MODELS.get("kl_autoencoder")(TINY)


@functools.cache
def make_params(seed=0):
    batch = {"images": jnp.zeros((1, 8, 8, 3), jnp.uint8)}
    return meta.unbox(jax.jit(MODEL.init)(jax.random.key(seed), batch))["params"]


@functools.cache
def compiled(method=None):
    return jax.jit(lambda params, x: MODEL.apply({"params": params}, x, method=method))


@functools.cache
def trained(train=True):
    """``(params, images, key) -> outputs`` as a training step calls the model."""
    return jax.jit(
        lambda params, images, key: MODEL.apply(
            {"params": params}, {"images": images}, train=train, rngs={"dropout": key}
        )
    )


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture
def tiny_codec(tmp_path):
    return save_latent_codec(tmp_path / "tiny.npz", TINY, make_params(), pictures(40))


@pytest.fixture(scope="module")
def builtin():
    return load_latent_codec("builtin:kl")


@pytest.fixture(scope="module")
def held_out():
    """Every fourth picture of the validation split."""
    source = open_source("builtin:emoji32", "val")
    return np.stack([source[index]["image"] for index in range(0, len(source), 4)])


def test_model_output():
    images = pictures(3)
    out = compiled()(make_params(), {"images": images})
    assert out.target.shape == out.reconstruction.shape == (3, 8, 8, 3)
    assert out.codes is None and out.kl.shape == (3,)
    latents = compiled("encode")(make_params(), images)
    assert latents.shape == (3, 4, 3) and latents.dtype == jnp.float32
    decoded = compiled("decode")(make_params(), latents)
    np.testing.assert_array_equal(decoded, to_uint8(out.reconstruction))


def test_training_draws_from_the_posterior_and_evaluation_takes_its_mean():
    images, keys = pictures(2), jax.random.split(jax.random.key(0))
    plain = compiled()(make_params(), {"images": images}).reconstruction
    one, other = (trained()(make_params(), images, key).reconstruction for key in keys)
    assert not np.allclose(one, other, atol=1e-3)
    still = trained(train=False)(make_params(), images, keys[0]).reconstruction
    np.testing.assert_allclose(still, plain, atol=1e-6)
    # A posterior of almost no variance leaves its mean.
    narrow = dict(make_params())
    bias = narrow["latent_out"]["bias_f"].at[TINY.latent_channels :].add(-40.0)
    narrow["latent_out"] = {**narrow["latent_out"], "bias_f": bias}
    quiet = trained()(narrow, images, keys[0]).reconstruction
    np.testing.assert_allclose(quiet, plain, atol=1e-3)


def test_divergence_against_sampling():
    """KL(N(mean, var) || N(0, 1)) as the mean of log q - log p over draws."""
    images = pictures(2, seed=3)
    mean, log_variance = (
        np.asarray(x, np.float64) for x in compiled("posterior")(make_params(), to_signed(images))
    )
    z = np.random.default_rng(0).normal(size=(200_000, 1, 1, 1, 1))
    drawn = mean + np.exp(0.5 * log_variance) * z
    log_q = -0.5 * z**2 - 0.5 * log_variance
    expected = (log_q + 0.5 * drawn**2).mean(axis=0).mean(axis=(1, 2, 3))
    found = compiled()(make_params(), {"images": images}).kl
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_no_divergence_from_the_standard_normal_itself():
    params = dict(make_params())
    params["latent_out"] = jax.tree.map(jnp.zeros_like, params["latent_out"])
    out = compiled()(params, {"images": pictures(2)})
    np.testing.assert_array_equal(out.kl, [0.0, 0.0])


def fit(kl, steps=60):
    """The divergence after training with that weight on it."""
    images, model = pictures(4), TINY
    objective = OBJECTIVES.get("autoencode")(AutoencodeConfig(l1=0.0, l2=1.0, kl=kl), model)
    optimizer = optax.adam(0.03)

    def loss(params, key):
        out = trained()(params, images, key)
        sums = objective(out, {"weights": jnp.ones(len(images))})
        return sums.total(), sums.mean("kl")

    @jax.jit
    def step(carry, key):
        params, state = carry
        (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    carry = make_params(), optimizer.init(make_params())
    _, values = jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))
    return float(values[0]), float(values[-1])


def test_the_divergence_pulls_the_posterior_to_the_standard_normal():
    first, strong = fit(kl=1.0)
    _, none = fit(kl=0.0)
    assert strong < 0.05 < first
    assert none > 2 * first


def test_every_parameter_gets_a_gradient():
    def loss(params):
        out = trained()(params, pictures(4), jax.random.key(0))
        return jnp.square(out.reconstruction - out.target).mean() + 1e-2 * out.kl.mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(make_params())):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_the_rest_is_the_autoencoder_with_codes():
    """Same encoder and decoder; other than the codes' vectors and the width of the latents."""
    fsq = FSQAutoencoderConfig(
        image_size=8, patch_size=4, levels=(4, 3, 3), width=8, encoder_blocks=1, decoder_blocks=1
    )
    batch = {"images": jnp.zeros((1, 8, 8, 3), jnp.uint8)}
    other = jax.eval_shape(MODELS.get("fsq_autoencoder")(fsq).init, jax.random.key(0), batch)
    other = meta.unbox(other["params"])
    assert set(other) - set(make_params()) == {"code_vd"}
    for name in set(make_params()) - {"latent_out"}:
        shapes = [jax.tree.map(lambda x: x.shape, p[name]) for p in (make_params(), other)]
        assert shapes[0] == shapes[1], name


def test_latents_are_normalised_over_the_pictures_given(tiny_codec):
    latents = tiny_codec.encode(pictures(40)).reshape(-1, 3)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(latents.std(axis=0), 1, atol=1e-5)
    # Not by chance: before, they are not.
    means = compiled("encode")(tiny_codec.params, pictures(40))
    np.testing.assert_allclose(np.std(means, axis=(0, 1)), tiny_codec.std_z, rtol=1e-4)
    assert np.abs(tiny_codec.std_z - 1).max() > 0.02


def test_decoding_undoes_the_normalisation(tiny_codec):
    images = pictures(5, seed=1)
    expected = to_uint8(compiled()(tiny_codec.params, {"images": images}).reconstruction)
    found = tiny_codec.decode(tiny_codec.encode(images))
    # Equal but for values that fall between two steps of 1/255.
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 1
    assert (found != expected).mean() < 0.01


def test_latents_do_not_depend_on_the_company(tiny_codec):
    images = pictures(70)
    latents = tiny_codec.encode(images)
    order = np.random.default_rng(1).permutation(len(images))
    np.testing.assert_array_equal(tiny_codec.encode(images[order]), latents[order])
    np.testing.assert_array_equal(
        tiny_codec.decode(latents)[order], tiny_codec.decode(latents[order])
    )


def test_codec_shapes_and_errors(tiny_codec):
    assert (tiny_codec.channels, tiny_codec.grid, tiny_codec.latents_per_image) == (3, (2, 2), 4)
    assert tiny_codec.image_size == 8
    assert tiny_codec.encode(pictures(0)).shape == (0, 4, 3)
    decoded = tiny_codec.decode(np.zeros((2, 4, 3)))
    assert decoded.shape == (2, 8, 8, 3) and decoded.dtype == np.uint8
    with pytest.raises(ValueError, match=r"expected uint8 images \[n, 8, 8, 3\]"):
        tiny_codec.encode(pictures(1, size=16))
    with pytest.raises(ValueError, match=r"expected latents \[n, 4, 3\], got \[2, 3, 4\]"):
        tiny_codec.decode(np.zeros((2, 3, 4)))


def test_saved_codec_loads_and_its_version_is_of_its_content(tmp_path, tiny_codec):
    again = load_latent_codec(str(tmp_path / "tiny.npz"))
    assert isinstance(again, LatentCodec)
    assert again.version == tiny_codec.version and again.config == TINY
    images = pictures(3)
    np.testing.assert_array_equal(again.encode(images), tiny_codec.encode(images))
    # Writing what was read changes nothing: float16 values are kept exactly.
    copy = save_latent_codec(tmp_path / "copy.npz", again.config, again.params, pictures(40))
    assert copy.version == tiny_codec.version
    # The statistics are part of the content.
    other = save_latent_codec(tmp_path / "other.npz", TINY, again.params, pictures(39))
    assert other.version != tiny_codec.version


def test_a_channel_that_says_nothing_is_not_blown_up(tmp_path):
    params = dict(make_params())
    params["latent_out"] = jax.tree.map(jnp.zeros_like, params["latent_out"])
    codec = save_latent_codec(tmp_path / "flat.npz", TINY, params, pictures(4))
    np.testing.assert_array_equal(codec.encode(pictures(4)), 0)


def test_wrong_specs_are_user_errors(tmp_path, tiny_codec):
    with pytest.raises(UserError, match="no built-in latent autoencoder 'builtin:fsq'"):
        load_latent_codec("builtin:fsq")
    with pytest.raises(UserError, match="no file .*nowhere.npz'; choose builtin:kl"):
        load_latent_codec(str(tmp_path / "nowhere.npz"))
    with np.load(tmp_path / "tiny.npz") as file:
        stored = {name: file[name] for name in file.files}
    without = {name: value for name, value in stored.items() if name != "latents/std_z"}
    np.savez(tmp_path / "missing.npz", **without)
    fsq = FSQAutoencoderConfig(image_size=8, patch_size=4, levels=(4, 3), width=8)
    batch = {"images": jnp.zeros((1, 8, 8, 3), jnp.uint8)}
    params = jax.jit(MODELS.get("fsq_autoencoder")(fsq).init)(jax.random.key(0), batch)["params"]
    save_image_codec(tmp_path / "codes.npz", fsq, meta.unbox(params))
    for name in ("missing", "codes"):
        with pytest.raises(UserError, match=f"{name}.npz' is no latent autoencoder"):
            load_latent_codec(str(tmp_path / f"{name}.npz"))
    with pytest.raises(UserError, match="tiny.npz' is no image tokenizer"):
        load_image_codec(str(tmp_path / "tiny.npz"))
    with pytest.raises(UserError, match="model.latent_channels: must be positive"):
        dataclasses.replace(TINY, latent_channels=0)


def test_builtin_codec_has_the_promised_shape(builtin):
    assert builtin.channels == 8
    assert builtin.grid == (8, 8) and builtin.latents_per_image == 64
    assert builtin.image_size == 32
    assert builtin_codec_path("kl").stat().st_size < 2e6


def test_builtin_codec_is_the_one_described(builtin, held_out):
    """kl.json is of these weights, and its figures are what they reach."""
    table = json.loads(builtin_codec_path("kl").with_suffix(".json").read_text(encoding="utf-8"))
    fsq = json.loads(builtin_codec_path().with_suffix(".json").read_text(encoding="utf-8"))
    assert table["version"] == builtin.version
    assert table["parameters"] == load_config("tokenizer_kl").about.total_params
    for split, metrics in table["metrics"].items():
        assert metrics["psnr"] > metrics["pca_psnr"] + 4
        assert metrics["psnr"] > fsq["metrics"][split]["psnr"] + 2
    rebuilt = builtin.decode(builtin.encode(held_out))
    # A quarter of the split: its mean is not that of the whole.
    assert abs(to_psnr(image_mse(held_out, rebuilt)).mean() - table["metrics"]["val"]["psnr"]) < 0.7


def test_builtin_latents_are_of_unit_variance_and_bear_noise(builtin, held_out):
    latents = builtin.encode(held_out)
    # Of other pictures than those of the statistics.
    np.testing.assert_allclose(latents.mean(axis=(0, 1)), 0, atol=0.2)
    np.testing.assert_allclose(latents.std(axis=(0, 1)), 1, atol=0.2)
    noise = np.random.default_rng(0).normal(size=latents.shape)
    clean, noisy = (
        to_psnr(image_mse(held_out, builtin.decode(x))).mean()
        for x in (latents, latents + 0.1 * noise)
    )
    # What a sampler gets wrong by a tenth shows little.
    assert clean - 1.5 < noisy < clean
