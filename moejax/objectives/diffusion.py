"""Denoising of pictures, or of their latents: diffusion and rectified flow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config.checks import require
from moejax.config.diffusion import DiffusionConfig
from moejax.config.vision import AugmentConfig
from moejax.data.vocabulary import PAD
from moejax.models.autoencoder import to_signed
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.objectives.classification import augmented
from moejax.ops import diffusion
from moejax.ops.diffusion_times import quantile_times

# Parts of the times by which the loss is logged, each with as many draws.
QUARTERS = 4


def clean_pictures(batch: dict) -> Float[Array, "b h w z"]:
    """What is noised: ``latents`` [b, h, w, z] where there are some, else ``images`` in [-1, 1]."""
    if "latents" in batch:
        return jnp.asarray(batch["latents"], jnp.float32)
    return to_signed(batch["images"])


def noisy_batch(
    batch: dict,
    config: DiffusionConfig,
    num_classes: int,
    x0: Float[Array, "b h w z"],
    eps: Float[Array, "b h w z"],
    times: Float[Array, " b"],
    dropped: Bool[Array, " b"] | None = None,
    dropped_texts: Bool[Array, " b"] | None = None,
) -> dict:
    """The batch that the model sees.

    Args:
      batch: with ``labels`` [b], negative where there is none, unless ``num_classes`` is 0; with
        ``tokens`` [b, t] where pictures have texts.
      config: the process.
      num_classes: number of the null class, that of pictures without a label.
      x0: the data.
      eps: standard normal noise.
      times: of moejax.ops.diffusion.
      dropped: rows that lose their label.
      dropped_texts: rows that lose their text; by default the same.

    Returns:
      ``batch`` without its pictures, with ``x_t`` [b, h, w, z] and ``times`` [b] as the network
      reads them (:func:`~moejax.ops.diffusion.network_input`), ``labels`` [b] in 0..num_classes,
      and texts that are lost all padding.
    """
    kept = {name: value for name, value in batch.items() if name not in ("images", "latents")}
    x_t, told = diffusion.network_input(config, diffusion.add_noise(config, x0, eps, times), times)
    b = len(x0)
    dropped = jnp.zeros(b, bool) if dropped is None else dropped
    labels = jnp.asarray(batch["labels"] if num_classes else jnp.zeros(b), jnp.int32)
    kept["labels"] = jnp.where(dropped | (labels < 0), num_classes, labels)
    if "tokens" in batch:
        dropped = dropped if dropped_texts is None else dropped_texts
        kept["tokens"] = jnp.where(dropped[:, None], PAD, batch["tokens"])
    return {**kept, "x_t": x_t, "times": told}


@OBJECTIVES.register("diffusion")
def diffusion_objective(config: DiffusionConfig, model):
    """Squared error of the prediction, a mean over numbers and pictures (``image``).

    With ``objective.learned_range`` also ``bound``, the bits of the variational bound that train
    the variance (arXiv 2102.09672, section 3.1); both have weight 1. Logged beside them are
    ``quarter_1`` to ``quarter_4``, the squared error by quarters of the drawn times, of the least
    noise first.

    The model reads ``x_t``, ``times`` and ``labels`` (:func:`noisy_batch`); its outputs have
    ``prediction`` [b, h, w, z], or [b, h, w, 2 z] with a learned range, and ``aux``.

    Raises UserError where latents are to be augmented.
    """
    num_classes = getattr(model, "num_classes", 0)

    def prepare(batch: dict, rng: Array) -> dict:
        batch = jax.tree.map(jnp.asarray, batch)
        augment_rng, time_rng, noise_rng, label_rng = jax.random.split(rng, 4)
        require(
            "latents" not in batch or config.augment == AugmentConfig(),
            "objective.augment",
            "is of pictures, and these are latents; leave crop_padding 0, flip 'none' and the "
            "others 0",
        )
        x0 = clean_pictures(augmented(batch, augment_rng, config.augment))
        b = len(x0)
        share = 1 - jax.random.uniform(time_rng, (b,), jnp.float32)
        times = quantile_times(config, share)
        eps = jax.random.normal(noise_rng, x0.shape, x0.dtype)
        dropped = jax.random.bernoulli(label_rng, config.label_dropout, (b,))
        # Of label and text one alone is learned too: samplers give one.
        text_rng = jax.random.fold_in(label_rng, 1) if num_classes else label_rng
        dropped_texts = jax.random.bernoulli(text_rng, config.label_dropout, (b,))
        quarter = jnp.minimum(jnp.int32(share * QUARTERS), QUARTERS - 1)
        own = {"data": x0, "noise": eps, "noise_times": times, "quarter": quarter}
        noisy = noisy_batch(batch, config, num_classes, x0, eps, times, dropped, dropped_texts)
        return {**noisy, **own}

    def loss(outputs, batch: dict, rng=None) -> LossSums:
        del rng
        wide = jnp.promote_types(outputs.prediction.dtype, batch["data"].dtype)
        prediction = outputs.prediction.astype(wide)
        parts = (batch["data"], batch["noise"], batch["noise_times"])
        found = diffusion.losses(config, prediction, *parts)
        error = found.pop("error")
        weights = batch.get("weights", jnp.ones_like(error)).astype(error.dtype)
        terms = {name: (values, weights) for name, values in {"image": error, **found}.items()}
        trained = tuple((name, 1.0) for name in terms)
        for quarter in range(QUARTERS):
            inside = weights * (batch["quarter"] == quarter)
            terms[f"quarter_{quarter + 1}"] = (error, inside)
        return LossSums(
            sums={name: (values * weight).sum() for name, (values, weight) in terms.items()},
            weights={name: weight.sum() for name, (_, weight) in terms.items()},
            coefficients=trained,
        )

    return Objective(loss, prepare)
