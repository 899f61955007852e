"""Pictures of a diffusion model of latents: drawn as latents, seen through their autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.config.schema import KLAutoencoderConfig
from moejax.data.latents import PatchCodec
from moejax.generate import denoiser
from moejax.generate.denoiser import Drawing, draw_pictures, load_denoiser
from moejax.models.autoencoder import to_uint8
from moejax.models.registry import MODELS
from moejax.models.tokenizer import load_latent_codec, save_latent_codec
from moejax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compiles")

# 2 x 2 latents of 3 channels of pictures of 32 x 32.
SIDE, CHANNELS = 2, 3
AUTOENCODER = KLAutoencoderConfig(
    image_size=32,
    patch_size=16,
    latent_channels=CHANNELS,
    width=8,
    encoder_blocks=1,
    decoder_blocks=1,
    augment=False,
)


def make_codec(path):
    """An autoencoder that nobody has trained."""
    model = MODELS.get("kl_autoencoder")(AUTOENCODER)
    batch = {"images": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))["params"]
    pictures = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    return save_latent_codec(path, AUTOENCODER, params, pictures)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """Of a run of one step of training on latents of such an autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    make_codec(folder / "codec.npz")
    changes = {
        "data.image_tokenizer": str(folder / "codec.npz"),
        "data.batch_size": 8,
        "model.image_size": SIDE,
        "model.in_channels": CHANNELS,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.ffn_hidden": (16,),
        "train.steps": 1,
        "train.checkpoint_every": 1,
        "eval.metrics": (),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(folder / "cache"))
        train(load_config("dit:latents", changes), folder / "run")
        loaded = load_denoiser(folder / "run")
    return dataclasses.replace(loaded, drawing=Drawing(steps=3, guidance=2.0), batch_size=2)


@pytest.mark.slow
def test_the_sampler_of_a_run_has_its_codec(sampler):
    assert isinstance(sampler.codec, PatchCodec)
    assert sampler.codec.grid == (SIDE, SIDE) and sampler.codec.size == CHANNELS


def test_pictures_are_what_the_codec_makes_of_the_latents(sampler, monkeypatch):
    """Place by place, in batches, of the pictures on the way too."""
    drawn, real = [], denoiser._decode

    def noted(sampler, x_bhwz):
        drawn.append(np.asarray(x_bhwz))
        return real(sampler, x_bhwz)

    monkeypatch.setattr(denoiser, "_decode", noted)
    found = draw_pictures(sampler, [None, None, None], seed=1, keep=(0, 2))
    assert found.pictures.shape == (3, 32, 32, 3) and found.pictures.dtype == np.uint8
    # Two batches, of each the samples and then what was in mind at two steps.
    samples = np.concatenate([drawn[0], drawn[3]])
    on_the_way = [np.concatenate([drawn[k], drawn[3 + k]]) for k in (1, 2)]
    assert samples.shape == (3, SIDE, SIDE, CHANNELS)
    codec = sampler.codec.codec
    decode = lambda x: codec.decode(np.stack([x[:, i, j] for i, j in np.ndindex(SIDE, SIDE)], 1))
    np.testing.assert_array_equal(found.pictures, decode(samples))
    np.testing.assert_array_equal(found.kept, [decode(x) for x in on_the_way])
    assert len(np.unique(found.pictures.reshape(3, -1), axis=0)) == 3


def test_latents_may_lie_outside_of_what_pixels_can(sampler, monkeypatch):
    """Their variance is 1: they are not cut off at -1 and 1."""
    seen = []
    monkeypatch.setattr(denoiser, "_decode", lambda sampler, x: seen.append(x) or to_uint8(x))
    far = jax.tree.map(lambda leaf: 0 * leaf, sampler.params)
    far["out_bias_f"] = 0 * far["out_bias_f"] + 9.0
    draw_pictures(dataclasses.replace(sampler, params=far), [None])
    assert np.abs(seen[0]).max() > 1.5
    assert np.abs(seen[0]).max() <= denoiser.LATENT_CLIP + 1e-3


def test_the_built_in_codec_fits_the_config():
    codec = load_latent_codec("builtin:kl")
    model = load_config("dit:latents").model
    assert (codec.channels, *codec.grid) == (model.in_channels, *[model.image_size] * 2)
