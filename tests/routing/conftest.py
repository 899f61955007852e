"""Small inputs of routers: two groups of twelve tokens, six experts, two modalities, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moejax.routing import RouterInputs


@pytest.fixture(scope="session")
def make_inputs():
    """``make_inputs(seed=0, **fields)``: random logits; the last tokens of group 1 are padding."""

    def make(seed=0, *, s=2, n=12, e=6, padding=3, **fields):
        keys = jax.random.split(jax.random.key(seed), 3)
        inputs = RouterInputs(
            logits=jax.random.normal(keys[0], (s, n, e)),
            valid=jnp.ones((s, n), bool).at[-1, n - padding :].set(False),
            modality=jax.random.bernoulli(keys[1], 0.5, (s, n)).astype(jnp.int32),
            token_ids=jax.random.randint(keys[2], (s, n), 0, 50),
            causal_logits=jax.random.normal(keys[1], (s, n, e)),
            num_ffn=e,
            num_modalities=2,
        )
        return dataclasses.replace(inputs, **fields)

    return make
