"""Pictures of latents after a prompt: noise in the places of their patches, denoised there."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from moejax.config.diffusion import Diffusion
from moejax.data.vocabulary import PATCH, Vocabulary
from moejax.errors import UserError
from moejax.generate.generate import pad_prompts, place_latents, prefill
from moejax.generate.sampling import row_keys
from moejax.ops.diffusion_times import time_grid
from moejax.ops.samplers import guide, row_noise, sample
from moejax.parallel.mesh import mesh_of

# Latents have unit variance; a data point this far out is an error of the prediction.
_CLIP = 4.0


class Denoising(struct.PyTreeNode):
    """How pictures are denoised.

    Attributes:
      process: "ddpm" or "flow" (moejax.ops.diffusion), that of training.
      steps: of the sampler, evenly spread over the times.
      ancestral: draw new noise at each step, instead of the deterministic sampler.
    """

    process: str = struct.field(pytree_node=False)
    steps: int = struct.field(pytree_node=False, default=50)
    ancestral: bool = struct.field(pytree_node=False, default=False)

    @property
    def diffusion(self) -> Diffusion:
        """The process with all its fields."""
        return Diffusion(self.process)


def check_denoising(denoising: Denoising) -> Denoising:
    """UserError naming the flag for a number of steps that cannot be; returns ``denoising``."""
    if denoising.steps < 1:
        raise UserError(f"--denoise-steps: must be positive, got {denoising.steps}")
    try:
        time_grid(denoising.diffusion, denoising.steps)
    except ValueError as error:
        raise UserError(f"--denoise-steps: {error}") from error
    return denoising


def denoise_pictures(
    model: Any,
    params: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    denoising: Denoising,
    guidance: float = 1.0,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    latents: Sequence[np.ndarray] | None = None,
    unconditional: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, "b p z"]:
    """The patches of one picture after each prompt; compiles once for each shape.

    The keys and values of the prompt are computed once; those of the patches anew at each step,
    over the same places (Transfusion, arXiv 2408.11039, section 3.3).

    Args:
      model: decoder with ``model.config.latents``.
      params: its parameters.
      vocabulary: ids of its tokens.
      prompts: token ids of each row, from BOS up to a BOI.
      denoising: process and steps.
      guidance: weight w of ``uncond + w (cond - uncond)`` on the predictions.
      seed: of all rows; row i gets the noise of ``row_ids[i]``, whatever the other rows are.
      row_ids: by default 0, 1, ...
      latents: clean patches of the earlier pictures of each prompt, [patches, z] in their order.
      unconditional: for guidance, each row's prompt without the condition.
    """
    rows = list(prompts)
    before = list(latents) if latents is not None else None
    branches = 1
    if unconditional is not None:
        branches = 2
        rows = [branch for pair in zip(prompts, unconditional, strict=True) for branch in pair]
        if before is not None:
            before = [branch for row in before for branch in (row, row[:0])]
    tokens, lengths = pad_prompts(rows)
    count = len(prompts)
    with mesh_of(params):
        patches = _denoise(
            model,
            params,
            vocabulary,
            tokens,
            lengths,
            None if before is None else place_latents(tokens, before, model.config.latents.size),
            row_keys(seed, np.arange(count) if row_ids is None else np.asarray(row_ids)),
            guidance,
            denoising,
            branches=branches,
        )
    return np.asarray(patches, np.float32)


@functools.partial(jax.jit, static_argnames=("model", "vocabulary", "branches"))
def _denoise(
    model,
    params,
    vocabulary,
    tokens_bt,
    length_b,
    latents_btz,
    key_b,
    guidance,
    denoising: Denoising,
    *,
    branches: int,
) -> Array:
    latents = model.config.latents
    shape = (latents.tokens_per_image, latents.size)
    capacity = tokens_bt.shape[1]
    _, cache = prefill(model, params, vocabulary, tokens_bt, length_b, capacity, latents_btz)

    def network(x_bpz: Array, time_b: Array) -> Array:
        rows = predict(model, params, cache, jnp.repeat(x_bpz, branches, axis=0), time_b[0])
        return guide(rows[::2], rows[1::2], guidance) if branches == 2 else rows

    return sample(
        denoising.diffusion,
        "ddpm" if denoising.ancestral else "ddim",
        network,
        row_noise(key_b, 0, shape),
        time_grid(denoising.diffusion, denoising.steps),
        key_b,
        clip=_CLIP,
    ).final


def predict(model, params, cache, x_bpz: Array, time: Array) -> Array:
    """The model's prediction for the patches [b, p, z] of a picture after what ``cache`` holds."""
    b, p, _ = x_bpz.shape
    whole = lambda value, dtype=jnp.int32: jnp.full((b, p), value, dtype)
    batch = {
        "tokens": whole(PATCH),
        "modality": whole(model.config.modalities.index("image")),
        "segments": whole(1),
        "positions": cache.position_b[:, None] + jnp.arange(p, dtype=jnp.int32)[None],
        "image_id": whole(1),
        "latents": x_bpz,
        "times": whole(time, jnp.float32),
    }
    return model.apply({"params": params}, batch, train=False, cache=cache.rows).denoised
