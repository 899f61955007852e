"""From a config to everything a run needs, with every mistake of the user found on the way."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moejax.analysis.params import abstract_batch
from moejax.config.packages import imported_packages
from moejax.config.schema import Config
from moejax.data.build import build_pipeline
from moejax.errors import UserError
from moejax.host_memory import keep_freed_memory
from moejax.models import build_model
from moejax.objectives import build_objective
from moejax.parallel.mesh import batch_sharding, check_mesh, make_mesh
from moejax.train.compilation import use_compilation_cache
from moejax.train.evaluate import EvalContext, check_evaluators, eval_plans
from moejax.train.state import StateRecipe, TrainState, state_recipe
from moejax.train.step import StepMetrics, make_train_step
from moejax.train.writers import check_writers


@dataclasses.dataclass(frozen=True)
class ModelSetup:
    """A checked model on a mesh; no parameter exists yet.

    Attributes:
      config: the experiment.
      mesh: the device mesh.
      model: Linen module.
      objective: function ``(outputs, batch, rng) -> LossSums``.
      recipe: shapes, shardings, optimizer and initial values of the state.
    """

    config: Config
    mesh: jax.sharding.Mesh
    model: Any
    objective: Callable
    recipe: StateRecipe

    def train_step(self) -> Callable[[TrainState, dict], tuple[TrainState, StepMetrics]]:
        """The jitted step of this experiment (moejax.train.step.make_train_step)."""
        return make_train_step(
            self.model,
            self.objective,
            self.config,
            self.recipe.optimizer,
            self.mesh,
            self.recipe.shardings,
            self.recipe.boxed,
        )

    def eval_context(
        self,
        params: Any,
        pipeline: Any,
        train_pipeline: Any,
        others: Mapping[str, Any] | None = None,
    ) -> EvalContext:
        """What evaluators take, for ``params`` on the data of ``pipeline`` (and of ``others``)."""
        return EvalContext(
            config=self.config,
            model=self.model,
            objective=self.objective,
            params=params,
            pipeline=pipeline,
            train_pipeline=train_pipeline,
            mesh=self.mesh,
            others=others or {},
        )


@dataclasses.dataclass(frozen=True)
class Setup(ModelSetup):
    """A checked experiment, data included; nothing is written.

    Attributes:
      pipeline: training data.
      eval_pipeline: data of ``eval.split``; None when nothing is evaluated.
      eval_others: data of the other splits that ``eval.metrics`` names.
      batch: shapes of a batch.
    """

    pipeline: Any
    eval_pipeline: Any
    eval_others: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]


def configure_jax(config: Config) -> None:
    """Process-wide settings of ``config``; call before anything is computed."""
    if getattr(config.model, "dtype", "") == "float64":
        jax.config.update("jax_enable_x64", True)
    use_compilation_cache(config.train.compilation_cache_dir)
    keep_freed_memory()
    if config.train.profile_steps:
        # Else a program kept from before a change of names comes back with the old ones.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def prepare(config: Config, devices: Sequence[Any] | None = None) -> Setup:
    """Builds data, model, mesh (of ``devices``, default all) and the recipe of the state.

    Raises:
      UserError: whatever in the config, the data or the machine does not fit.
    """
    configure_jax(config)
    check_evaluators(config)
    check_writers(config.log)
    # The mesh before the data: what costs nothing is checked first.
    check_mesh(config, len(jax.devices() if devices is None else devices))
    build_model(config)
    pipeline = open_pipeline(config, "train")
    opened = {"train": pipeline}
    plans = eval_plans(config.eval)
    splits = [config.eval.split, *(plan.split for plan in plans)] if plans else []
    for split in splits:
        if split not in opened:
            opened[split] = open_pipeline(config, split)
    size = config.data.batch_size
    # One row tells the shapes: a host makes no other rows than its own.
    sample = {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        for name, x in pipeline.batch(0, rows=[0]).items()
    }
    setup = prepare_model(config, devices, sample)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(setup.mesh))
        for name, x in sample.items()
    }
    return Setup(
        **vars(setup),
        pipeline=pipeline,
        eval_pipeline=opened[config.eval.split] if plans else None,
        eval_others={split: opened[split] for split in splits},
        batch=batch,
    )


def prepare_model(
    config: Config, devices: Sequence[Any] | None = None, batch: dict[str, Any] | None = None
) -> ModelSetup:
    """The part of :func:`prepare` that needs no data.

    ``batch`` gives the shapes to initialise with; left out, they follow from the config.
    """
    configure_jax(config)
    devices = jax.devices() if devices is None else devices
    check_mesh(config, len(devices))
    _check_kernels(config, devices[0].platform)
    mesh = make_mesh(config.mesh, devices)
    model, objective = build_model(config), build_objective(config)
    recipe = state_recipe(model, config, mesh, batch or abstract_batch(config))
    return ModelSetup(config, mesh, model, objective, recipe)


def _check_kernels(config: Config, platform: str) -> None:
    """UserError if the kernels that the config asks for are those of another platform."""
    backend = getattr(config.model, "kernel_backend", "auto")
    if backend in ("tpu", "gpu") and backend != {"cuda": "gpu"}.get(platform, platform):
        raise UserError(
            f"model.kernel_backend={backend}: the platform of the devices is {platform}; use auto"
        )


def open_pipeline(config: Config, split: str) -> Any:
    """The data of ``split``; pictures go through the frozen image tokenizer of the config."""
    codec: Any = None
    in_sequence = config.data.format == "tokens" and "image" in config.model.modalities
    if in_sequence or config.data.latents:
        from moejax.models.picture_codec import load_picture_codec

        codec = load_picture_codec(config)
    return build_pipeline(config, split, codec=codec)


def surroundings(setup: Setup) -> dict[str, Any]:
    """What config.json records beside the config: what else the numbers of a run depend on."""
    return {
        "data_version": setup.pipeline.version,
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "flax": importlib.metadata.version("flax"),
        "imports": imported_packages(),
        "jax": jax.__version__,
        "moejax": moejax_version(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def moejax_version() -> str:
    try:
        return importlib.metadata.version("moejax")
    except importlib.metadata.PackageNotFoundError:
        # A checkout that is on the path without being installed.
        return "unknown"
