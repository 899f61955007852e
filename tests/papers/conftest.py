"""Paper configs made tiny, with every mechanism left as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.params import abstract_params
from moejax.config import load_config
from moejax.config.schema import DecoderConfig
from moejax.nn.context import Context
from moejax.nn.moe import MoE

TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "model.vocab_size": 40,
    "model.kernel_backend": "reference",
    "data.sequence_length": 12,
    "data.batch_size": 2,
}
ROWS, LENGTH, WIDTH, HIDDEN = 2, 12, TINY["model.d_model"], 16


@pytest.fixture
def tiny() -> dict:
    """Overrides that make a decoder's config tiny."""
    return dict(TINY)


@pytest.fixture
def drawn():
    """``drawn(model, config, seed)``: random parameters without a compiled initialisation."""

    def draw(model, config, seed: int = 1):
        return _draw(abstract_params(model, config), seed)

    return draw


def _draw(shapes, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture
def tiny_batch():
    """``tiny_batch(modality)``: two rows of 12 tokens with the given modality ids [2, 12]."""

    def make(modality) -> dict:
        tokens = np.random.default_rng(0).integers(16, 40, (ROWS, LENGTH)).astype(np.int32)
        return {
            "tokens": tokens,
            "modality": np.broadcast_to(np.asarray(modality, np.int32), (ROWS, LENGTH)),
            "segments": np.ones((ROWS, LENGTH), np.int32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
        }

    return make


class ExpertLayer:
    """The layer of experts of a config by itself, on tokens [2, 12, 16].

    Attributes:
      config: of the model.
      params: random parameters, ``{"experts": {...}, "router": {...}, ...}``.
    """

    def __init__(self, config: DecoderConfig):
        self.config = config
        self._module = MoE(config)
        x = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)
        init = lambda key, x: self._module.init(key, x, {}, self._context())["params"]
        boxed = jax.eval_shape(init, jax.random.key(0), x)
        self.params = _draw(meta.unbox(boxed), 1)
        self._apply = jax.jit(
            lambda params, x, modality, given, train: self.traced(
                params, x, modality, train=train, **given
            ),
            static_argnames="train",
        )

    def __call__(self, x, modality=0, *, params=None, train=False, **given):
        """(output, aux of the router) as numpy; ``aux["expert_ids"]``, ``["weights"]``: [2, 12, k].

        ``given`` are ``rng``, ``step`` and ``carry``, which are None, and ``noise`` [2, 16], zeros.
        """
        params = self.params if params is None else params
        return jax.device_get(self._apply(params, x, modality, given, train=train))

    def gradient(self, params, x, modality=0, *, of=slice(None)):
        """The gradient of the sum of squares of the outputs ``[of]``, by parameter, as numpy."""

        @jax.jit
        def score(params):
            return (self.traced(params, x, modality)[0][of] ** 2).sum()

        return jax.device_get(jax.jit(jax.grad(score))(params))

    def traced(self, params, x, modality=0, *, train=False, **given):
        """The same to be differentiated."""
        own = (given.get(name) for name in ("rng", "step", "noise"))
        ctx = self._context(modality, train, *own)
        y, _, aux = self._module.apply({"params": params}, x, given.get("carry") or {}, ctx)
        return y, aux["router"]

    def _context(self, modality=0, train=False, rng=None, step=None, noise=None) -> Context:
        ids = jnp.broadcast_to(jnp.asarray(modality, jnp.int32), (ROWS, LENGTH))
        told = jnp.zeros((ROWS, WIDTH)) if noise is None else noise
        return Context(
            tokens_bt=ids,
            positions_bt=ids,
            modality_bt=ids,
            valid_bt=jnp.ones_like(ids, bool),
            segments_bt=jnp.ones_like(ids),
            image_id_bt=None,
            mask_bts=jnp.ones((ROWS, LENGTH, LENGTH), bool),
            layout=None,
            rng=rng,
            step=step,
            condition_bd=told,
            noise_bd=told,
            train=train,
            record=True,
        )


@pytest.fixture
def experts_tiny(tiny):
    """``experts_tiny("moma")``: overrides that make a config with experts tiny."""

    def overrides(name: str) -> dict:
        moe = load_config(name).model.moe
        shared = moe.shared_hidden * HIDDEN // max(moe.hidden, 1)
        return {**tiny, "model.moe.hidden": HIDDEN, "model.moe.shared_hidden": shared}

    return overrides


@pytest.fixture
def expert_layer(experts_tiny):
    """``expert_layer("moma", {"model.moe.top_k": 1}, router=RouterConfig(...))``: an ExpertLayer.

    The dict overrides the config, keywords replace fields of its ``model.moe``.
    """

    def make(name: str, overrides: dict | None = None, **moe) -> ExpertLayer:
        config = load_config(name, {**experts_tiny(name), **(overrides or {})}).model
        replaced = dataclasses.replace(config.moe, **moe)
        return ExpertLayer(dataclasses.replace(config, moe=replaced))

    return make


@pytest.fixture
def tokens():
    """Random tokens [2, 12, 16]."""
    return jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)


@pytest.fixture
def mixed():
    """Modality ids [2, 12]: text and pictures, eight and sixteen of the 24 tokens."""
    ids = np.ones((ROWS, LENGTH), np.int32)
    ids[0, :6], ids[1, 3:5] = 0, 0
    return ids


@pytest.fixture
def mlp():
    """``mlp(x, wi [d, 2f], wo [f, d])``: one SwiGLU expert, written out."""

    def run(x, wi_df, wo_fd):
        gate, up = jnp.split(x @ wi_df, 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ wo_fd

    return run
