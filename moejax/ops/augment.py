"""Random changes of pictures, inside of jit."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

# How far a picture is moved at most, in pixels.
MAX_SHIFT = 3


def augment_images(rng: Key[Array, ""], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Moves, mirrors, transposes and swaps the colour channels of each picture at random.

    Meant for autoencoders, which shall draw any shape at any place in any colour; rarer changes are
    those that take a picture farther from real ones. Every operation permutes or repeats values of
    the picture, so none blurs it or leaves its range.

    Args:
      rng: one key for the batch.
      images: square pictures.
    """
    b = images.shape[0]
    keys = jax.random.split(rng, 5)
    images = crop(keys[0], images, MAX_SHIFT)

    def maybe(key, probability, changed):
        return jnp.where(jax.random.bernoulli(key, probability, (b, 1, 1, 1)), changed, images)

    images = maybe(keys[1], 0.5, images[:, :, ::-1])
    images = maybe(keys[2], 0.1, images[:, ::-1])
    images = maybe(keys[3], 0.1, images.swapaxes(1, 2))
    orders = jnp.asarray(list(itertools.permutations(range(images.shape[-1]))))
    # The first order is the identity: three in four pictures keep their colours.
    others = len(orders) - 1
    weights = jnp.asarray([0.75] + [0.25 / others] * others) if others else jnp.ones(1)
    chosen = orders[jax.random.choice(keys[4], len(orders), (b,), p=weights)]
    return jnp.take_along_axis(images, chosen[:, None, None, :], axis=-1)


def crop(
    rng: Key[Array, ""], images: Shaped[Array, "b h w c"], padding: int
) -> Shaped[Array, "b h w c"]:
    """Moves each picture by up to ``padding`` pixels each way, its edge repeated."""
    b, h, w, c = images.shape
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pad, mode="edge")
    start = jax.random.randint(rng, (b, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, c)))(
        padded, start
    )


def quarter_turns(
    images: Shaped[Array, "b h h c"], turns: Int[Array, " b"]
) -> Shaped[Array, "b h h c"]:
    """Each picture turned by so many quarters to the left, modulo 4."""
    turned = [jnp.rot90(images, k, axes=(1, 2)) for k in range(4)]
    which = (turns % 4)[:, None, None, None]
    return jnp.select([which == k for k in range(4)], turned)


def mirror(rng: Key[Array, ""], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Each picture, or with probability 1/2 its mirror image."""
    mirrored = jax.random.bernoulli(rng, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
