"""Pictures of a diffusion model: of classes, of texts, of nothing said (models/dit.py).

For example::

    sampler = load_denoiser("runs/dit_moe")
    pictures = draw_pictures(sampler, [0, 1, 2], seed=1).pictures

A picture depends on its seed, its number and its condition alone, unless experts choose among the
patches of all pictures that are drawn together, as those of configs/papers/diffmoe.py do. Then it
depends on the others of its batch too, and so on ``batch_size``.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moejax.config.checks import require
from moejax.config.diffusion import Diffusion
from moejax.config.schema import Config, DiTConfig
from moejax.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from moejax.data.vocabulary import BOS, EOS, NUM_SPECIAL, PAD
from moejax.errors import UserError
from moejax.generate.sampling import row_keys
from moejax.models.autoencoder import to_uint8
from moejax.models.picture_codec import load_picture_codec
from moejax.ops.diffusion import network_input
from moejax.ops.diffusion_times import time_grid
from moejax.ops.samplers import SAMPLERS, guided, row_noise, sample
from moejax.parallel.mesh import mesh_of

# How far an implied data point may lie from 0: pixels are in [-1, 1], latents have unit variance.
PIXEL_CLIP, LATENT_CLIP = 1.0, 4.0

# What a picture is to show: the number of a class, a text, or nothing (None or "").
Condition = int | str | None


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
      sampler: of moejax.ops.samplers.
      steps: of the sampler.
      spacing: of its times (moejax.ops.diffusion_times.time_grid); "" is the process's own.
      shift: of its times; above 1 it stays longer where there is much noise. 1 for "edm".
      guidance: weight w of ``uncond + w (cond - uncond)``.
      interval: lowest and highest time t (moejax/ops/diffusion.py, whatever the network is told) at
        which guidance works (arXiv 2404.07724); None: all.
    """

    sampler: str = "ddim"
    steps: int = 50
    spacing: str = ""
    shift: float = 1.0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class PictureSampler:
    """A trained diffusion model of pictures.

    Attributes:
      model: Linen model.
      params: its parameters.
      diffusion: the process of its training.
      codec: of latents; None of pixels.
      text_tokenizer: None of models that read no texts.
      drawing: how pictures are drawn unless a call says otherwise.
      batch_size: the most rows at once (the module docstring says what depends on it).
      times: those that the model knows; () is all (moejax/generate/cached_experts.py).
    """

    model: Any
    params: Any
    diffusion: Diffusion
    codec: Any = None
    text_tokenizer: TextTokenizer | None = None
    drawing: Drawing = Drawing()
    batch_size: int = 64
    times: tuple[float, ...] = ()

    @property
    def text_room(self) -> int:
        """The most text tokens that the model reads."""
        return self.model.config.text_length - 2

    def conditions(self, conditions: Sequence[Condition]) -> dict[str, np.ndarray]:
        """The arrays of a batch that say what its pictures show.

        Raises:
          UserError: a class that the model does not have, or a kind of condition.
        """
        cfg = self.model.config
        labels = np.full(len(conditions), cfg.num_classes, np.int32)
        tokens = np.full((len(conditions), cfg.text_length), PAD, np.int32)
        for row, condition in enumerate(conditions):
            if condition is None or condition == "":
                continue
            if isinstance(condition, str):
                tokens[row] = self._encode(condition)
                continue
            if not 0 <= condition < cfg.num_classes:
                raise UserError(
                    f"label {condition}: the model has {cfg.num_classes} classes, from 0 on"
                )
            labels[row] = condition
        return {"labels": labels, **({"tokens": tokens} if cfg.text_length else {})}

    def _encode(self, text: str) -> np.ndarray:
        if self.text_tokenizer is None:
            raise UserError(f"prompt {text!r}: the model reads no texts (model.text_length=0)")
        ids = self.text_tokenizer.encode(text)
        if len(ids) > self.text_room:
            raise UserError(
                f"prompt {text!r}: is {len(ids)} tokens long, but the model reads at most "
                f"{self.text_room}; shorten it"
            )
        row = [BOS, *(NUM_SPECIAL + i for i in ids), EOS]
        return np.pad(np.asarray(row, np.int32), (0, self.text_room + 2 - len(row)))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and what they looked like on the way.

    Attributes:
      pictures: [n, h, w, 3] uint8.
      kept: [k, n, h, w, 3] uint8, the implied pictures at the steps that were asked for.
      times: [k], the times of these steps.
    """

    pictures: UInt8[np.ndarray, "n h w 3"]
    kept: UInt8[np.ndarray, "k n h w 3"]
    times: Float[np.ndarray, " k"]


def load_denoiser(workdir: str | os.PathLike, step: int | None = None) -> PictureSampler:
    """The model of a run at ``step`` (default: the newest checkpoint), ready to draw.

    Raises:
      UserError: there is no such run or checkpoint, or its model draws no pictures.
    """
    from moejax.train.load import load

    return denoiser_of(load(workdir, step))


def draws_pictures(config: Config) -> bool:
    """Whether the model of ``config`` is a diffusion model of whole pictures."""
    return isinstance(config.model, DiTConfig)


def denoiser_of(loaded: Any) -> PictureSampler:
    """The sampler of a ``moejax.train.load.Loaded``."""
    config: Config = loaded.config
    if not draws_pictures(config):
        raise UserError(
            f"model.name={config.model.name}: is no diffusion model of pictures; those are 'dit'"
        )
    model: Any = config.model
    objective: Any = config.objective
    return PictureSampler(
        model=loaded.model,
        params=loaded.params,
        diffusion=objective,
        codec=load_picture_codec(config) if config.data.latents else None,
        text_tokenizer=load_text_tokenizer(config.data.text_tokenizer)
        if model.text_length
        else None,
    )


def check_drawing(drawing: Drawing, diffusion: Diffusion) -> Drawing:
    """UserError naming the flag for what cannot be; returns ``drawing``."""
    SAMPLERS.get(drawing.sampler, field="--sampler")
    require(drawing.steps >= 1, "--denoise-steps", f"must be positive, got {drawing.steps}")
    _check_guidance(drawing.guidance)
    shift = drawing.shift
    require(0 < shift < math.inf, "--shift", f"must be positive and finite, got {shift}")
    require(
        diffusion.process != "edm" or shift == 1,
        "--shift",
        "leave it 1 for 'edm', whose times are noise levels (--spacing)",
    )
    if drawing.interval is not None:
        low, high = drawing.interval
        require(
            0 <= low < high,
            "--guidance-interval",
            f"need 0 <= the lower time < the higher one, got {low} and {high}",
        )
    try:
        time_grid(diffusion, drawing.steps, drawing.spacing, shift)
    except UserError as error:
        raise UserError(f"--spacing: {error}") from error
    except ValueError as error:
        raise UserError(f"--denoise-steps: {error}") from error
    return drawing


def _check_guidance(weight: float) -> None:
    require(0 <= weight < math.inf, "--guidance", f"must be 0 or more, got {weight}")


def draw_pictures(
    sampler: PictureSampler,
    conditions: Sequence[Condition],
    *,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    guidance: Sequence[float] | float | None = None,
    keep: tuple[int, ...] = (),
    fill: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Drawn:
    """One picture for each condition; compiles once for each number of rows.

    Args:
      sampler: from :func:`load_denoiser`.
      conditions: what each is to show.
      seed: picture i begins from the noise of (seed, ``row_ids[i]``), whatever the others are (the
        module docstring says when it also ends like that).
      row_ids: by default 0, 1, ...; equal ones begin from the same noise.
      guidance: its weight, one number or one for each row, instead of that of the sampler.
      keep: steps of which the implied pictures are returned too, from 0.
      fill: fill up fewer rows than ``sampler.batch_size`` too, so that none compile anew.
      progress: called with the number of pictures done since the last call.

    Raises:
      UserError: there are no conditions, or one or a setting means nothing.
    """
    drawing = check_drawing(sampler.drawing, sampler.diffusion)
    times = time_grid(sampler.diffusion, drawing.steps, drawing.spacing, drawing.shift)
    require(
        not sampler.times or {*times[:-1].tolist()} <= {*sampler.times},
        "drawing",
        "has other times than those that experts are cached for; cache them anew",
    )
    count = len(conditions)
    require(
        count > 0, "conditions", "there are none; give one for each picture (None says nothing)"
    )
    given = sampler.conditions(conditions)
    nothing = sampler.conditions([None] * count)
    ids = _each("row_ids", range(count) if row_ids is None else row_ids, count)
    guidance_b = _each("guidance", drawing.guidance if guidance is None else guidance, count)
    for weight in guidance_b:
        _check_guidance(weight)
    plain = bool((guidance_b == 1).all())
    size = sampler.batch_size if fill else min(sampler.batch_size, count)
    pictures, kept = [], []
    for start in range(0, count, size):
        # The last batch is filled up with any rows, of weight 0: experts do not see them.
        numbers = np.arange(start, start + size)
        rows = np.minimum(numbers, count - 1)
        real = {"weights": (numbers < count).astype(np.float32)}
        take = functools.partial(jax.tree.map, lambda values, rows=rows: values[rows])
        with mesh_of(sampler.params):
            found = _draw(
                sampler.model,
                sampler.params,
                take(given) | real,
                take(nothing) | real,
                row_keys(seed, ids[rows]),
                None if plain else jnp.asarray(guidance_b[rows], jnp.float32),
                diffusion=sampler.diffusion,
                # Another weight compiles nothing.
                drawing=dataclasses.replace(drawing, guidance=1.0),
                clip=PIXEL_CLIP if sampler.codec is None else LATENT_CLIP,
                keep=keep,
            )
        own = min(size, count - start)
        pictures.append(_decode(sampler, found.final[:own]))
        kept.append([_decode(sampler, values[:own]) for values in found.kept])
        if progress is not None:
            progress(own)
    strips = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    whole = np.concatenate(pictures)
    empty = np.zeros((0, *whole.shape), np.uint8)
    return Drawn(whole, np.stack(strips) if strips else empty, times[list(keep)])


def _each(name: str, values: Any, count: int) -> np.ndarray:
    """One of the values for each of ``count`` pictures; UserError if there are more or fewer."""
    values = np.asarray(values)
    if values.shape not in ((), (count,)):
        raise UserError(f"{name}: {count} pictures, and {len(values)} of these; give one for each")
    return np.broadcast_to(values, (count,))


@functools.partial(jax.jit, static_argnames=("model", "diffusion", "drawing", "clip", "keep"))
def _draw(
    model,
    params,
    condition: dict,
    no_condition: dict,
    key_b: Array,
    weight_b: Array | None,
    *,
    diffusion: Diffusion,
    drawing: Drawing,
    clip: float,
    keep: tuple[int, ...],
):
    cfg = model.config

    def network(x, time_b, said):
        batch = {"x_t": x, "times": time_b, **said}
        return model.apply({"params": params}, batch, train=False).prediction

    weight = 1.0 if weight_b is None else weight_b
    shape = (cfg.image_size, cfg.image_size, cfg.in_channels)
    steered = guided(
        network, condition, no_condition, weight, interval=_told(diffusion, drawing.interval)
    )
    times = time_grid(diffusion, drawing.steps, drawing.spacing, drawing.shift)
    noise = row_noise(key_b, 0, shape)
    return sample(diffusion, drawing.sampler, steered, noise, times, key_b, clip=clip, keep=keep)


def _told(diffusion: Diffusion, interval: tuple[float, float] | None) -> tuple | None:
    """Times, as the lowest and the highest number by which the network is told of them."""
    if interval is None:
        return None
    times = jnp.asarray(interval, jnp.float32)
    _, told = network_input(diffusion, times, times)
    return told.min(), told.max()


def _decode(sampler: PictureSampler, x_bhwz: Array) -> UInt8[np.ndarray, "n h w 3"]:
    if sampler.codec is None:
        return np.asarray(to_uint8(x_bhwz))
    latents = np.asarray(x_bhwz, np.float32)
    return sampler.codec.decode(latents.reshape(len(latents), -1, latents.shape[-1]))
