"""What notebooks use: ``moejax.load_config``, ``build``, ``train``, ``load`` and ``compare``.

For example::

    config = moejax.load_config("quickstart", {"train.steps": 50})
    moejax.train(config, "runs/mine")
    run = moejax.load("runs/mine")
    run.evaluate("test")

``moejax.generate.api`` samples, ``moejax.data.sources.open_source`` opens records.
"""

from moejax.config.schema import Config
from moejax.models import build_model
from moejax.objectives import build_objective
from moejax.train.load import Loaded, load

__all__ = ["Loaded", "build", "load"]


def build(config: Config):
    """(model, objective) of a config: a Linen module, and a function to LossSums.

    For example::

        model, objective = moejax.build(moejax.load_config("quickstart"))
        params = flax.core.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
        outputs = jax.jit(model.apply)({"params": params}, batch)
        losses = objective(outputs, batch, jax.random.key(1))
        losses.total(), losses.means()

    ``batch`` is a dict of arrays as pipelines make them (moejax.data.pipeline). A fresh model's
    parameters come boxed with the logical names of their axes, hence the ``unbox``.

    Raises:
      UserError: a model, block or objective that is not registered.
    """
    return build_model(config), build_objective(config)
