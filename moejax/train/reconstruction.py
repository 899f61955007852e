"""The "reconstruction" evaluator: how well an image tokenizer keeps the picture.

Reported for the split, beside a plain method of equal size on the same grid of patches that is
fitted on the training split: for codes k-means with as many centres (equal bits), for continuous
latents the first principal components (PCA), as many as the latents have channels:

* ``psnr``: the mean over pictures of ``10 log10(255^2 / MSE)`` in dB, MSE over all pixels and
  channels after rounding and clipping to uint8, and floored at one value that is off by one;
* ``psnr_pooled``: ``10 log10(255^2 / mean of the MSEs)``;
* ``codes_used``: how many different codes occur; ``code_perplexity``: exp of the entropy of their
  frequencies, the size of an equally used codebook (neither for continuous latents);
* ``kmeans_...``, ``pca_...``: the same for the baseline.

Continuous latents are unrounded posterior means, in effect of far more bits than the codes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from moejax.config.schema import Config, KLAutoencoderConfig
from moejax.models.autoencoder import to_uint8
from moejax.ops import fsq
from moejax.ops.kmeans import fit_kmeans, nearest
from moejax.ops.patchify import patchify, unpatchify
from moejax.train.evaluate import EVALUATORS, EvalContext

QUANTITIES = ("psnr", "psnr_pooled", "codes_used", "code_perplexity")
# Baselines are fitted on the patches of at most so many training pictures, evenly spread.
BASELINE_IMAGES = 4096


@EVALUATORS.register("reconstruction")
def reconstruction(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs an autoencoder and a pipeline of pictures."""
    model, cfg = context.model, context.config.model

    def reconstruct(params: Any, batch: dict):
        outputs = model.apply({"params": params}, batch, train=False)
        return to_uint8(outputs.reconstruction), outputs.codes

    program = context.program("reconstruction", reconstruct)
    prefix, num_codes, baseline = _baseline(context.train_pipeline.source, cfg)
    learned, plain = _Tally(num_codes), _Tally(num_codes)
    for batch, on_device in context.batches():
        counted = batch["weights"] > 0
        images = batch["images"][counted]
        rebuilt, codes = program(context.params, on_device)
        codes = None if codes is None else np.asarray(codes)[counted]
        learned.add(images, np.asarray(rebuilt)[counted], codes)
        plain.add(images, *baseline(images))
    return {
        **learned.report(),
        **{f"{prefix}{name}": value for name, value in plain.report().items()},
    }


def metric_names(config: Config) -> list[str]:
    """What :func:`reconstruction` returns."""
    if isinstance(config.model, KLAutoencoderConfig):
        return [prefix + name for prefix in ("", "pca_") for name in QUANTITIES[:2]]
    return [prefix + name for prefix in ("", "kmeans_") for name in QUANTITIES]


reconstruction.metric_names = metric_names


def _baseline(source: Any, config: Any) -> tuple[str, int, Callable]:
    """(prefix, number of codes, function images -> (rebuilt, codes)) of the plain method."""
    patch = config.patch_size
    if isinstance(config, KLAutoencoderConfig):
        basis = patch_components(source, patch, config.latent_channels)
        return "pca_", 0, lambda images: (pca_rebuild(images, *basis, patch), None)
    centres = patch_centres(source, patch, fsq.num_codes(config.levels))

    def kmeans(images):
        codes = kmeans_encode(images, centres, patch)
        return kmeans_decode(codes, centres, patch), codes

    return "kmeans_", len(centres), kmeans


class _Tally:
    """Squared errors and, if there are codes, code counts of a split."""

    def __init__(self, num_codes: int):
        self.errors: list[np.ndarray] = []
        self.counts = np.zeros(num_codes, np.int64)

    def add(self, images, rebuilt, codes) -> None:
        self.errors.append(image_mse(images, rebuilt))
        if codes is not None:
            self.counts += np.bincount(codes.reshape(-1), minlength=len(self.counts))

    def report(self) -> dict[str, float]:
        mse = np.concatenate(self.errors)
        values = [float(to_psnr(mse).mean()), float(to_psnr(mse.mean()))]
        if len(self.counts):
            share = self.counts[self.counts > 0] / self.counts.sum()
            values += [len(share), math.exp(-(share * np.log(share)).sum())]
        return dict(zip(QUANTITIES, values, strict=False))


def image_mse(
    images: UInt8[np.ndarray, "n h w c"], rebuilt: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """Mean squared error of each picture in squared steps of 1/255, never below one step."""
    error = np.square(images.astype(np.float64) - rebuilt)
    return np.maximum(error.mean(axis=(1, 2, 3)), 1 / error[0].size)


def to_psnr(mse):
    """Peak signal to noise ratio in dB of a mean squared error in squared steps of 1/255."""
    return 10 * np.log10(255.0**2 / mse)


def _training_patches(source: Any, patch: int) -> Float[np.ndarray, "n f"]:
    """Patches of evenly spread pictures of a source, as float32 rows."""
    chosen = np.unique(np.linspace(0, len(source) - 1, BASELINE_IMAGES).astype(int))
    images = np.stack([source[int(index)]["image"] for index in chosen])
    patches = np.asarray(patchify(images, patch), np.float32)
    return patches.reshape(-1, patches.shape[-1])


@functools.lru_cache(maxsize=2)
def patch_components(
    source: Any, patch: int, count: int
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, "z f"]]:
    """(mean, first principal components) of the patches of a source's pictures."""
    patches = _training_patches(source, patch).astype(np.float64)
    mean = patches.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(patches.T))
    # Eigenvalues come in ascending order.
    return mean, vectors[:, ::-1][:, :count].T


def pca_rebuild(
    images: UInt8[np.ndarray, "n h w c"],
    mean: Float[np.ndarray, " f"],
    components: Float[np.ndarray, "z f"],
    patch: int,
) -> UInt8[np.ndarray, "n h w c"]:
    """Each patch replaced by its projection on the components, rounded to uint8."""
    patches = np.asarray(patchify(images, patch), np.float64) - mean
    rebuilt = (patches @ components.T) @ components + mean
    return np.asarray(unpatchify(np.clip(np.rint(rebuilt), 0, 255).astype(np.uint8), patch))


@functools.lru_cache(maxsize=2)
def patch_centres(source: Any, patch: int, num_codes: int) -> Float[np.ndarray, "k f"]:
    """k-means centres of the patches of a source's pictures; fitted once per source."""
    return fit_kmeans(_training_patches(source, patch), num_codes)


def kmeans_encode(
    images: UInt8[np.ndarray, "n h w c"], centres: Float[np.ndarray, "k f"], patch: int
) -> Int[np.ndarray, "n rows cols"]:
    """The nearest centre of each patch."""
    patches = np.asarray(patchify(images, patch), np.float32)
    index, _ = nearest(patches.reshape(-1, patches.shape[-1]), centres)
    return index.reshape(patches.shape[:-1])


def kmeans_decode(
    codes: Int64[np.ndarray, "n rows cols"], centres: Float[np.ndarray, "k f"], patch: int
) -> UInt8[np.ndarray, "n h w c"]:
    """Each patch replaced by its centre, rounded to uint8."""
    patches = np.clip(np.rint(centres), 0, 255).astype(np.uint8)[codes]
    return np.asarray(unpatchify(patches, patch))
