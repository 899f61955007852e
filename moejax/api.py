"""What notebooks use: build, train and load by config or workdir."""

from moejax.config.schema import Config


def build(config: Config):
    """(model, objective) of a config: a Linen module and a function to LossSums."""
    from moejax.models import build_model
    from moejax.objectives import build_objective

    return build_model(config), build_objective(config)
