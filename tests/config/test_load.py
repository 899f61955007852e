"""Overrides of a config."""

from moejax.config import load_config


def test_the_last_value_of_a_field_counts():
    twice = ["model.ffn_hidden=(32,)", "train.steps=3", "model.ffn_hidden=(64,)", "train.steps=5"]
    config = load_config("quickstart", twice)
    assert config.model.ffn_hidden == (64,) and config.train.steps == 5
