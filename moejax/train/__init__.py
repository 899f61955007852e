"""Training: state, step, loop, checkpoints, evaluators; ``moejax.train(config, workdir)``.

For example::

    config = moejax.load_config("quickstart", {"train.steps": 50})
    values = moejax.train(config, "runs/mine")  # as `moejax train`: the same again goes on with it
    values["eval/image/loss"]

See :func:`moejax.train.loop.train` for what it returns and raises.
"""

import os
import sys
import types

# Importing these registers their evaluators.
from moejax.train import (
    accuracy,
    attention_rank,
    denoising,
    depth,
    fidelity,
    likelihood,
    linear_probe,
    reconstruction,
    retrieval,
    robustness,
    routing,
    sample_grid,
    task_accuracy,
)


class _Callable(types.ModuleType):
    """The package itself can be called: ``moejax.train`` is both a function and a package."""

    def __call__(self, config, workdir: str | os.PathLike) -> dict[str, float]:
        """Trains ``config`` in ``workdir``: :func:`moejax.train.loop.train`."""
        from moejax.train.loop import train

        return train(config, workdir)


sys.modules[__name__].__class__ = _Callable

__all__ = [
    "accuracy",
    "attention_rank",
    "denoising",
    "depth",
    "fidelity",
    "likelihood",
    "linear_probe",
    "reconstruction",
    "retrieval",
    "robustness",
    "routing",
    "sample_grid",
    "task_accuracy",
]
