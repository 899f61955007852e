"""The "reconstruction" evaluator: PSNR by hand, filler rows, and its k-means baseline."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.data.build import build_pipeline
from moejax.models.autoencoder import FSQAutoencoder, KLAutoencoder
from moejax.ops.patchify import unpatchify
from moejax.parallel.mesh import make_mesh
from moejax.train.evaluate import EvalContext, evaluate
from moejax.train.reconstruction import (
    image_mse,
    kmeans_decode,
    kmeans_encode,
    metric_names,
    patch_components,
    pca_rebuild,
    to_psnr,
)

SMALL = {
    "model.width": 8,
    "model.encoder_blocks": 1,
    "model.decoder_blocks": 1,
    # 191 pictures: the last batch has one row of filler.
    "data.batch_size": 96,
}


def make_context(config, model):
    val = build_pipeline(config, "val")
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), val.batch(0)))["params"]
    train = build_pipeline(dataclasses.replace(config), "train")
    # The baseline is fitted on a part of the split here, which only takes time off.
    train.source = [train.source[index] for index in range(0, len(train.source), 16)]
    train.source = _Hashable(train.source)
    return EvalContext(config, model, None, params, val, train, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def context():
    config = load_config("tokenizer_fsq", {**SMALL, "model.levels": (4, 4)})
    return make_context(config, FSQAutoencoder(config.model))


@pytest.fixture(scope="module")
def latent_context():
    config = load_config("tokenizer_kl", {**SMALL, "model.latent_channels": 2})
    return make_context(config, KLAutoencoder(config.model))


class _Hashable(list):
    """Records that can be the key of a cache, as a RecordSource is."""

    __hash__ = object.__hash__


def test_values_against_a_loop_over_pictures(context):
    values = evaluate(context)
    assert set(values) == set(metric_names(context.config))
    source = context.pipeline.source
    images = np.stack([source[index]["image"] for index in range(len(source))])
    apply = jax.jit(
        lambda p, x, m: context.model.apply({"params": p}, x, method=m), static_argnums=2
    )
    codes = apply(context.params, images, "encode")
    rebuilt = np.asarray(apply(context.params, codes, "decode")).astype(float)
    mse = np.array([((a - b) ** 2).mean() for a, b in zip(images, rebuilt, strict=True)])
    assert values["psnr"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=0.01)
    assert values["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / mse.mean()), abs=0.01)
    assert values["codes_used"] == len(np.unique(codes))
    # An untrained autoencoder loses to 16 patch centres, which spread over their codes.
    assert values["kmeans_psnr"] > values["psnr"] + 3
    assert values["kmeans_codes_used"] == 16
    assert 1 < values["kmeans_code_perplexity"] <= 16


def test_continuous_latents_against_a_loop_over_pictures(latent_context):
    values = evaluate(latent_context)
    assert set(values) == set(metric_names(latent_context.config))
    assert set(values) == {"psnr", "psnr_pooled", "pca_psnr", "pca_psnr_pooled"}
    source = latent_context.pipeline.source
    images = np.stack([source[index]["image"] for index in range(len(source))])
    apply = jax.jit(
        lambda p, x, m: latent_context.model.apply({"params": p}, x, method=m), static_argnums=2
    )
    latents = apply(latent_context.params, images, "encode")
    rebuilt = np.asarray(apply(latent_context.params, latents, "decode")).astype(float)
    mse = np.array([((a - b) ** 2).mean() for a, b in zip(images, rebuilt, strict=True)])
    assert values["psnr"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=0.01)
    assert values["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / mse.mean()), abs=0.01)
    # An untrained autoencoder loses to two principal components.
    assert values["pca_psnr"] > values["psnr"] + 3


def test_principal_components_of_patches_that_have_two():
    """Pictures whose patches lie in a plane come back whole from it, and not from a line."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, 2 * 2 * 3))
    patches = 128 + rng.uniform(-25, 25, (20, 4, 4, 2)) @ directions
    images = np.asarray(unpatchify(patches.clip(0, 255).round().astype(np.uint8), 2))
    source = _Hashable({"image": image} for image in images)
    rebuilt = [
        pca_rebuild(images, *patch_components(source, 2, count), 2).astype(float)
        for count in (1, 2)
    ]
    line, plane = (np.abs(x - images).max() for x in rebuilt)
    # Rounding to uint8 leaves the plane a little.
    assert plane <= 2 and line > 20


def test_psnr_by_hand():
    images = np.zeros((2, 2, 2, 3), np.uint8)
    rebuilt = images.copy()
    rebuilt[0] = 255
    mse = image_mse(images, rebuilt)
    # A perfect picture counts as one value off by one.
    np.testing.assert_allclose(mse, [255**2, 1 / 12])
    np.testing.assert_allclose(to_psnr(mse), [0, 10 * np.log10(255**2 * 12)])


def test_kmeans_codes_of_pictures_made_of_centres():
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (5, 2 * 2 * 3)).astype(np.float32)
    codes = rng.integers(0, 5, (3, 4, 4))
    images = kmeans_decode(codes, centres, 2)
    assert images.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(kmeans_encode(images, centres, 2), codes)
