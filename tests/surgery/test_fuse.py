"""Chosen experts as one wide MLP: the layer of experts, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.activations import activate
from moejax.experts.mlp import expert_mlp
from moejax.surgery.fuse import fuse_experts

T, D, F, E = 7, 6, 5, 4


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_fused_experts_are_the_layer(activation):
    """Two experts of four, in any order; an id that is none adds nothing."""
    rng = np.random.default_rng(0)
    wide = 2 * F if activation == "swiglu" else F
    wi, wo = rng.normal(size=(E, D, wide)), rng.normal(size=(E, F, D))
    x, wi, wo = (a.astype(np.float32) for a in (rng.normal(size=(T, D)), wi, wo))
    weights = np.float32([0.7, 0.3, 0.9])
    ids = np.int32([3, 1, E])

    @jax.jit
    def both(x, wi, wo, ids, weights):
        each = lambda values: jnp.broadcast_to(values, (T, 3))
        live = expert_mlp(
            x, wi, wo, each(ids), each(weights), activation=activation, dispatch="dense"
        )
        wi_df, wo_fd = fuse_experts(wi, wo, ids, weights, activation)
        return live, activate(x @ wi_df, activation) @ wo_fd

    live, fused = both(x, wi, wo, ids, weights)
    np.testing.assert_allclose(fused, live, atol=1e-5)
