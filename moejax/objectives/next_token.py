"""Next-token prediction over interleaved text and image codes (the Chameleon setting)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config.schema import DecoderConfig, NextTokenConfig
from moejax.data.vocabulary import NUM_SPECIAL
from moejax.objectives.base import OBJECTIVES, LossSums


def token_losses(
    logits_btv: Float[Array, "b t v"], targets_bt: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """(cross-entropy in nats, log of the softmax's normaliser) of each token."""
    log_z = jax.nn.logsumexp(logits_btv, axis=-1)
    target = jnp.take_along_axis(logits_btv, targets_bt[..., None], axis=-1)[..., 0]
    return log_z - target, log_z


def by_source(
    batch: dict, nll_bt: Float[Array, "b t"], weights_bt: Float[Array, "b t"]
) -> dict[str, tuple[Array, Array]]:
    """The (values, weights) of each source of a mixture, ``source_0``, ...; {} without a mixture.

    ``batch["sources"]`` [b, sources] f32 marks the source of each row.
    """
    marks = batch.get("sources")
    if marks is None:
        return {}
    return {
        f"source_{index}": (nll_bt, weights_bt * marks[:, index, None])
        for index in range(marks.shape[1])
    }


@OBJECTIVES.register("next_token")
def next_token(config: NextTokenConfig, model: DecoderConfig):
    """Cross-entropy over all targets plus ``z_loss * log^2 Z`` (arXiv 2405.09818).

    Logged beside the trained terms ``token`` and ``z``, in nats a token: one term for each
    modality, of its own targets (captions, image codes); ``structure``, of special targets such
    as BOI, which a position alone gives away; and ``<modality>_correct``, the share of targets
    that have the highest logit. In a mixture also ``source_<i>``, of each source's targets.
    """

    def objective(outputs, batch, rng=None) -> LossSums:
        del rng
        targets, weights = batch["targets"], batch["weights"]
        nll, log_z = token_losses(outputs.logits, targets)
        weights = weights.astype(nll.dtype)
        correct = (outputs.logits.argmax(axis=-1) == targets).astype(nll.dtype)
        special = targets < NUM_SPECIAL
        # The target of token t is token t + 1; a segment's last token has weight 0.
        target_modality = jnp.roll(batch["modality"], -1, axis=1)
        counted = {
            "token": (nll, weights),
            "z": (jnp.square(log_z), weights),
            "structure": (nll, weights * special),
            **by_source(batch, nll, weights),
        }
        for index, name in enumerate(model.modalities):
            here = weights * (~special & (target_modality == index))
            counted[name] = (nll, here)
            counted[f"{name}_correct"] = (correct, here)
        return LossSums(
            sums={name: (value * weight).sum() for name, (value, weight) in counted.items()},
            weights={name: weight.sum() for name, (_, weight) in counted.items()},
            coefficients=(("token", 1.0), ("z", config.z_loss)),
        )

    return objective
