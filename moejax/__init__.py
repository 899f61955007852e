"""moejax: sparse multimodal models as configurations of a few shared parts.

The names below are loaded on first use, so that ``import moejax`` is quick.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "UserError": "moejax.errors",
    "build": "moejax.api",
    "compare": "moejax.train.compare",
    "load": "moejax.api",
    "load_config": "moejax.config.load",
}

__all__ = ["__version__", "train", *_EXPORTS]


def __getattr__(name: str):
    if name == "train":
        # A package that can be called: moejax.train(config, workdir).
        return importlib.import_module("moejax.train")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
