"""Objectives: (outputs, batch, rng) -> LossSums."""

from moejax.config.schema import Config
from moejax.objectives import autoencode as _autoencode
from moejax.objectives import classification as _classification
from moejax.objectives import contrastive as _contrastive
from moejax.objectives import diffusion as _diffusion
from moejax.objectives import multitask as _multitask
from moejax.objectives import next_token as _next_token
from moejax.objectives import transfusion as _transfusion
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.objectives.depth import with_depth
from moejax.objectives.routing import with_routing

__all__ = ["OBJECTIVES", "LossSums", "Objective", "build_objective"]


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective`` describes."""
    make = OBJECTIVES.get(config.objective.name, field="objective.name")
    objective = make(config.objective, config.model)
    objective = objective if isinstance(objective, Objective) else Objective(objective)
    return with_depth(with_routing(objective, config.model), config.model)
