"""Small inputs of routers: two groups of twelve tokens, six experts, two modalities, padding.

Inputs are NumPy arrays and functions run compiled, one program for each set of options: hundreds
of small tests, each operation by itself, would spend minutes on compiling.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax.routing import RouterInputs


@pytest.fixture(scope="module", autouse=True)
def all_compiles_are_quick(quick_compiles):
    """Of every test here."""


@pytest.fixture(scope="session")
def make_inputs():
    """``make_inputs(seed=0, **fields)``: random logits; the last tokens of group 1 are padding."""

    def make(seed=0, *, s=2, n=12, e=6, padding=3, **fields):
        draw = np.random.default_rng(seed)
        valid = np.ones((s, n), bool)
        valid[-1, n - padding :] = False
        inputs = RouterInputs(
            logits=draw.normal(size=(s, n, e)).astype(np.float32),
            valid=valid,
            modality=draw.integers(0, 2, (s, n), dtype=np.int32),
            token_ids=draw.integers(0, 50, (s, n), dtype=np.int32),
            causal_logits=draw.normal(size=(s, n, e)).astype(np.float32),
            tokens=draw.normal(size=(s, n, 5)).astype(np.float32),
            score_params={"prototype_mde": draw.normal(size=(1, 5, e)).astype(np.float32)},
            num_ffn=e,
            num_modalities=2,
        )
        return dataclasses.replace(inputs, **fields)

    return make


@pytest.fixture(scope="session")
def run():
    """``run(function, *args, **options)``: compiled, with options that are no arrays static."""
    programs = {}

    def call(function, *args, **options):
        arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array | np.ndarray)}
        static = tuple(sorted((k, v) for k, v in options.items() if k not in arrays))
        if (function, static) not in programs:
            programs[function, static] = jax.jit(functools.partial(function, **dict(static)))
        return jax.device_get(programs[function, static](*args, **arrays))

    return call
