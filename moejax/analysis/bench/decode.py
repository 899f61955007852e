"""Decoding of one sequence: models whose tokens skip blocks or run them again, beside a dense one.

All have random weights and read the same random tokens. The routers' biases are set such that as
many tokens run each block as in training: a router that has not learned would decide anyhow.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from moejax.analysis.flops import flops_by_modality
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.schema import Config, DataConfig, DecoderConfig
from moejax.generate.cache import KVCache, init_cache, write_rows
from moejax.models.decoder import build_decoder
from moejax.objectives.depth import depth_sums

BASELINE = "dense"
_MOR = DepthConfig(gate="sigmoid", gate_scale=0.1, branch="whole", router_bias=True, eval_room=1.5)
_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One sequence: ``prompt`` tokens read before, ``new`` ones that are timed one by one."""

    width: int
    layers: int
    prompt: int
    new: int


CASES = {
    "tiny": DecodeCase(16, 8, 8, 8),
    "A": DecodeCase(512, 8, 448, 64),
}


def models(case: DecodeCase) -> dict[str, DecoderConfig]:
    """Of as many layers that are run."""
    dense = DecoderConfig(
        vocab_size=512,
        num_layers=case.layers,
        d_model=case.width,
        num_heads=max(1, case.width // 64) * 2,
        ffn_hidden=(3 * case.width,),
        norm_placement="pre",
    )
    ends = {"num_layers": 3, "first_blocks": ("untied",), "last_blocks": ("untied",)}
    steps = RecursionConfig(steps=3, layers=(case.layers - 2) // 3, router="expert")
    mor = dataclasses.replace(
        dense, block_pattern=("recursive",), depth=_MOR, recursion=steps, **ends
    )
    return {
        "dense": dense,
        "mod": dataclasses.replace(
            dense,
            block_pattern=("untied", "mod"),
            depth=DepthConfig(router_bias=True, eval_room=2.0),
        ),
        "mor": mor,
        "mor_sharing": dataclasses.replace(
            mor,
            recursion=dataclasses.replace(steps, share_kv=True),
            depth=dataclasses.replace(_MOR, eval_room=0.0),
        ),
    }


def programs(case: DecodeCase, dtype: str) -> dict[str, tuple[Callable, dict[str, float]]]:
    """``{name: (call without arguments, {"ran", "flops_ratio"})}`` of each model.

    ``ran`` is the share of tokens that ran a block, over blocks (steps) that can be skipped;
    ``flops_ratio`` that of the FLOPs of a token by the formulas, to the dense model's.
    """
    found: dict[str, tuple[Callable, dict[str, float]]] = {}
    dense_flops = _flops(models(case)[BASELINE], case)
    for name, config in models(case).items():
        model = build_decoder(dataclasses.replace(config, dtype=dtype))
        params, ran = _calibrated(model, case)
        call = _program(model, params, case)
        found[name] = call, {"ran": ran, "flops_ratio": _flops(config, case) / dense_flops}
    return found


def _flops(config: DecoderConfig, case: DecodeCase) -> float:
    data = DataConfig(sequence_length=case.prompt + case.new, batch_size=1)
    by_modality = flops_by_modality(Config(model=config, data=data))
    assert by_modality is not None
    return by_modality["text"].forward


def _batch(tokens_bt: jax.Array, start: Any) -> dict[str, jax.Array]:
    shape = tokens_bt.shape
    return {
        "tokens": tokens_bt,
        "modality": jnp.zeros(shape, jnp.int32),
        "segments": jnp.ones(shape, jnp.int32),
        "positions": start + jnp.arange(shape[1], dtype=jnp.int32)[None],
    }


def _tokens(case: DecodeCase) -> jax.Array:
    ids = np.random.default_rng(0).integers(16, 512, (1, case.prompt + case.new))
    return jnp.asarray(ids, jnp.int32)


def _calibrated(model: Any, case: DecodeCase) -> tuple[Any, float]:
    """Random parameters with the biases of the routers set, and the share of tokens that ran."""
    batch = _batch(_tokens(case), 0)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    forward = jax.jit(lambda p: dict(depth_sums(model.apply({"params": p}, batch).aux)))
    flat = jax.tree_util.tree_leaves_with_path(params)
    if not any(path[-1].key == "bias_k" for path, _ in flat):
        return params, 1.0
    odds = lambda share: np.log(share / (1 - share))
    best = (np.inf, params, 1.0)
    for _ in range(_ROUNDS):
        (sums,) = (one["sums"] for one in jax.device_get(forward(params)).values())
        count = np.maximum(sums["count"], 1)
        decided, chosen = (np.clip(sums[key] / count, 0.01, 0.99) for key in ("decided", "chosen"))
        error = float(np.abs(decided - chosen).max())
        if error < best[0]:
            # Of all tokens, not only of those that ran the step before.
            ran = sums["decided"].mean() / (case.prompt + case.new)
            best = (error, params, float(ran))
        # What a layer decides moves those after it: not all the way at once.
        move = 0.5 * (odds(chosen) - odds(decided))
        params = jax.tree_util.tree_map_with_path(functools.partial(_moved, move=move), params)
    return best[1:]


def _moved(path: Any, leaf: jax.Array, *, move: np.ndarray) -> jax.Array:
    """A router's bias, by what its block asks for: [l] of layers, or [1, steps - 1] of steps."""
    if path[-1].key != "bias_k":
        return leaf
    routers = [part.key for part in path if part.key.startswith("router")]
    if routers[0] == "router":
        return leaf + jnp.asarray(move, leaf.dtype)[:, None]
    step = int(routers[0].removeprefix("router_"))
    # All run the first step.
    return leaf if step == 0 else leaf + jnp.asarray(move[:, step - 1], leaf.dtype)[:, None]


def _program(model: Any, params: Any, case: DecodeCase) -> Callable:
    tokens_bt = _tokens(case)
    total = case.prompt + case.new

    @jax.jit
    def prefill(params):
        rows = model.apply({"params": params}, _batch(tokens_bt[:, : case.prompt], 0)).rows
        cache = init_cache(model, params, 1, total)
        return write_rows(cache, rows, jnp.full((1,), case.prompt))

    @jax.jit
    def decode(params, cache: KVCache):
        def one(i, carry):
            cache, _ = carry
            at = case.prompt + i
            token = jax.lax.dynamic_slice_in_dim(tokens_bt, at, 1, axis=1)
            out = model.apply({"params": params}, _batch(token, at), cache=cache.rows)
            return write_rows(cache, out.rows, jnp.ones((1,), jnp.int32)), out.logits[:, 0]

        logits = jnp.zeros((1, model.config.vocab_size))
        return jax.lax.fori_loop(0, case.new, one, (cache, logits))[1]

    cache = prefill(params)
    return lambda: decode(params, cache)
