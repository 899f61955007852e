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
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from moejax.config.checks import require
from moejax.config.diffusion import Diffusion
from moejax.config.schema import Config, DiTConfig
from moejax.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from moejax.data.vocabulary import BOS, EOS, NUM_SPECIAL, PAD
from moejax.errors import UserError
from moejax.generate.drawing import (
    LATENT_CLIP,
    PIXEL_CLIP,
    Drawing,
    Drawn,
    check_drawing,
    check_guidance,
    each_of,
    told_of,
)
from moejax.generate.sampling import row_keys
from moejax.models.autoencoder import to_uint8
from moejax.models.picture_codec import load_picture_codec
from moejax.ops.samplers import guided, row_noise, sample
from moejax.parallel.mesh import mesh_of

# What a picture is to show: the number of a class, a text, or nothing (None or "").
Condition = int | str | None


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
    times = drawing.times(sampler.diffusion)
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
    ids = each_of("row_ids", range(count) if row_ids is None else row_ids, count)
    guidance_b = each_of("guidance", drawing.guidance if guidance is None else guidance, count)
    for weight in guidance_b:
        check_guidance(weight)
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
        network, condition, no_condition, weight, interval=told_of(diffusion, drawing.interval)
    )
    times = drawing.times(diffusion)
    noise = row_noise(key_b, 0, shape)
    return sample(diffusion, drawing.sampler, steered, noise, times, key_b, clip=clip, keep=keep)


def _decode(sampler: PictureSampler, x_bhwz: Array) -> UInt8[np.ndarray, "n h w 3"]:
    if sampler.codec is None:
        return np.asarray(to_uint8(x_bhwz))
    latents = np.asarray(x_bhwz, np.float32)
    return sampler.codec.decode(latents.reshape(len(latents), -1, latents.shape[-1]))
