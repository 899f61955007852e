"""What notebooks use, beside ``moejax.load_config`` and ``moejax.train``."""

from moejax.config.schema import Config
from moejax.models import build_model
from moejax.objectives import build_objective
from moejax.train.load import Loaded, load

__all__ = ["Loaded", "build", "load"]


def build(config: Config):
    """(model, objective) of a config: a Linen module, and a function to LossSums."""
    return build_model(config), build_objective(config)
