"""The "reconstruction" evaluator: how well an image tokenizer's codes keep the picture.

Reported for the split, beside k-means patch codes at equal bits (as many codes, the same grid of
patches, centres fitted on the training split):

* ``psnr``: the mean over pictures of ``10 log10(255^2 / MSE)`` in dB, MSE over all pixels and
  channels after rounding and clipping to uint8, and floored at one value that is off by one;
* ``psnr_pooled``: ``10 log10(255^2 / mean of the MSEs)``;
* ``codes_used``: how many different codes occur; ``code_perplexity``: exp of the entropy of their
  frequencies, the size of an equally used codebook;
* ``kmeans_...``: the same for k-means.
"""

import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from moejax.analysis.kmeans import fit_kmeans, nearest
from moejax.config.schema import Config
from moejax.models.tokenizer import to_uint8
from moejax.ops import fsq
from moejax.ops.patchify import patchify, unpatchify
from moejax.train.evaluate import EVALUATORS, EvalContext

QUANTITIES = ("psnr", "psnr_pooled", "codes_used", "code_perplexity")
# k-means is fitted on the patches of at most so many training pictures, evenly spread.
KMEANS_IMAGES = 4096


@EVALUATORS.register("reconstruction")
def reconstruction(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs an autoencoder and a pipeline of pictures."""
    model, cfg = context.model, context.config.model

    def reconstruct(params: Any, batch: dict):
        outputs = model.apply({"params": params}, batch, train=False)
        return to_uint8(outputs.reconstruction), outputs.codes

    program = context.program("reconstruction", reconstruct)
    centres = patch_centres(
        context.train_pipeline.source, cfg.patch_size, fsq.num_codes(cfg.levels)
    )
    learned, baseline = _Tally(len(centres)), _Tally(len(centres))
    for batch, on_device in context.batches():
        counted = batch["weights"] > 0
        images = batch["images"][counted]
        rebuilt, codes = (np.asarray(x)[counted] for x in program(context.params, on_device))
        learned.add(images, rebuilt, codes)
        codes = kmeans_encode(images, centres, cfg.patch_size)
        baseline.add(images, kmeans_decode(codes, centres, cfg.patch_size), codes)
    return {
        **learned.report(),
        **{f"kmeans_{name}": value for name, value in baseline.report().items()},
    }


def metric_names(config: Config) -> list[str]:
    """What :func:`reconstruction` returns."""
    del config
    return [prefix + name for prefix in ("", "kmeans_") for name in QUANTITIES]


reconstruction.metric_names = metric_names


class _Tally:
    """Squared errors and code counts of a split."""

    def __init__(self, num_codes: int):
        self.errors: list[np.ndarray] = []
        self.counts = np.zeros(num_codes, np.int64)

    def add(self, images, rebuilt, codes) -> None:
        self.errors.append(image_mse(images, rebuilt))
        self.counts += np.bincount(codes.reshape(-1), minlength=len(self.counts))

    def report(self) -> dict[str, float]:
        mse = np.concatenate(self.errors)
        share = self.counts[self.counts > 0] / self.counts.sum()
        values = (
            float(to_psnr(mse).mean()),
            float(to_psnr(mse.mean())),
            len(share),
            math.exp(-(share * np.log(share)).sum()),
        )
        return dict(zip(QUANTITIES, values, strict=True))


def image_mse(
    images: UInt8[np.ndarray, "n h w c"], rebuilt: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """Mean squared error of each picture in squared steps of 1/255, never below one step."""
    error = np.square(images.astype(np.float64) - rebuilt)
    return np.maximum(error.mean(axis=(1, 2, 3)), 1 / error[0].size)


def to_psnr(mse):
    """Peak signal to noise ratio in dB of a mean squared error in squared steps of 1/255."""
    return 10 * np.log10(255.0**2 / mse)


@functools.lru_cache(maxsize=2)
def patch_centres(source: Any, patch: int, num_codes: int) -> Float[np.ndarray, "k f"]:
    """k-means centres of the patches of a source's pictures; fitted once per source."""
    chosen = np.unique(np.linspace(0, len(source) - 1, KMEANS_IMAGES).astype(int))
    images = np.stack([source[int(index)]["image"] for index in chosen])
    patches = np.asarray(patchify(images, patch))
    return fit_kmeans(patches.reshape(-1, patches.shape[-1]), num_codes)


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
