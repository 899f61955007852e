"""Convolutional autoencoders of pictures: discrete codes (FSQ) or continuous latents (small KL).

The picture is cut into patches; a few residual blocks on the grid of patches give z numbers for
each. They are rounded to one of ``prod(levels)`` codes (finite scalar quantisation, arXiv
2309.15505), or kept as the mean of a normal whose divergence from the standard normal is held down
a little (arXiv 2112.10752, section 3.1). The decoder mirrors the encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.schema import FSQAutoencoderConfig, KLAutoencoderConfig
from moejax.errors import UserError
from moejax.models.registry import MODELS
from moejax.nn.conv import ConvBlock
from moejax.nn.layers import compute_dtype, fan_in_normal, param_dtype, partitioned
from moejax.ops import fsq
from moejax.ops.augment import augment_images
from moejax.ops.norms import rms_normalise
from moejax.ops.patchify import patchify, unpatchify

_NORM_EPS = 1e-6
CHANNELS = 3
# Bounds of the logarithm of the posterior's variance, which its exponential needs.
_LOG_VARIANCE = (-20.0, 10.0)


@struct.dataclass
class AutoencoderOutput:
    """``target`` and ``reconstruction`` [b, h, w, 3] in [-1, 1], and what lies between them.

    ``target`` is the picture that was encoded: the augmented one in training. The
    reconstruction is not clipped, so that its gradient does not vanish outside of the range.

    Attributes:
      codes: [b, t] i32; None where the latents are not quantised.
      kl: [b], divergence of the posterior from the standard normal in nats per latent number;
        None where there is no posterior.
    """

    target: jax.Array
    reconstruction: jax.Array
    codes: jax.Array | None = None
    kl: jax.Array | None = None


class _Autoencoder(nn.Module):
    """Encoder and decoder; what is done to the latents between them is left to the subclass."""

    # An AutoencoderConfig with ``encoder_features``; subclasses name theirs.
    config: Any

    def setup(self):
        cfg = self.config
        wide = param_dtype(cfg)
        self.patch_in = _Linear(cfg.width, wide)
        self.encoder = [ConvBlock(_NORM_EPS, wide) for _ in range(cfg.encoder_blocks)]
        self.latent_out = _Linear(cfg.encoder_features, wide, normalise=True)
        self.latent_in = _Linear(cfg.width, wide)
        self.decoder = [ConvBlock(_NORM_EPS, wide) for _ in range(cfg.decoder_blocks)]
        self.patch_out = _Linear(cfg.patch_size**2 * CHANNELS, wide, normalise=True)

    def latents(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] -> what the encoder says of each patch [b, rows, cols, _].

        z unbounded numbers for FSQ; z means, then z logarithms of variances with a posterior.
        """
        x = patchify(images.astype(compute_dtype(self.config)), self.config.patch_size)
        x = self.patch_in(x)
        for block in self.encoder:
            x = block(x)
        return self.latent_out(x)

    def _draw(self, x: jax.Array) -> jax.Array:
        """Features [b, rows, cols, width] -> images [b, h, w, 3]."""
        for block in self.decoder:
            x = block(x)
        return unpatchify(self.patch_out(x), self.config.patch_size)

    def _read(self, batch: dict[str, jax.Array], train: bool) -> jax.Array:
        """The pictures of the batch [b, h, w, 3] in [-1, 1], augmented in training."""
        size = self.config.image_size
        if batch["images"].shape[1:3] != (size, size):
            raise UserError(
                f"model.image_size={size}: the pictures are of {batch['images'].shape[1]} pixels "
                "(data.image_size); make the two equal"
            )
        images = to_signed(batch["images"])
        if train and self.config.augment:
            images = augment_images(self.make_rng("dropout"), images)
        return images


class FSQAutoencoder(_Autoencoder):
    """Pictures <-> codes. See the module docstring."""

    config: FSQAutoencoderConfig

    def setup(self):
        super().setup()
        cfg = self.config
        # A vector of its own for each code, beside the linear map of its channels: the decoder is
        # not held to be smooth over the grid of levels.
        self.code_vd = self.param(
            "code_vd",
            partitioned(nn.initializers.zeros, axes.VOCABULARY, axes.EMBED),
            (fsq.num_codes(cfg.levels), cfg.width),
            param_dtype(cfg),
        )

    def render(self, channels: jax.Array) -> jax.Array:
        """Quantised channels [b, rows, cols, z] in [-1, 1] -> images [b, h, w, 3]."""
        codes = fsq.channels_to_codes(channels, self.config.levels)
        dtype = compute_dtype(self.config)
        return self._draw(
            self.latent_in(channels.astype(dtype)) + self.code_vd.astype(dtype)[codes]
        )

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] uint8 -> codes [b, t] i32, the grid row by row."""
        return self._codes(self._channels(to_signed(images)))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [b, t] i32 -> images [b, h, w, 3] uint8."""
        channels = fsq.codes_to_channels(codes.reshape(-1, *self.config.grid), self.config.levels)
        return to_uint8(self.render(channels))

    def __call__(self, batch: dict[str, jax.Array], *, train: bool = False) -> AutoencoderOutput:
        """Reconstructs ``batch["images"]`` [b, h, w, 3] uint8.

        Raises UserError, when it is traced, if the pictures are not of ``model.image_size``.
        """
        images = self._read(batch, train)
        channels = self._channels(images)
        return AutoencoderOutput(images, self.render(channels), codes=self._codes(channels))

    def _channels(self, images: jax.Array) -> jax.Array:
        return fsq.quantise(self.latents(images), self.config.levels)

    def _codes(self, channels: jax.Array) -> jax.Array:
        codes = fsq.channels_to_codes(channels, self.config.levels)
        return codes.reshape(codes.shape[0], -1)


class KLAutoencoder(_Autoencoder):
    """Pictures <-> continuous latents. See the module docstring."""

    config: KLAutoencoderConfig

    def render(self, latents: jax.Array) -> jax.Array:
        """Latents [b, rows, cols, z] -> images [b, h, w, 3]."""
        return self._draw(self.latent_in(latents.astype(compute_dtype(self.config))))

    def posterior(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [b, h, w, 3] in [-1, 1] -> (mean, log variance), [b, rows, cols, z] float32."""
        wide = self.latents(images).astype(param_dtype(self.config))
        mean, log_variance = jnp.split(wide, 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] uint8 -> posterior means [b, t, z], the grid row by row."""
        mean, _ = self.posterior(to_signed(images))
        return mean.reshape(mean.shape[0], -1, mean.shape[-1])

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [b, t, z] -> images [b, h, w, 3] uint8."""
        grid = latents.reshape(-1, *self.config.grid, self.config.latent_channels)
        return to_uint8(self.render(grid))

    def __call__(self, batch: dict[str, jax.Array], *, train: bool = False) -> AutoencoderOutput:
        """Reconstructs ``batch["images"]`` [b, h, w, 3] uint8.

        From a draw of the posterior in training, else from its mean. Raises UserError, when it is
        traced, if the pictures are not of ``model.image_size``.
        """
        images = self._read(batch, train)
        mean, log_variance = self.posterior(images)
        latents = mean
        if train:
            noise = jax.random.normal(self.make_rng("dropout"), mean.shape, mean.dtype)
            latents = mean + jnp.exp(0.5 * log_variance) * noise
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        return AutoencoderOutput(images, self.render(latents), kl=kl.mean(axis=(1, 2, 3)))


class _Linear(nn.Module):
    """``[norm] -> W x + bias`` over the last axis."""

    features: int
    param_dtype: jnp.dtype
    normalise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, d = x.dtype, x.shape[-1]
        # Only the side that is as wide as the model gets its logical name.
        names = (axes.EMBED, None) if self.normalise else (None, axes.EMBED)
        w_df = self.param(
            "w_df",
            partitioned(fan_in_normal((0,)), *names),
            (d, self.features),
            self.param_dtype,
        )
        bias_f = self.param(
            "bias_f",
            partitioned(nn.initializers.zeros, names[1]),
            (self.features,),
            self.param_dtype,
        )
        if self.normalise:
            scale_d = self.param(
                "norm_scale_d",
                partitioned(nn.initializers.ones, axes.EMBED),
                (d,),
                self.param_dtype,
            )
            x = (rms_normalise(x, _NORM_EPS) * scale_d[None, None, None]).astype(dtype)
        x = jnp.einsum("bijd,df->bijf", x, w_df.astype(dtype))
        return x + bias_f[None, None, None].astype(dtype)


def to_signed(images: jax.Array) -> jax.Array:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8 in 0..255, rounded and clipped."""
    scaled = jnp.round((images.astype(jnp.float32) + 1.0) * 127.5)
    return jnp.clip(scaled, 0, 255).astype(jnp.uint8)


@MODELS.register("fsq_autoencoder")
def build_fsq_autoencoder(config: FSQAutoencoderConfig) -> FSQAutoencoder:
    return FSQAutoencoder(config)


@MODELS.register("kl_autoencoder")
def build_kl_autoencoder(config: KLAutoencoderConfig) -> KLAutoencoder:
    return KLAutoencoder(config)
