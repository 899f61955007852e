"""The state of a training run: one pytree, made under jit with its shardings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta

from moejax.parallel.rules import state_shardings
from moejax.train.optim import Optimizer, make_optimizer


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes.

    Attributes:
      step: [] int32, steps done, skipped ones included; the batch of a step is a function of it.
      params: the parameters, those that no gradient moves among them (biases of routers).
      opt_state: the state of the optax transform.
      ema: moving average of the parameters, or ``{}`` when ``optim.ema_decay`` is 0.
      rng: key data; the key of a step is this one with the step folded in, so it never changes.
      skipped: [] int32, steps left out because their loss or gradient was not finite.
      skipped_in_row: [] int32, those of them since the last good step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array

    def eval_params(self) -> Any:
        """The parameters to evaluate and sample with: the moving average where one is kept."""
        return self.ema if self.ema else self.params


class StateRecipe(NamedTuple):
    """How to make the state: nothing is allocated before ``create``.

    Attributes:
      optimizer: the optax transform and its schedule.
      abstract: TrainState of ShapeDtypeStructs, with shardings.
      boxed: the parameters as ShapeDtypeStructs, boxed with the logical names of their axes.
      shardings: TrainState of NamedShardings.
      create: ``create(edit, kept, spent)`` returns the initial TrainState. Without arguments the
        parameters are drawn; else they are ``edit(drawn, kept, spent)``, traced by jit, and what
        it does not read is never drawn. The buffers of ``spent`` are given away: values that are
        taken over as they are belong there, so that they are in memory once.
    """

    optimizer: Optimizer
    abstract: TrainState
    shardings: TrainState
    boxed: Any
    create: Callable[..., TrainState]


def state_recipe(model, config, mesh: jax.sharding.Mesh, sample_batch: dict) -> StateRecipe:
    """Works out shapes, optimizer and shardings of the state by shape evaluation.

    Args:
      model: Linen module, called as ``model(batch, train=False)``.
      config: moejax.config.Config.
      mesh: from :func:`moejax.parallel.mesh.make_mesh`.
      sample_batch: the shapes and types of a training batch (arrays or ShapeDtypeStructs).
    """

    # Jitted so that it is traced once for the three uses below.
    @jax.jit
    def init_params(key: jax.Array):
        batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in sample_batch.items()}
        # Parameters come out boxed with the logical names of their axes.
        variables = model.init({"params": key, "dropout": key}, batch, train=False)
        return variables["params"]

    def init_state(edit: Callable | None = None, kept: Any = None, spent: Any = None) -> TrainState:
        key = jax.random.key(config.train.seed)
        params = init_params(jax.random.fold_in(key, 0))
        if edit is not None:
            params = meta.replace_boxed(params, edit(meta.unbox(params), kept, spent))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            # The boxes are pytree nodes, so moments inherit the names of their parameter.
            opt_state=optimizer.transform.init(params),
            ema=params if config.optim.ema_decay > 0 else {},
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
            skipped=zero,
            skipped_in_row=zero,
        )

    # By its shape: the devices of the mesh may be there to compile for alone.
    any_key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        boxed_params = jax.eval_shape(init_params, any_key)
        optimizer = make_optimizer(config, boxed_params)
        boxed = jax.eval_shape(init_state)
    shardings = state_shardings(mesh, boxed)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        meta.unbox(boxed),
        shardings,
    )

    def create(edit: Callable | None = None, kept: Any = None, spent: Any = None) -> TrainState:
        make = jax.jit(
            lambda kept, spent: meta.unbox(init_state(edit, kept, spent)),
            out_shardings=shardings,
            donate_argnums=1,
        )
        with jax.set_mesh(mesh):
            return make(kept, spent)

    return StateRecipe(optimizer, abstract, shardings, boxed_params, create)


def create_state(model, config, mesh, sample_batch: dict) -> tuple[TrainState, TrainState]:
    """The initial (state, shardings) of a run; see :func:`state_recipe`."""
    recipe = state_recipe(model, config, mesh, sample_batch)
    return recipe.create(), recipe.shardings
