"""The vision transformer for several tasks: to its routers a picture is of the modality "task".

Mod-Squad (arXiv 2212.08066) and modular vision (arXiv 2306.17165) give each task a router of its
own over experts that all share: ``model.moe.score.per_modality``. Departure: experts are
feed-forward layers, not attention heads too.
"""

import jax
import jax.numpy as jnp

from moejax.config.checks import require
from moejax.config.schema import TaskViTConfig
from moejax.models.registry import MODELS
from moejax.models.vit import ViT
from moejax.nn.block import check_blocks
from moejax.nn.context import Context


class TaskViT(ViT):
    """A :class:`moejax.models.vit.ViT` that reads ``batch["task"]`` [b], 0 where it is absent.

    Its logits are those of all tasks side by side.
    """

    def _context(self, batch: dict, x_btd: jax.Array, **given) -> Context:
        ctx = super()._context(batch, x_btd, **given)
        b, t = x_btd.shape[:2]
        task_b = jnp.asarray(batch.get("task", jnp.zeros(b)), jnp.int32)
        return ctx.replace(modality_bt=jnp.broadcast_to(task_b[:, None], (b, t)))


@MODELS.register("task_vit")
def build_task_vit(config: TaskViTConfig) -> TaskViT:
    check_blocks(config)
    require(
        not config.by_modality,
        "model.untie",
        "tasks share all but routers and classes; leave all False",
    )
    return TaskViT(config)
