"""Training: state, step, loop, checkpoints, evaluators; ``moejax.train(config, workdir)``."""

import os
import sys
import types

# Importing these registers their evaluators.
from moejax.train import likelihood, reconstruction


class _Callable(types.ModuleType):
    """The package itself can be called: ``moejax.train`` is both a function and a package."""

    def __call__(self, config, workdir: str | os.PathLike) -> dict[str, float]:
        from moejax.train.loop import train

        return train(config, workdir)


sys.modules[__name__].__class__ = _Callable

__all__ = ["likelihood", "reconstruction"]
