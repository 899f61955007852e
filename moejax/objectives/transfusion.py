"""Next text token, and denoising of the pictures between (Transfusion, arXiv 2408.11039)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config.schema import DecoderConfig, TransfusionConfig
from moejax.data.vocabulary import BOI, NUM_SPECIAL
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.objectives.next_token import by_source, token_losses
from moejax.ops import diffusion, diffusion_times
from moejax.ops.pictures import max_pictures, per_token, picture_starts, text_follows


def add_picture_noise(batch: dict, rng: Array, config: TransfusionConfig, patches: int) -> dict:
    """The batch with noisy latents: one time for each picture, in training and in evaluation.

    Args:
      batch: of the next-token objective, with clean ``latents`` [b, t, z] and ``image_id`` [b, t].
      rng: key of the noise and the times.
      config: process and the cap on the time of pictures that come before their text.
      patches: tokens of a picture.

    Returns:
      ``batch`` with ``latents`` noisy, ``times`` [b, t] and ``denoise_target`` [b, t, z] added.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    latents, image_id, process = batch["latents"], batch["image_id"], config.diffusion
    time_rng, noise_rng = jax.random.split(rng)
    b, t = image_id.shape
    start_bi = picture_starts(image_id, max_pictures(t, patches))
    # A picture that opens its segment stands after BOS and BOI; without a text after it, it is one
    # whose caption was left out, which is drawn and not read.
    is_text = (image_id == 0) & (batch["tokens"] >= NUM_SPECIAL)
    first_bt = (batch["positions"] == 2) & text_follows(is_text, batch["segments"])
    first_bi = jnp.take_along_axis(first_bt, jnp.minimum(start_bi, t - 1), axis=1)
    cap_bi = jnp.where(first_bi, config.max_time_image_first, 1.0)
    times_bi = diffusion_times.sample_times(process, time_rng, start_bi.shape, max_time=cap_bi)
    times = per_token(jnp.where(cap_bi > 0, times_bi, 0), image_id)
    noise = jax.random.normal(noise_rng, latents.shape, latents.dtype)
    return {
        **batch,
        "latents": diffusion.add_noise(process, latents, noise, times),
        "times": times,
        "denoise_target": diffusion.target(process, latents, noise, times),
    }


def text_weights(batch: dict, modality: int) -> Float[Array, "b t"]:
    """The weights of the targets that are trained: those of text tokens other than BOI.

    What follows BOI is a picture, and a patch predicts no token (section 3.2 and footnote).
    """
    reads_text = (batch["modality"] == modality) & (batch["tokens"] != BOI)
    return batch["weights"] * reads_text


@OBJECTIVES.register("transfusion")
def transfusion(config: TransfusionConfig, model: DecoderConfig):
    """``text_weight * L_LM + image_weight * L_image``: nats a text token, squared error a number.

    ``L_image`` is the mean of ``(prediction - target)^2`` over the latent numbers of all pictures
    that are not clean, each picture at a time of its own. Logged beside the trained terms
    ``token``, ``image`` (and ``z``): ``text``, ``structure`` and ``text_correct`` as in the
    next-token objective.
    """
    text = model.modalities.index("text")

    def prepare(batch: dict, rng: Array) -> dict:
        return add_picture_noise(batch, rng, config, model.latents.tokens_per_image)

    def loss(outputs, batch: dict, rng=None) -> LossSums:
        del rng
        targets = batch["targets"]
        nll, log_z = token_losses(outputs.logits, targets)
        weights = text_weights(batch, text).astype(nll.dtype)
        correct = (outputs.logits.argmax(axis=-1) == targets).astype(nll.dtype)
        special = targets < NUM_SPECIAL
        error = jnp.square(outputs.denoised - batch["denoise_target"]).mean(axis=-1)
        counted: dict[str, tuple[Array, Array]] = {
            "token": (nll, weights),
            "z": (jnp.square(log_z), weights),
            "structure": (nll, weights * special),
            "text": (nll, weights * ~special),
            "text_correct": (correct, weights * ~special),
            "image": (error, patch_weights(batch).astype(error.dtype)),
            **by_source(batch, nll, weights),
        }
        return LossSums(
            sums={name: (value * weight).sum() for name, (value, weight) in counted.items()},
            weights={name: weight.sum() for name, (_, weight) in counted.items()},
            coefficients=(
                ("token", config.text_weight),
                ("image", config.image_weight),
                ("z", config.z_loss),
            ),
        )

    return Objective(loss, prepare)


def patch_weights(batch: dict) -> Bool[Array, "b t"]:
    """Which patches count: those that are noisy, of rows that are no filler."""
    real = (batch["weights"] > 0).any(axis=1, keepdims=True)
    return (batch["image_id"] > 0) & (batch["times"] > 0) & real
