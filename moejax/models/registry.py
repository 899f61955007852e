"""Models by the name that ``config.model.name`` gives."""

from moejax.config.registry import Registry

# name -> function(config.model) -> Linen module
MODELS: Registry = Registry("model")
