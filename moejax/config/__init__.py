"""Experiment configs: typed dataclasses, files, command-line overrides, registries."""

from moejax.config.convert import default_config, freeze, to_dict, to_json
from moejax.config.load import load_config, load_config_dict
from moejax.config.registry import Registry
from moejax.config.schema import Config

__all__ = [
    "Config",
    "Registry",
    "default_config",
    "freeze",
    "load_config",
    "load_config_dict",
    "to_dict",
    "to_json",
]
