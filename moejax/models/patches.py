"""What the models of patches share: a linear map from a patch's numbers, and where patches lie."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.vision import PatchesConfig
from moejax.nn.layers import compute_dtype, fan_in_normal, param_dtype, partitioned
from moejax.ops.positions import grid_positions, sincos_table


class PatchModel(nn.Module):
    """Its methods make parameters of the model itself: call them inside of its compact method."""

    config: PatchesConfig

    def _places(self) -> jax.Array:
        """[p, 2], row and column of each patch of the grid, row by row."""
        return jnp.asarray(grid_positions(*self.config.grid))

    def _project(self, x_bpf: jax.Array) -> jax.Array:
        """The numbers of each patch, whatever their type -> [b, p, d]: linear, with a bias."""
        cfg, dtype, numbers = self.config, compute_dtype(self.config), x_bpf.shape[-1]
        weight = partitioned(fan_in_normal((0,)), None, axes.EMBED)
        patch_fd = self.param("patch_fd", weight, (numbers, cfg.d_model), param_dtype(cfg))
        zeros = partitioned(nn.initializers.zeros, axes.EMBED)
        bias_d = self.param("patch_bias_d", zeros, (cfg.d_model,), param_dtype(cfg))
        x_bpd = jnp.einsum("bpf,fd->bpd", x_bpf.astype(dtype), patch_fd.astype(dtype))
        return x_bpd + bias_d.astype(dtype)[None, None]

    def _table(self, name: str, rows: int) -> jax.Array:
        """A parameter of learned vectors [rows, d], from N(0, 0.02)."""
        drawn = partitioned(nn.initializers.normal(0.02), None, axes.EMBED)
        return self.param(name, drawn, (rows, self.config.d_model), param_dtype(self.config))

    def _place_vectors(self) -> jax.Array | None:
        """What is added to the patches of the grid [p, d]; None where they are rotated instead."""
        cfg, dtype = self.config, compute_dtype(self.config)
        if cfg.positions == "learned":
            return self._table("position_pd", cfg.num_patches).astype(dtype)
        if cfg.positions == "sincos":
            return jnp.asarray(sincos_table(grid_positions(*cfg.grid), cfg.d_model), dtype)
        return None
