"""The "reconstruction" evaluator: PSNR by hand, filler rows, and its k-means baseline."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.data.pipeline import build_pipeline
from moejax.models.tokenizer import FSQAutoencoder
from moejax.parallel.mesh import make_mesh
from moejax.train.evaluate import EvalContext, evaluate
from moejax.train.reconstruction import (
    image_mse,
    kmeans_decode,
    kmeans_encode,
    metric_names,
    to_psnr,
)


@pytest.fixture(scope="module")
def context():
    config = load_config(
        "tokenizer_fsq",
        {
            "model.width": 8,
            "model.levels": (4, 4),
            "model.encoder_blocks": 1,
            "model.decoder_blocks": 1,
            # 191 pictures: the last batch has one row of filler.
            "data.batch_size": 96,
        },
    )
    model = FSQAutoencoder(config.model)
    val = build_pipeline(config, "val")
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), val.batch(0)))["params"]
    train = build_pipeline(dataclasses.replace(config), "train")
    # The baseline is fitted on a part of the split here, which only takes time off.
    train.source = [train.source[index] for index in range(0, len(train.source), 16)]
    train.source = _Hashable(train.source)
    return EvalContext(config, model, None, params, val, train, make_mesh(config.mesh))


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
