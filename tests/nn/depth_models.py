"""Small blocks and decoders whose tokens skip blocks, and batches for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

import moejax.models  # noqa: F401  the blocks are registered
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.moe import BalanceConfig
from moejax.config.schema import DecoderConfig
from moejax.nn.block import make_block
from moejax.nn.context import Context
from moejax.nn.layers import modality_layout_of
from moejax.ops.attention import multimodal_mask

ROWS, LENGTH, D = 2, 12, 16


def decoder(pattern=("mod",), depth=None, recursion=None, **changes) -> DecoderConfig:
    """With the groups ``model.depth`` and ``model.recursion`` as dicts."""
    recursion = dict(recursion or {})
    recursion["balance"] = BalanceConfig(**recursion.get("balance", {}))
    return DecoderConfig(
        vocab_size=40,
        num_layers=changes.pop("num_layers", len(pattern)),
        d_model=D,
        num_heads=2,
        ffn_hidden=(24,),
        block_pattern=pattern,
        norm_placement="pre",
        depth=DepthConfig(**{"capacity": 0.5, **(depth or {})}),
        recursion=RecursionConfig(**recursion),
        **changes,
    )


def tokens(seed: int = 0, rows: int = ROWS) -> dict:
    rng = np.random.default_rng(seed)
    ids = rng.integers(16, 40, (rows, LENGTH)).astype(np.int32)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[0, 7:] = 2
    batch = {
        "tokens": ids,
        "modality": (ids > 27).astype(np.int32),
        "segments": segments,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)),
        "targets": ids,
        "weights": np.ones((rows, LENGTH), np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def context(config, batch, **changes) -> Context:
    return Context(
        tokens_bt=batch["tokens"],
        positions_bt=batch["positions"],
        modality_bt=batch["modality"],
        valid_bt=batch["segments"] > 0,
        segments_bt=batch["segments"],
        image_id_bt=None,
        mask_bts=multimodal_mask(batch["segments"]),
        layout=modality_layout_of(config, batch["modality"]),
        rng=None,
        train=True,
    ).replace(**changes)


def draw(shapes, seed: int = 1, scale: float = 0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype), meta.unbox(shapes)
    )


class Block:
    """One block of a kind, with random parameters."""

    def __init__(self, config: DecoderConfig, kind: str = "mod", **ctx):
        self.config, self.batch = config, tokens()
        self.module = make_block(config, kind, None)
        self.ctx = context(config, self.batch, **ctx)
        self.x = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, LENGTH, D)), jnp.float32)
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), self.x, {}, {}, self.ctx)
        self.params = draw(shapes["params"])

    def __call__(self, params=None, x=None, ctx=None):
        params = self.params if params is None else params
        x, ctx = self.x if x is None else x, self.ctx if ctx is None else ctx
        return self.module.apply({"params": params}, x, {}, {}, ctx)[0]

    def inner(self, x, ctx, kind="untied"):
        """The block inside, on its own."""
        module = make_block(self.config, kind, None)
        return module.apply({"params": self.params["block"]}, x, {}, {}, ctx)[0]

    def scores(self):
        router = self.params["router"]["own"]["router_dk"]
        logits = np.asarray(self.x, np.float64) @ np.asarray(router, np.float64)
        return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]


def changed(out, x) -> np.ndarray:
    return np.asarray((out != x).any(axis=-1))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the highest, in their order."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    return np.sort(order, axis=-1)


def taken(ctx: Context, index: np.ndarray) -> Context:
    """What a block of these tokens alone is given."""
    few = lambda v: jnp.take_along_axis(v, jnp.asarray(index), axis=1)
    segments = few(ctx.segments_bt)
    image_id = None if ctx.image_id_bt is None else few(ctx.image_id_bt)
    return ctx.replace(
        tokens_bt=few(ctx.tokens_bt),
        positions_bt=few(ctx.positions_bt),
        modality_bt=few(ctx.modality_bt),
        valid_bt=few(ctx.valid_bt),
        segments_bt=segments,
        image_id_bt=image_id,
        mask_bts=multimodal_mask(segments, image_id),
        layout=None,
    )
