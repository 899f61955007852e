"""Whole models."""

from moejax.config.schema import Config
from moejax.models import autoencoder as _autoencoder
from moejax.models import decoder as _decoder
from moejax.models import dit as _dit
from moejax.models import limoe as _limoe
from moejax.models import task_vit as _task_vit
from moejax.models import two_towers as _two_towers
from moejax.models import vit as _vit
from moejax.models.registry import MODELS
from moejax.nn import depth as _depth
from moejax.nn import recursive as _recursive

__all__ = ["MODELS", "build_model"]


def build_model(config: Config):
    """The Linen module that ``config.model`` describes."""
    return MODELS.get(config.model.name, field="model.name")(config.model)
