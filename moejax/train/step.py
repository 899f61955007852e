"""One optimizer step: loss, accumulation, guard against non-finite values, moving average."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.parallel.mesh import batch_sharding, replicated
from moejax.train.balance import controlled, make_controller
from moejax.train.freeze import combine, trainable
from moejax.train.optim import Optimizer
from moejax.train.sharing import make_sharing
from moejax.train.state import TrainState


class StepMetrics(flax.struct.PyTreeNode):
    """Sums over one or more steps; add them on the device, divide on the host.

    Attributes:
      losses: LossSums of the objective; zero for a skipped step.
      grad_norm: [] float32, sum of the gradient norms before clipping.
      steps: [] float32, steps that were not skipped.
      learning_rate: [] float32, of the last step.
      skipped: [] int32, skipped steps since the start of the run.
      skipped_in_row: [] int32, skipped steps since the last good one.
    """

    losses: Any
    grad_norm: jax.Array
    steps: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array

    def __add__(self, later: "StepMetrics") -> "StepMetrics":
        return later.replace(
            losses=self.losses + later.losses,
            grad_norm=self.grad_norm + later.grad_norm,
            steps=self.steps + later.steps,
        )


def make_loss(model, objective, accumulation_steps: int, mesh: jax.sharding.Mesh) -> Callable:
    """``loss(params, batch, key, step) -> (scalar, LossSums)`` of one whole batch.

    With accumulation the scalar is formed once, from the sums of all microbatches, and only then
    differentiated: equal to the big batch for any loss that is a ratio of sums, also when the
    microbatches hold different numbers of targets.
    """
    # Models whose layers do not change in the course of training need not take it.
    takes_step = "step" in inspect.signature(type(model).__call__).parameters

    def sums(params, batch, key, step):
        model_key, objective_key, batch_key = jax.random.split(key, 3)
        batch = objective.prepare(batch, batch_key)
        options = {"train": True, "rngs": {"dropout": model_key}}
        if takes_step:
            options["step"] = step
        outputs = model.apply({"params": params}, batch, **options)
        # Named for the profiler; the parts of the model are named by their modules.
        with jax.named_scope("objective"):
            return objective(outputs, batch, objective_key)

    def loss(params, batch, key, step):
        if accumulation_steps == 1:
            total = sums(params, batch, key, step)
            return total.total(), total
        microbatches = split_batch(batch, accumulation_steps, mesh)
        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(sums, params, first, key, step)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        # Without the checkpoint the scan would keep the activations of every microbatch.
        @jax.checkpoint
        def body(total, inputs):
            index, microbatch = inputs
            return total + sums(params, microbatch, jax.random.fold_in(key, index), step), None

        total, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulation_steps), microbatches))
        return total.total(), total

    return loss


def split_batch(batch: dict, parts: int, mesh: jax.sharding.Mesh) -> dict:
    """``[b, ...]`` -> ``[parts, b / parts, ...]`` for every array.

    Part ``i`` takes rows ``i, i + parts, ...``: each device keeps rows that it already holds.
    """
    spec = PartitionSpec(None, *batch_sharding(mesh).spec)

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def make_train_step(
    model,
    objective,
    config,
    optimizer: Optimizer,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    boxed: Any,
) -> Callable[[TrainState, dict], tuple[TrainState, StepMetrics]]:
    """The jitted ``step(state, batch) -> (state, metrics)``; ``state`` is donated.

    A step whose loss or gradient norm is not finite changes nothing but ``step``, ``skipped`` and
    ``skipped_in_row``; the schedule then does not advance either. What ``optim.freeze`` names is
    neither differentiated nor changed (moejax.train.freeze). Biases of routers are moved by their
    controller, from the counts of the whole batch (moejax.train.balance); experts are mixed with
    each other last (moejax.train.sharing). ``boxed`` are the parameters' shapes, boxed with the
    logical names of their axes.
    """
    loss = make_loss(model, objective, config.optim.accumulation_steps, mesh)
    control = make_controller(config)
    share = make_sharing(config, boxed)
    ema_decay = config.optim.ema_decay
    frozen = optimizer.frozen

    def step(state: TrainState, batch: dict) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss_of(free):
            return loss(combine(frozen, state.params, free), batch, key, state.step)

        free = trainable(frozen, state.params)
        (value, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(free)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.transform.update(grads, state.opt_state, free)
            params = combine(frozen, state.params, optax.apply_updates(free, updates))
            params = share(control(params, sums.statistics), state.step - state.skipped)
            updated = state.replace(params=params, opt_state=opt_state)
            if ema_decay > 0:
                applied = state.step - state.skipped
                average = moving_average(state.ema, params, ema_decay, applied)
                updated = updated.replace(
                    ema=controlled(params, combine(frozen, state.ema, average))
                )
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)
        new_state = kept.replace(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(good, 0, 1),
            skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
        )
        metrics = StepMetrics(
            losses=jax.tree.map(lambda x: jnp.where(good, x, 0), sums),
            grad_norm=jnp.where(good, grad_norm, 0).astype(jnp.float32),
            steps=good.astype(jnp.float32),
            learning_rate=optimizer.schedule(state.step - state.skipped),
            skipped=new_state.skipped,
            skipped_in_row=new_state.skipped_in_row,
        )
        return new_state, metrics

    # Metrics are whole on every device: each host reads them.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def moving_average(ema: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """``d * ema + (1 - d) * params`` with ``d = min(decay, (1 + n) / (10 + n))``.

    The ramp over the number of updates ``n`` made before lets the average of a short run leave the
    initial values behind (as in TensorFlow's ExponentialMovingAverage).
    """
    count = updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda old, new: (d * old + (1 - d) * new).astype(old.dtype), ema, params)
