"""Sets of real pictures with a known fault each: what a measure must put in order."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moejax.analysis.fidelity.pictures import Pictures
from moejax.ops.corrupt import add_noise, blur

# Pictures damaged in one call.
_CHUNK = 256
REPEATS = 10
BLURS, NOISES = (0.5, 1.0), (5.0, 40.0)


def damaged_sets(
    images: Pictures,
    labels: Int[np.ndarray, " n"],
    training: Pictures,
    count: int,
    seed: int = 0,
) -> Iterator[tuple[str, Pictures]]:
    """Yields (name, ``count`` pictures): some of ``images``, and such with a fault.

    Faults are classes that are missing (where pictures have labels), a tenth of the pictures
    repeated, half of them taken from those of ``training``, blur, noise, and pixels that are drawn
    from the Gaussian of the real ones. A set for which there are too few pictures is left out.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, labels = images[order], labels[order]
    whole, few, half = images[:count], -(-count // REPEATS), count // 2
    yield "as they are", whole
    classes = np.unique(labels[labels >= 0])
    for name, kept in (
        ("first class left out", classes[1:]),
        ("first half of the classes", classes[: len(classes) // 2]),
    ):
        rows = np.flatnonzero(np.isin(labels, kept))[:count]
        if len(rows) == count:
            yield name, images[rows]
    # Shuffled: a measure that takes the pictures part by part would meet each once in every part.
    repeated = rng.permutation(np.resize(whole[:few], whole.shape))
    yield f"a tenth of them, {REPEATS} times each", repeated
    yield "half of them training pictures", np.concatenate([whole[half:], training[:half]])
    for sigma in BLURS:
        yield f"blur of {sigma:g} pixels", _each(lambda part, _, s=sigma: blur(part, s), whole)
    key = jax.random.key(seed)
    for std in NOISES:
        noisy = lambda part, index, std=std: add_noise(key, part, index, std)
        yield f"noise of {std:g} / 255", _each(noisy, whole)
    yield "Gaussian of the pixels", gaussian_pictures(whole, np.random.default_rng(seed))


def _each(damage, images: Pictures) -> Pictures:
    """``damage(images, numbers)`` part by part."""
    program, numbers = jax.jit(damage), jnp.arange(len(images))
    starts = range(0, len(images), _CHUNK)
    parts = [(images[i : i + _CHUNK], numbers[i : i + _CHUNK]) for i in starts]
    return np.concatenate([np.asarray(program(*part)) for part in parts])


def gaussian_pictures(images: Pictures, rng: np.random.Generator) -> Pictures:
    """As many pictures, drawn from the Gaussian with the mean and covariance of all pixels."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    mean = flat.mean(axis=0)
    # Sums of the centred pictures with normal weights have their covariance.
    weights = rng.standard_normal((len(images), len(images)), np.float32)
    drawn = mean + weights @ (flat - mean) / np.sqrt(len(images) - 1)
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8).reshape(images.shape)
