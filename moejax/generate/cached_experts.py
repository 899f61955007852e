"""Expert caching: where the noise level alone chooses the experts, a dense model for each level.

A sampler goes down a grid of times that is known beforehand (MoDE, arXiv 2412.12953). For each of
them the chosen experts are made one dense layer (moejax/surgery/fuse.py), so that nothing is routed
while pictures are drawn::

    sampler = cached(load_denoiser("runs/mode"))
    pictures = draw_pictures(sampler, [0, 1, 2], seed=1).pictures

All levels' dense layers are held at once: as many parameters as ``steps`` times ``top_k`` experts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.checks import require
from moejax.config.dit import DiTConfig
from moejax.data.vocabulary import BOS, EOS
from moejax.generate.denoiser import PictureSampler
from moejax.generate.drawing import check_drawing
from moejax.models.dit import DiT, build_dit
from moejax.ops.diffusion import network_input
from moejax.parallel.mesh import mesh_of
from moejax.routing import ROUTERS
from moejax.surgery.fuse import fuse_at

_FLAG = "--cache-experts"
_FFN = jax.tree_util.DictKey("ffn")


@dataclasses.dataclass(frozen=True)
class LevelModel:
    """Dense models that differ in their feed-forward layers alone, one for each noise level.

    Its parameters are ``levels_n`` [n], the numbers that tell the time, and those of ``dense``,
    where each leaf of a feed-forward layer in the stack has n in front of its axes.

    Attributes:
      dense: Linen model of any one level.
    """

    dense: DiT

    @property
    def config(self) -> DiTConfig:
        return self.dense.config

    def apply(self, variables: Mapping[str, Any], batch: Mapping[str, Any], **given: Any) -> Any:
        """As ``dense.apply``, at the level nearest to ``times``, which all rows have in common."""
        params = variables["params"]["dense"]
        level = jnp.abs(variables["params"]["levels_n"] - batch["times"][0]).argmin()
        stack = _change_ffn(lambda leaf_n: leaf_n[level], params["stack"])
        return self.dense.apply({"params": {**params, "stack": stack}}, batch, **given)


def cached(sampler: PictureSampler) -> PictureSampler:
    """``sampler`` with the experts of each time of its ``drawing`` cached; made once, drawn often.

    Raises:
      UserError: there are no experts, or more than the noise level chooses them.
    """
    check_cacheable(sampler.model.config)
    drawing = check_drawing(sampler.drawing, sampler.diffusion)
    # No sampler asks the network about the last time, 0.
    times_n = drawing.times(sampler.diffusion)[:-1]
    _, levels_n = network_input(sampler.diffusion, jnp.asarray(times_n), jnp.asarray(times_n))
    with mesh_of(sampler.params):
        dense, params = _fuse_levels(sampler, levels_n)
    return dataclasses.replace(
        sampler,
        model=LevelModel(dense),
        params={"levels_n": levels_n, "dense": params},
        times=tuple(times_n.tolist()),
    )


def check_cacheable(config: DiTConfig) -> None:
    """UserError unless the noise level alone chooses the experts of a model."""
    moe = config.moe
    require("moe" in config.base_kinds(), _FLAG, "the model has no experts; leave it out")
    alone = "is for experts that the noise level alone chooses"
    seen = moe.score.input
    require(seen == "noise", _FLAG, f"{alone}; here model.moe.score.input={seen}, not noise")
    name = moe.router.name
    require(
        ROUTERS.get(name, field="model.moe.router.name").causal,
        _FLAG,
        f"{alone}; model.moe.router.name={name} compares tokens",
    )
    require(
        moe.capacity == "none" or not moe.eval_capacity_factor,
        _FLAG,
        f"{alone}; model.moe.eval_capacity_factor={moe.eval_capacity_factor:g} drops some of them",
    )


def _fuse_levels(sampler: PictureSampler, levels_n: jax.Array) -> tuple[DiT, Any]:
    """The dense model, and its parameters for all levels as :class:`LevelModel` has them."""
    model, given = sampler.model, _two_pictures(sampler)

    @jax.jit
    def choices(params, level):
        batch = {**given, "times": jnp.full(2, level)}
        return model.apply({"params": params}, batch, record=True).aux

    fused = [
        fuse_at(model.config, sampler.params, jax.device_get(choices(sampler.params, level)))
        for level in levels_n
    ]
    config, params = fused[0]
    stacks = [own["stack"] for _, own in fused]
    stack = _change_ffn(lambda *leaves: jnp.stack(leaves), *stacks)
    return build_dit(config), {**params, "stack": stack}


def _two_pictures(sampler: PictureSampler) -> dict[str, Any]:
    """One of something and one of nothing: were experts to go by that, they would not be alike."""
    cfg = sampler.model.config
    said = sampler.conditions([None, None])
    said["labels"][0] = 0
    if cfg.text_length:
        said["tokens"][0, :2] = BOS, EOS
    shape = (2, cfg.image_size, cfg.image_size, cfg.in_channels)
    return {"x_t": jax.random.normal(jax.random.key(0), shape), **said}


def _change_ffn(change: Callable[..., jax.Array], stack: Any, *others: Any) -> Any:
    """A stack whose feed-forward layers' leaves are ``change`` of theirs in all the stacks."""
    changed = lambda path, leaf, *more: change(leaf, *more) if _FFN in path else leaf
    return jax.tree_util.tree_map_with_path(changed, stack, *others)
