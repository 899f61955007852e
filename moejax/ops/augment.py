"""Random changes of pictures, inside of jit."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

# How far a picture is moved at most, in pixels.
MAX_SHIFT = 3
# Shares of red, green and blue in how bright a colour looks (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


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


def jitter(
    rng: Key[Array, ""],
    images: UInt8[Array, "b h w 3"],
    brightness: float,
    contrast: float,
    saturation: float,
) -> UInt8[Array, "b h w 3"]:
    """Changes brightness, then contrast, then saturation of each picture, rounded and clipped.

    Each is multiplied by a factor drawn evenly from [1 - s, 1 + s], with s the strength: the
    distance of all values to black, to the mean grey of the picture, to the grey of each pixel.
    """
    keys = jax.random.split(rng, 3)
    luma = jnp.asarray(LUMA, jnp.float32)
    grey = lambda x: (x * luma[None, None, None]).sum(axis=-1, keepdims=True)

    def factor(key: Array, strength: float) -> Array:
        return jax.random.uniform(
            key, (len(images), 1, 1, 1), minval=1 - strength, maxval=1 + strength
        )

    pixels = images.astype(jnp.float32)
    if brightness:
        pixels = jnp.clip(factor(keys[0], brightness) * pixels, 0, 255)
    if contrast:
        mean = grey(pixels).mean(axis=(1, 2), keepdims=True)
        pixels = jnp.clip(mean + factor(keys[1], contrast) * (pixels - mean), 0, 255)
    if saturation:
        of_pixel = grey(pixels)
        pixels = jnp.clip(of_pixel + factor(keys[2], saturation) * (pixels - of_pixel), 0, 255)
    return jnp.round(pixels).astype(jnp.uint8)


def mixup(
    rng: Key[Array, ""], images: UInt8[Array, "b h w c"], may_b: Bool[Array, " b"], alpha: float
) -> tuple[UInt8[Array, "b h w c"], Int[Array, " b"], Float[Array, " b"]]:
    """Each picture with a share of another one of the batch (arXiv 1710.09412, section 2).

    Shares are drawn from Beta(alpha, alpha) for each picture, where the paper draws one for the
    batch, and the larger part is the picture's own: pairs are drawn evenly, so that this changes
    which of two is called the other.

    Args:
      rng: one key for the batch.
      images: the pictures.
      may_b: which take part; the others stay as they are.
      alpha: > 0; the larger, the more even the shares.

    Returns:
      The mixed pictures, rounded; the row of each one's other; the share of its own, 1/2 to 1. The
      shares of the two add up to 1.
    """
    order_rng, share_rng = jax.random.split(rng)
    other_b = jax.random.permutation(order_rng, len(images))
    share_b = jax.random.beta(share_rng, alpha, alpha, (len(images),), jnp.float32)
    share_b = jnp.maximum(share_b, 1 - share_b)
    share_b = jnp.where(may_b & may_b[other_b], share_b, 1.0)
    share = share_b[:, None, None, None]
    mixed = share * images + (1 - share) * images[other_b]
    return jnp.round(mixed).astype(jnp.uint8), other_b, share_b
