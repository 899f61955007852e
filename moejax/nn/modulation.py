"""What a row is told beside its tokens, and what that does to a block (adaLN-Zero).

A condition is a vector for each row: of how noisy it is, and of what it shows. From it a block
makes a shift, a scale and a gate for each of its branches: ``x + gate f(norm(x) (1 + scale) +
shift)`` (DiT, arXiv 2212.09748, section 3.2). They begin at zero, and so the block as the identity.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.trunk import TrunkConfig
from moejax.nn.layers import param_dtype, partitioned
from moejax.ops.diffusion import timestep_embedding
from moejax.ops.norms import normalise
from moejax.parallel.local import constrain_tokens

TIME_FEATURES = 256


class NoiseEmbedding(nn.Module):
    """Times [b] -> [b, d] float32 or wider: 256 sinusoids of them and an MLP of two matrices.

    ``W_2 silu(W_1 s + b_1) + b_2``, weights from N(0, 0.02) (DiT's code).
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, times_b: jax.Array) -> jax.Array:
        d, dtype = self.config.d_model, param_dtype(self.config)
        drawn, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        wi_fd = self.param("wi_fd", partitioned(drawn, None, axes.EMBED), (TIME_FEATURES, d), dtype)
        wi_bias_d = self.param("wi_bias_d", partitioned(zeros, axes.EMBED), (d,), dtype)
        wo_dd = self.param("wo_dd", partitioned(drawn, axes.EMBED, None), (d, d), dtype)
        wo_bias_d = self.param("wo_bias_d", partitioned(zeros, None), (d,), dtype)
        features_bf = timestep_embedding(times_b, TIME_FEATURES).astype(dtype)
        hidden_bd = nn.silu(jnp.einsum("bf,fd->bd", features_bf, wi_fd) + wi_bias_d[None])
        return jnp.einsum("bz,zd->bd", hidden_bd, wo_dd) + wo_bias_d[None]


class Modulation(nn.Module):
    """``parts`` vectors from the condition: ``W silu(c) + b``, which begins at zero."""

    config: TrunkConfig
    parts: int

    @nn.compact
    def __call__(self, condition_bd: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
        """Each is [b, 1, d], of that dtype."""
        d, wide, zeros = self.config.d_model, param_dtype(self.config), nn.initializers.zeros
        f = self.parts * d
        weight_df = self.param("weight_df", partitioned(zeros, axes.EMBED, axes.MLP), (d, f), wide)
        bias_f = self.param("bias_f", partitioned(zeros, axes.MLP), (f,), wide)
        seen_bd = nn.silu(condition_bd).astype(dtype)
        vectors_bf = jnp.einsum("bd,df->bf", seen_bd, weight_df.astype(dtype))
        vectors_bf = vectors_bf + bias_f.astype(dtype)[None]
        # Tokens are whole along the tensor axis, and so is what they are multiplied with.
        return jnp.split(constrain_tokens(vectors_bf[:, None]), self.parts, axis=-1)


def modulate(
    config: TrunkConfig, x_btd: jax.Array, shift_b1d: jax.Array, scale_b1d: jax.Array
) -> jax.Array:
    """``norm(x) (1 + scale) + shift``, of a norm that has no scale of its own; the dtype of x."""
    normed = normalise(config.norm, x_btd, config.norm_eps)
    wide = lambda vector: vector.astype(normed.dtype)
    return (normed * (1 + wide(scale_b1d)) + wide(shift_b1d)).astype(x_btd.dtype)
