"""Pictures of latents after a prompt: noise in the places of their patches, denoised there."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.config.diffusion import Diffusion
from moejax.data.vocabulary import PATCH, Vocabulary
from moejax.generate.drawing import LATENT_CLIP, Drawing, told_of
from moejax.generate.generate import pad_prompts, place_latents, prefill
from moejax.generate.sampling import row_keys
from moejax.ops.samplers import guided, row_noise, sample
from moejax.parallel.mesh import mesh_of


def denoise_pictures(
    model: Any,
    params: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    diffusion: Diffusion,
    drawing: Drawing,
    guidance: Sequence[float] | None = None,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    latents: Sequence[np.ndarray] | None = None,
    unconditional: Sequence[Sequence[int]] | None = None,
    keep: tuple[int, ...] = (),
) -> Float[np.ndarray, "b k p z"]:
    """The patches of one picture after each prompt; compiles once for each shape.

    They are the last of k; before it come the implied ones at the steps to ``keep``.

    The keys and values of the prompt are computed once; those of the patches anew at each step,
    over the same places (Transfusion, arXiv 2408.11039, section 3.3).

    Args:
      model: decoder with ``model.config.latents``.
      params: its parameters.
      vocabulary: ids of its tokens.
      prompts: token ids of each row, from BOS up to a BOI.
      diffusion: the process of the training.
      drawing: sampler, times and guidance.
      guidance: for each row its weight, instead of that of ``drawing``.
      seed: of all rows; row i gets the noise of ``row_ids[i]``, whatever the other rows are.
      row_ids: by default 0, 1, ...
      latents: clean patches of the earlier pictures of each prompt, [patches, z] in their order.
      unconditional: for guidance, each row's prompt without the condition.
      keep: steps, from 0.
    """
    rows = list(prompts)
    before = list(latents) if latents is not None else None
    weight_b = None
    if unconditional is not None:
        given = drawing.guidance if guidance is None else guidance
        weight_b = jnp.broadcast_to(jnp.asarray(given, jnp.float32), (len(prompts),))
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
            weight_b,
            diffusion=diffusion,
            # Another weight compiles nothing.
            drawing=dataclasses.replace(drawing, guidance=1.0),
            keep=keep,
        )
    return np.asarray(patches, np.float32)


@functools.partial(jax.jit, static_argnames=("model", "vocabulary", "diffusion", "drawing", "keep"))
def _denoise(
    model,
    params,
    vocabulary,
    tokens_bt,
    length_b,
    latents_btz,
    key_b,
    weight_b,
    *,
    diffusion: Diffusion,
    drawing: Drawing,
    keep: tuple[int, ...],
) -> Array:
    latents = model.config.latents
    capacity = tokens_bt.shape[1]
    _, cache = prefill(model, params, vocabulary, tokens_bt, length_b, capacity, latents_btz)

    def network(x_bpz: Array, time_b: Array, told: dict) -> Array:
        # What a row is told is in the cache, with both branches of a row next to each other.
        del told
        return predict(model, params, cache, x_bpz, time_b[0])

    weight = 1.0 if weight_b is None else weight_b
    samples = sample(
        diffusion,
        drawing.sampler,
        guided(network, {}, {}, weight, interval=told_of(diffusion, drawing.interval)),
        row_noise(key_b, 0, (latents.tokens_per_image, latents.size)),
        drawing.times(diffusion),
        key_b,
        clip=LATENT_CLIP,
        keep=keep,
    )
    return jnp.concatenate([samples.kept, samples.final[None]]).swapaxes(0, 1)


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
