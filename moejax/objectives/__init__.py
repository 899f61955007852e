"""Objectives: (outputs, batch, rng) -> LossSums."""

from moejax.config.schema import Config
from moejax.objectives import autoencode as _autoencode
from moejax.objectives import next_token as _next_token
from moejax.objectives.base import OBJECTIVES, LossSums

__all__ = ["OBJECTIVES", "LossSums", "build_objective"]


def build_objective(config: Config):
    """The objective function that ``config.objective`` describes."""
    make = OBJECTIVES.get(config.objective.name, field="objective.name")
    return make(config.objective, config.model)
