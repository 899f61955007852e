"""From noisy latent patches to the decoder's width, and back to a prediction for each patch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.schema import DecoderConfig
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.nn.unet import UNet
from moejax.ops.diffusion import timestep_embedding
from moejax.ops.patchify import patchify, unpatchify
from moejax.ops.pictures import max_pictures, picture_starts, place_pictures, take_pictures

TIME_FREQUENCIES = 128


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then a learned linear map: [...] in [0, 1] -> [..., width]."""

    width: int
    param_dtype: Any

    @nn.compact
    def __call__(self, times: jax.Array) -> jax.Array:
        time_cd = self.param(
            "time_cd",
            partitioned(fan_in_normal((0,)), None, axes.EMBED),
            (TIME_FREQUENCIES, self.width),
            self.param_dtype,
        )
        return timestep_embedding(times, TIME_FREQUENCIES) @ time_cd


class LinearAdapter(nn.Module):
    """One linear map in and one out for each patch (Transfusion, arXiv 2408.11039, section 2.2).

    The time embedding is added after the map in, where the paper adds it to the patch before: in
    the few numbers of a patch of small latents the two could not be told apart. The map out starts
    at zero, so that training starts from the prediction 0.
    """

    config: DecoderConfig

    def setup(self):
        cfg, z = self.config, self.config.latents.size
        d = cfg.width_of("image")
        self.in_zd = self.param(
            "in_zd",
            partitioned(fan_in_normal((0,)), None, axes.EMBED),
            (z, d),
            param_dtype(cfg),
        )
        self.out_dz = self.param(
            "out_dz",
            partitioned(nn.initializers.zeros, axes.EMBED, None),
            (d, z),
            param_dtype(cfg),
        )
        self.time = TimeEmbedding(d, param_dtype(cfg), name="time")

    def encode(self, latents_btz: jax.Array, times_bt: jax.Array, image_id_bt: jax.Array):
        """Returns (patches [b, t, d] in the dtype of the latents, nothing to remember)."""
        del image_id_bt
        dtype = latents_btz.dtype
        patches = jnp.einsum("btz,zd->btd", latents_btz, self.in_zd.astype(dtype))
        return patches + self.time(times_bt).astype(dtype), None

    def decode(self, hidden_btd: jax.Array, memory: None) -> jax.Array:
        """[b, t, d] -> the prediction for each patch [b, t, z]."""
        del memory
        return jnp.einsum("btd,dz->btz", hidden_btd, self.out_dz.astype(hidden_btd.dtype))


class UNetAdapter(nn.Module):
    """Each picture's latents through a U-Net whose middle is the decoder (moejax/nn/unet.py).

    A token stands for ``latents.patch`` x ``latents.patch`` latents. Pictures are taken out of the
    packed rows, as many of each row as fit in it at most, and put back afterwards.
    """

    config: DecoderConfig

    def setup(self):
        cfg, latents = self.config, self.config.latents
        d = cfg.width_of("image")
        self.unet = UNet(latents.channels, latents.unet_width, d, latents.patch, param_dtype(cfg))
        self.time = TimeEmbedding(latents.unet_width, param_dtype(cfg), name="time")

    def encode(self, latents_btz: jax.Array, times_bt: jax.Array, image_id_bt: jax.Array):
        """Returns (patches [b, t, d] in the dtype of the latents, zeros elsewhere; memory)."""
        latents = self.config.latents
        patches, side = latents.tokens_per_image, latents.grid // latents.patch
        b, t = image_id_bt.shape
        start_bi = picture_starts(image_id_bt, max_pictures(t, patches))
        pictures = take_pictures(latents_btz, start_bi, patches)
        noisy = unpatchify(pictures.reshape(-1, side, side, latents.size), latents.patch)
        times_n = take_pictures(times_bt[..., None], start_bi, 1).reshape(-1)
        time_nc = self.time(times_n)
        tokens, skips = self.unet.down(noisy, time_nc)
        tokens = tokens.reshape(b, -1, patches, tokens.shape[-1])
        memory = skips, time_nc, image_id_bt, start_bi
        return place_pictures(tokens, image_id_bt, start_bi), memory

    def decode(self, hidden_btd: jax.Array, memory: tuple) -> jax.Array:
        """[b, t, d] -> the prediction for each patch [b, t, z], zeros elsewhere."""
        skips, time_nc, image_id_bt, start_bi = memory
        b, patches = len(hidden_btd), self.config.latents.tokens_per_image
        tokens = take_pictures(hidden_btd, start_bi, patches)
        predicted = self.unet.up(tokens.reshape(-1, *tokens.shape[2:]), skips, time_nc)
        predicted = patchify(predicted, self.config.latents.patch)
        predicted = predicted.reshape(b, -1, patches, self.config.latents.size)
        return place_pictures(predicted, image_id_bt, start_bi)


class Reader(nn.Module):
    """One linear map for the patches of pictures that are read, and so know no time.

    Departure from BAGEL (arXiv 2505.14683), which reads pixels through a vision transformer: here
    the tower that reads has the latents themselves.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, latents_btz: jax.Array) -> jax.Array:
        """[b, t, z] -> [b, t, d], the width of the tower ``latents.read_by``."""
        cfg = self.config
        in_zd = self.param(
            "in_zd",
            partitioned(fan_in_normal((0,)), None, axes.EMBED),
            (cfg.latents.size, cfg.width_of(cfg.latents.read_by)),
            param_dtype(cfg),
        )
        return jnp.einsum("btz,zd->btd", latents_btz, in_zd.astype(latents_btz.dtype))


def patch_adapter(config: DecoderConfig, name: str) -> nn.Module:
    """The adapter that ``config.latents.adapter`` names.

    ``encode(latents [b, t, z], times [b, t], image_id [b, t]) -> (patches [b, t, d], memory)`` and
    ``decode(hidden [b, t, d], memory) -> [b, t, z]``, with the d of the tower of pictures.
    """
    adapters = {"linear": LinearAdapter, "unet": UNetAdapter}
    return adapters[config.latents.adapter](config, name=name)
