"""Rows of text and pictures as latents, and a tiny decoder for them."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.params import abstract_params
from moejax.api import build
from moejax.config import load_config
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, PATCH
from moejax.generate.generate import pad_prompts, place_latents

PATCHES, SIZE = 4, 3
# BOS text text BOI 4 patches EOI text EOS | BOS BOI 4 patches EOI text EOS, and padding.
ROW = [BOS, 20, 21, BOI, *[PATCH] * 4, EOI, 22, EOS, BOS, BOI, *[PATCH] * 4, EOI, 23, EOS, 0]
# The first picture is drawn after its text, the second opens its segment; what comes after them.
DRAWN, OPENING = range(4, 8), range(13, 17)
AFTER_DRAWN, AFTER_OPENING = range(8, 11), range(17, 19)
TEXT = (*range(4), *AFTER_DRAWN, 11, 12, *AFTER_OPENING)
TINY = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden": (24,),
    "model.vocab_size": 40,
    "model.kernel_backend": "reference",
    "model.latents.grid": 2,
    "model.latents.channels": SIZE,
    "data.batch_size": 2,
    "data.sequence_length": len(ROW),
}


def make_batch(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.asarray(ROW, np.int32), (2, 1))
    patches, index = tokens == PATCH, np.arange(len(ROW))
    segments = np.where(index < 11, 1, 2) * (index < len(ROW) - 1)
    latents = rng.normal(size=(*tokens.shape, SIZE)) * patches[..., None]
    return {
        "tokens": tokens,
        "modality": patches.astype(np.int32),
        "segments": np.tile(segments.astype(np.int32), (2, 1)),
        "positions": np.tile(np.where(index < 11, index, index - 11).astype(np.int32), (2, 1)),
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.tile(((index != 10) & (index < 19)).astype(np.float32), (2, 1)),
        "image_id": patches * np.where(index < 11, 1, 2).astype(np.int32),
        "latents": latents.astype(np.float32),
    }


class TinyPictures:
    """A tiny config of the name with random parameters, and its compiled functions."""

    def __init__(self, name: str, overrides: dict | None = None):
        self.config = load_config(name, {**TINY, **(overrides or {})})
        self.model, self.objective = build(self.config)
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
            abstract_params(self.model, self.config),
        )
        run = lambda params, batch: self.model.apply({"params": params}, batch)
        self.outputs = jax.jit(run)

        def score(params, batch, of_text, of_pictures):
            out = run(params, batch)
            text = jnp.where(of_text[None, :, None], jnp.sin(out.logits), 0)
            pictures = jnp.where(of_pictures[None, :, None], jnp.sin(out.denoised), 0)
            return text.sum() + pictures.sum()

        self._gradient = jax.jit(jax.grad(score))

    def gradient(self, batch: dict, text=(), pictures=()) -> dict[str, np.ndarray]:
        """By path, of what is said of the tokens of these numbers as text, and as pictures."""
        chosen = (np.isin(np.arange(len(ROW)), of) for of in (text, pictures))
        leaves = jax.tree_util.tree_leaves_with_path(self._gradient(self.params, batch, *chosen))
        return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


def full_batch(rows: list, latents: list, time: float = 0.0) -> dict:
    """Whole sequences without a cache, the last picture of each at ``time``."""
    tokens, lengths = pad_prompts(rows)
    index = np.arange(tokens.shape[1])
    image_id = np.where(tokens == PATCH, np.cumsum(tokens == BOI, axis=1), 0)
    is_last = (image_id == image_id.max(axis=1, keepdims=True)) & (image_id > 0)
    return {
        "tokens": tokens,
        "modality": (tokens == PATCH).astype(np.int32),
        "segments": (index < lengths[:, None]).astype(np.int32),
        "positions": np.tile(index, (len(rows), 1)).astype(np.int32),
        "image_id": image_id.astype(np.int32),
        "latents": place_latents(tokens, latents, latents[0].shape[-1]),
        "times": np.where(is_last, time, 0).astype(np.float32),
    }
