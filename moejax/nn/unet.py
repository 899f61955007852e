"""A small U-Net around the decoder: latents of a picture to tokens, and tokens back to latents.

As the patch adapter of Transfusion (arXiv 2408.11039, section 2.2), which takes U-Net blocks and
puts ordinary norms in place of the adaptive ones; the time is added inside of each block instead.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.nn.conv import convolve
from moejax.nn.layers import fan_in_normal, partitioned
from moejax.ops.norms import layer_normalise
from moejax.ops.patchify import patchify, unpatchify

_NORM_EPS = 1e-5


class UNet(nn.Module):
    """``down`` before the decoder, ``up`` after it, with a skip from each block to its opposite.

    Attributes:
      channels: z of the latents.
      width: of the convolutions.
      d_model: of the tokens.
      factor: a token stands for factor x factor latents.
      blocks: residual blocks on each side.
      param_dtype: of the parameters.
      zero_out: the last convolution starts at zero, so that the first prediction is 0.
    """

    channels: int
    width: int
    d_model: int
    factor: int
    param_dtype: Any
    blocks: int = 1
    zero_out: bool = True

    def setup(self):
        dtype, width = self.param_dtype, self.width
        tile = self.factor**2 * width
        self.conv_in = _Conv(width, dtype, (None, axes.CHANNELS))
        self.down_blocks = [ResidualBlock(width, dtype) for _ in range(self.blocks)]
        self.to_tokens = _Conv(self.d_model, dtype, (axes.CHANNELS, axes.EMBED), kernel=1)
        self.from_tokens = _Conv(tile, dtype, (axes.EMBED, axes.CHANNELS), kernel=1)
        self.up_blocks = [ResidualBlock(width, dtype) for _ in range(self.blocks)]
        self.norm_out = _Norm(dtype)
        names = (axes.EMBED, None)
        self.conv_out = _Conv(self.channels, dtype, names, zero=self.zero_out)

    def down(self, noisy: jax.Array, time: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Latents [n, rows, cols, z], time embedding [n, _] -> (tokens [n, p, d], skips).

        Tokens come row by row; ``skips`` has one [n, rows, cols, width] for each block.
        """
        x = self.conv_in(noisy)
        skips = []
        for block in self.down_blocks:
            x = block(x, time)
            skips.append(x)
        tokens = self.to_tokens(patchify(x, self.factor))
        return tokens.reshape(len(tokens), -1, self.d_model), tuple(skips)

    def up(self, tokens: jax.Array, skips: tuple[jax.Array, ...], time: jax.Array) -> jax.Array:
        """Tokens [n, p, d], what ``down`` gave, time embedding [n, _] -> [n, rows, cols, z]."""
        n, rows, cols, _ = skips[-1].shape
        grid = tokens.reshape(n, rows // self.factor, cols // self.factor, -1)
        x = unpatchify(self.from_tokens(grid), self.factor)
        for block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            x = block(jnp.concatenate([x, skip], axis=-1), time)
        return self.conv_out(nn.silu(self.norm_out(x)))


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + W silu(time))))``, with layer norms.

    The shortcut is the identity, or a linear map where the width changes.
    """

    width: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """[n, rows, cols, d] and [n, c] -> [n, rows, cols, width], in the dtype of ``x``."""
        dtype, inner = self.param_dtype, (axes.EMBED, axes.CHANNELS)
        hidden = _Conv(self.width, dtype, inner, name="conv_1")(nn.silu(_Norm(dtype)(x)))
        time_cf = self.param(
            "time_cf",
            partitioned(fan_in_normal((0,)), *inner),
            (time.shape[-1], self.width),
            dtype,
        )
        moved = jnp.einsum("nc,cf->nf", nn.silu(time).astype(x.dtype), time_cf.astype(x.dtype))
        hidden = nn.silu(_Norm(dtype)(hidden + moved[:, None, None, :]))
        hidden = _Conv(self.width, dtype, inner, name="conv_2")(hidden)
        if x.shape[-1] != self.width:
            x = _Conv(self.width, dtype, inner, kernel=1, name="shortcut")(x)
        return x + hidden


class _Norm(nn.Module):
    """Layer norm over the last axis with a scale (and no bias)."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_d = self.param(
            "norm_scale_d",
            partitioned(nn.initializers.ones, axes.EMBED),
            (x.shape[-1],),
            self.param_dtype,
        )
        return (layer_normalise(x, _NORM_EPS) * scale_d[None, None, None]).astype(x.dtype)


class _Conv(nn.Module):
    """Convolution with zero padding and a bias; ``names`` are the logical names of (d, f)."""

    features: int
    param_dtype: Any
    names: tuple[str | None, str | None]
    kernel: int = 3
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.zero else fan_in_normal((0, 1, 2))
        conv_ijdf = self.param(
            "conv_ijdf",
            partitioned(init, None, None, *self.names),
            (self.kernel, self.kernel, x.shape[-1], self.features),
            self.param_dtype,
        )
        bias_f = self.param(
            "conv_bias_f",
            partitioned(nn.initializers.zeros, self.names[1]),
            (self.features,),
            self.param_dtype,
        )
        return convolve(x, conv_ijdf) + bias_f[None, None, None].astype(x.dtype)
