"""Sampling by captions and pictures: what notebooks and the command line use.

For example::

    sampler = load_sampler("runs/quickstart")
    pictures = sample_images(sampler, ["red apple", "sleepy cat"], seed=1)
    captions = caption_images(sampler, pictures)
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moejax.config.checks import require
from moejax.config.diffusion import Diffusion
from moejax.config.schema import Config
from moejax.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from moejax.data.token_pipeline import make_vocabulary
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, PATCH, Vocabulary
from moejax.errors import UserError
from moejax.generate.denoise import denoise_pictures
from moejax.generate.drawing import Drawing, Drawn, check_drawing, check_guidance, each_of
from moejax.generate.generate import generate
from moejax.generate.grammar import IMAGE_ONLY, TEXT_ONLY, Grammar
from moejax.generate.sampling import Sampling, check_sampling
from moejax.models.picture_codec import load_picture_codec

# A part of an interleaved sequence: text, or a picture [h, w, 3] uint8.
Part = str | np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A trained decoder with its tokenizers.

    Attributes:
      model: Linen decoder.
      params: its parameters.
      vocabulary: ids of its tokens.
      text_tokenizer: text to ids and back.
      image_codec: pictures to codes and back, or to patches of latents.
      sequence_length: the longest sequence that it was trained on.
      diffusion: the process of pictures that are latents; None for pictures of codes.
      drawing: how they are drawn unless a call says otherwise.
      batch_size: the most rows sampled at once; results do not depend on it.
    """

    model: Any
    params: Any
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    image_codec: Any
    sequence_length: int
    diffusion: Diffusion | None = None
    drawing: Drawing = Drawing()
    batch_size: int = 16

    @property
    def text_room(self) -> int:
        """The most text tokens that fit beside one image."""
        return self.sequence_length - self.vocabulary.codes_per_image - 4

    def encode_text(self, text: str) -> list[int]:
        """Vocabulary ids of ``text``; UserError if it does not fit beside an image."""
        ids = self.vocabulary.text_ids(self.text_tokenizer.encode(text)).tolist()
        if len(ids) > self.text_room:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise UserError(
                f"prompt {shown!r}: is {len(ids)} tokens long, but at most {self.text_room} fit "
                f"beside an image in data.sequence_length={self.sequence_length}; shorten it"
            )
        return ids

    def encode_images(
        self, images: UInt8[np.ndarray, "n h w 3"]
    ) -> tuple[list[list[int]], list[np.ndarray] | None]:
        """For each picture: BOI, its tokens, EOI; and its patches of latents where it has them."""
        codes = self.image_codec.encode(np.asarray(images))
        if self.diffusion is None:
            rows = self.vocabulary.image_ids(codes).tolist()
            return [[BOI, *row, EOI] for row in rows], None
        return [[BOI, *[PATCH] * len(row), EOI] for row in codes], list(codes)

    def decode_text(self, tokens) -> str:
        """The text of the text tokens among ``tokens``."""
        return self.text_tokenizer.decode(self.vocabulary.to_text_ids(tokens).tolist()).strip()

    def decode_images(self, rows) -> UInt8[np.ndarray, "n h w 3"]:
        """Of rows that hold one image each."""
        codes = [self.vocabulary.to_image_codes(row) for row in rows]
        shape = (len(codes), self.vocabulary.codes_per_image)
        return self.image_codec.decode(np.asarray(codes, np.int32).reshape(shape))


def load_sampler(workdir: str | os.PathLike, step: int | None = None) -> Sampler:
    """The model of a run at ``step`` (default: the newest checkpoint), ready to sample from.

    Raises:
      UserError: there is no such run or checkpoint, or its model does not write sequences.
    """
    from moejax.train.load import load

    return sampler_of(load(workdir, step))


def sampler_of(loaded: Any) -> Sampler:
    """The sampler of a ``moejax.train.load.Loaded``."""
    config: Config = loaded.config
    check_can_sample(config)
    codec = load_picture_codec(config)
    tokenizer = load_text_tokenizer(config.data.text_tokenizer)
    return Sampler(
        model=loaded.model,
        params=loaded.params,
        vocabulary=make_vocabulary(config, tokenizer.size, codec),
        text_tokenizer=tokenizer,
        image_codec=codec,
        sequence_length=config.data.sequence_length,
        diffusion=Diffusion(config.objective.process) if codec.num_codes == 0 else None,
    )


def _skips_tokens(model: Any) -> bool:
    return "mod" in model.base_kinds() or (
        "recursive" in model.base_kinds() and model.recursion.router == "expert"
    )


def check_can_sample(config: Config) -> None:
    """UserError unless the model of ``config`` writes sequences of text and image tokens."""
    if config.data.format != "tokens":
        raise UserError(
            f"model.name={config.model.name}: cannot be sampled from; sample needs a model of "
            "sequences (data.format=tokens)"
        )
    depth = getattr(config.model, "depth", None)
    if depth is not None and depth.causal_rule == "none" and _skips_tokens(config.model):
        raise UserError(
            "model.depth.causal_rule='none': sees later tokens, which are not written yet; sample "
            "needs 'router', 'predictor' or 'threshold'"
        )
    if "image" not in config.model.modalities:
        raise UserError(f"model.modalities={config.model.modalities}: sample needs 'image'")


def sample_images(
    sampler: Sampler,
    captions: Sequence[str],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """One picture for each caption; "" is no caption (unconditional).

    Args:
      sampler: from :func:`load_sampler`.
      captions: the texts; repeat one for several pictures of it.
      sampling: temperature, filters and guidance; guidance costs twice the time. Pictures that are
        latents have the guidance of ``sampler.drawing`` without it.
      seed: picture i depends on (seed, i, caption i) alone.
      progress: called with the number of pictures done since the last call.

    Raises:
      UserError: a caption that is too long, or a setting that means nothing.
    """
    if sampler.diffusion is not None:
        weight = None if sampling is None else float(check_sampling(sampling).guidance)
        given = {"guidance": weight, "seed": seed, "progress": progress}
        return draw_captions(sampler, captions, **given).pictures
    sampling = check_sampling(sampling or Sampling())
    prompts = [[BOS, *sampler.encode_text(caption), BOI] for caption in captions]
    guided = bool(sampling.guidance != 1) and any(captions)
    rows = _in_batches(
        sampler,
        prompts,
        grammar=IMAGE_ONLY,
        max_new_tokens=sampler.vocabulary.codes_per_image + 2,
        sampling=sampling,
        seed=seed,
        unconditional=[BOS, BOI] if guided else None,
        progress=progress,
    )
    return sampler.decode_images(rows)


def caption_images(
    sampler: Sampler,
    images: Sequence[UInt8[np.ndarray, "... h w 3"]] | UInt8[np.ndarray, "n ... h w 3"],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    max_text_tokens: int = 48,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """A caption for each picture, of at least one and at most ``max_text_tokens`` tokens.

    One of ``images`` may be a clip, [frames, h, w, 3]. ``sampling.guidance`` has no effect: models
    are not trained on captions without a picture. The other arguments are those of
    :func:`sample_images`.

    Raises:
      UserError: a clip that leaves no room for a caption, or a setting that means nothing.
    """
    sampling = check_sampling(sampling or Sampling())
    if not len(images):
        return []
    clips = [np.reshape(image, (-1, *image.shape[-3:])) for image in images]
    pictures, latents = sampler.encode_images(np.concatenate(clips))
    ends = np.cumsum([len(clip) for clip in clips])
    spans = [slice(end - len(clip), end) for clip, end in zip(clips, ends, strict=True)]
    prompts = [[BOS, *itertools.chain(*pictures[span])] for span in spans]
    if latents is not None:
        latents = [np.concatenate(latents[span]) for span in spans]
    longest = max(map(len, prompts))
    limit = min(max_text_tokens, sampler.sequence_length - longest - 1)
    if limit < 1:
        raise UserError(
            f"prompt: is {longest} tokens long, which leaves no room for a caption in "
            f"data.sequence_length={sampler.sequence_length}; give fewer frames"
        )
    rows = _in_batches(
        sampler,
        prompts,
        grammar=TEXT_ONLY,
        max_new_tokens=limit + 1,
        sampling=sampling,
        seed=seed,
        unconditional=None,
        of_each={} if latents is None else {"latents": latents},
        progress=progress,
    )
    # A row that did not come to its EOS has a token in its place.
    return [sampler.decode_text(row[:limit]) for row in rows]


def draw_captions(
    sampler: Sampler,
    captions: Sequence[str],
    *,
    guidance: Sequence[float] | float | None = None,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    keep: tuple[int, ...] = (),
    progress: Callable[[int], Any] | None = None,
) -> Drawn:
    """One picture that is latents for each caption, "" being none, and what it was on the way.

    Args:
      sampler: of a model whose pictures are latents.
      captions: the texts.
      guidance: its weight, one number or one for each row, instead of that of the sampler.
      seed: picture i depends on (seed, ``row_ids[i]``, caption i) alone.
      row_ids: by default 0, 1, ...; equal ones begin from the same noise.
      keep: steps of which the implied pictures are returned too, from 0.
      progress: called with the number of pictures done since the last call.

    Raises:
      UserError: pictures are of codes, a caption is too long, or a setting means nothing.
    """
    require(
        sampler.diffusion is not None,
        "drawing",
        "is for pictures that are latents; those of this model are of codes (sample_images)",
    )
    assert sampler.diffusion is not None
    drawing, count = check_drawing(sampler.drawing, sampler.diffusion), len(captions)
    require(count > 0, "captions", 'there are none; give one for each picture ("" is none)')
    weights = each_of("guidance", drawing.guidance if guidance is None else guidance, count)
    for weight in weights:
        check_guidance(weight)
    guided = bool((weights != 1).any()) and any(captions)
    rows = _in_batches(
        sampler,
        [[BOS, *sampler.encode_text(caption), BOI] for caption in captions],
        run=denoise_pictures,
        diffusion=sampler.diffusion,
        drawing=drawing,
        of_each={"guidance": weights.tolist()},
        row_ids=None if row_ids is None else each_of("row_ids", row_ids, count).tolist(),
        seed=seed,
        unconditional=[BOS, BOI] if guided else None,
        keep=keep,
        progress=progress,
    )
    *kept, pictures = (sampler.image_codec.decode(patches) for patches in np.stack(rows, axis=1))
    empty = np.zeros((0, *pictures.shape), np.uint8)
    times = drawing.times(sampler.diffusion)[list(keep)]
    return Drawn(pictures, np.stack(kept) if kept else empty, times)


def continue_parts(
    sampler: Sampler,
    prompts: Sequence[Sequence[Part]],
    *,
    images: int = 1,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[Part]]:
    """What the model writes after interleaved texts and pictures, up to its EOS.

    Args:
      sampler: from :func:`load_sampler`.
      prompts: each a sequence of texts and pictures [h, w, 3] uint8; may be empty.
      images: the most pictures to write in each row.
      max_new_tokens: by default what ``sequence_length`` leaves after the longest prompt.
      sampling: guidance has no effect here.
      seed: row i depends on (seed, i, prompt i) alone.

    Raises:
      UserError: the prompts and ``max_new_tokens`` are longer than ``sequence_length``.
    """
    sampling = check_sampling(sampling or Sampling())
    prompts_of_parts = [_prompt_of(sampler, parts) for parts in prompts]
    rows = [tokens for tokens, _ in prompts_of_parts]
    longest = max(map(len, rows))
    room = sampler.sequence_length - longest
    if room < 1 or (max_new_tokens or 0) > room:
        raise UserError(
            f"prompt: is {longest} tokens long, which leaves {max(room, 0)} of "
            f"data.sequence_length={sampler.sequence_length} for {max_new_tokens or 'any'} more"
        )
    if sampler.diffusion is not None:
        return _continue_with_latents(
            sampler, prompts_of_parts, images, max_new_tokens or room, sampling, seed
        )
    written = _in_batches(
        sampler,
        rows,
        grammar=Grammar(images=images),
        max_new_tokens=max_new_tokens or room,
        sampling=sampling,
        seed=seed,
        unconditional=None,
        progress=None,
    )
    return [split_parts(sampler, row) for row in written]


def _prompt_of(sampler: Sampler, parts: Sequence[Part]) -> tuple[list[int], np.ndarray]:
    """The tokens of interleaved parts, and the latents of their pictures one after another."""
    row, latents = [BOS], []
    for part in parts:
        if isinstance(part, str):
            row += sampler.encode_text(part)
            continue
        (tokens,), patches = sampler.encode_images(part[None])
        row += tokens
        latents += [] if patches is None else patches
    size = getattr(sampler.image_codec, "size", 0)
    return row, np.concatenate(latents) if latents else np.zeros((0, size), np.float32)


def _continue_with_latents(
    sampler: Sampler,
    prompts: list[tuple[list[int], np.ndarray]],
    images: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> list[list[Part]]:
    """Text up to a BOI, a picture denoised in its place, text again, ... (Transfusion, 3.3)."""
    assert sampler.diffusion is not None
    rows, latents = [list(row) for row, _ in prompts], [patches for _, patches in prompts]
    parts: list[list[Part]] = [[] for _ in rows]
    longest = max(map(len, rows)) + max_new_tokens
    active = list(range(len(rows)))
    for stage in range(images + 1):
        room = longest - max(len(rows[i]) for i in active)
        if room < 1:
            break
        # Each stage draws anew, whatever the stages before it drew.
        stage_seed = int(np.random.SeedSequence([seed, stage]).generate_state(1)[0]) >> 1
        shared = {"seed": stage_seed, "unconditional": None, "progress": None}
        written = _in_batches(
            sampler,
            [rows[i] for i in active],
            of_each={"latents": [latents[i] for i in active]},
            grammar=Grammar(images=images - stage),
            max_new_tokens=max_new_tokens,
            limit=room,
            sampling=sampling,
            **shared,
        )
        for i, tokens in zip(active, written, strict=True):
            rows[i] += tokens.tolist()
            if sampler.vocabulary.to_text_ids(tokens).size:
                parts[i].append(sampler.decode_text(tokens))
        active = [i for i in active if rows[i][-1] == BOI]
        if not active:
            break
        drawn = _in_batches(
            sampler,
            [rows[i] for i in active],
            run=denoise_pictures,
            of_each={"latents": [latents[i] for i in active]},
            diffusion=sampler.diffusion,
            drawing=check_drawing(sampler.drawing, sampler.diffusion),
            **shared,
        )
        drawn = [patches[-1] for patches in drawn]
        pictures = sampler.image_codec.decode(np.stack(drawn))
        for i, patches, picture in zip(active, drawn, pictures, strict=True):
            rows[i] += [PATCH] * len(patches) + [EOI]
            latents[i] = np.concatenate([latents[i], patches])
            parts[i].append(picture)
    return parts


def split_parts(sampler: Sampler, tokens: Iterable[int]) -> list[Part]:
    """Tokens -> texts and pictures in their order; an image that is not whole is left out."""
    parts: list[Part] = []
    pending: list[int] = []

    def flush(is_image: bool):
        if is_image and len(pending) == sampler.vocabulary.codes_per_image:
            parts.append(sampler.decode_images([pending])[0])
        elif pending and not is_image:
            parts.append(sampler.decode_text(pending))
        pending.clear()

    for token in map(int, tokens):
        if token in (BOI, EOI, EOS):
            flush(token == EOI)
        else:
            pending.append(token)
    flush(is_image=any(sampler.vocabulary.kind(token) == "image" for token in pending))
    return parts


def _in_batches(
    sampler: Sampler,
    prompts: list[list[int]],
    *,
    unconditional: list[int] | None,
    progress: Callable[[int], Any] | None,
    run: Callable[..., Any] | None = None,
    row_ids: Sequence[int] | None = None,
    of_each: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """What ``run`` (default: the tokens that are written) makes of each prompt.

    Every batch has the shape of the first. ``of_each`` are more arguments of it that have a value
    for each prompt; row i draws by the number ``row_ids[i]``, by default i.
    """
    size = min(sampler.batch_size, len(prompts))
    ids = range(len(prompts)) if row_ids is None else row_ids
    rows: list[np.ndarray] = []
    for start in range(0, len(prompts), max(size, 1)):
        # Rows do not depend on each other, so the last batch is filled up with any.
        chosen = [start + i if start + i < len(prompts) else start for i in range(size)]
        result = (run or _write)(
            sampler.model,
            sampler.params,
            sampler.vocabulary,
            [prompts[i] for i in chosen],
            row_ids=[ids[i] for i in chosen],
            unconditional=None if unconditional is None else [unconditional] * size,
            **{name: [each[i] for i in chosen] for name, each in (of_each or {}).items()},
            **options,
        )
        count = min(size, len(prompts) - start)
        rows += list(result[:count])
        if progress is not None:
            progress(count)
    return rows


def _write(*args: Any, **options: Any) -> list[np.ndarray]:
    result = generate(*args, **options)
    return [result.row(i) for i in range(len(result.lengths))]
