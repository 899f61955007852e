"""Sampling by captions and pictures: what notebooks and the command line use.

For example::

    sampler = load_sampler("runs/quickstart")
    pictures = sample_images(sampler, ["red apple", "sleepy cat"], seed=1)
    captions = caption_images(sampler, pictures)
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moejax.config.schema import Config
from moejax.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, Vocabulary
from moejax.errors import UserError
from moejax.generate.generate import generate
from moejax.generate.grammar import IMAGE_ONLY, TEXT_ONLY, Grammar
from moejax.generate.sampling import Sampling, check_sampling
from moejax.models.tokenizer import ImageCodec, load_image_codec

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
      image_codec: pictures to codes and back.
      sequence_length: the longest sequence that it was trained on.
      batch_size: the most rows sampled at once; results do not depend on it.
    """

    model: Any
    params: Any
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    image_codec: ImageCodec
    sequence_length: int
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

    def encode_image(self, image: UInt8[np.ndarray, "h w 3"]) -> list[int]:
        """BOI, vocabulary ids of the picture's codes, EOI."""
        codes = self.image_codec.encode(np.asarray(image)[None])[0]
        return [BOI, *self.vocabulary.image_ids(codes).tolist(), EOI]

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
    codec = load_image_codec(config.data.image_tokenizer)
    tokenizer = load_text_tokenizer(config.data.text_tokenizer)
    return Sampler(
        model=loaded.model,
        params=loaded.params,
        vocabulary=Vocabulary(tokenizer.size, codec.num_codes, codec.codes_per_image),
        text_tokenizer=tokenizer,
        image_codec=codec,
        sequence_length=config.data.sequence_length,
    )


def check_can_sample(config: Config) -> None:
    """UserError unless the model of ``config`` writes sequences of text and image tokens."""
    if config.data.format != "tokens":
        raise UserError(
            f"model.name={config.model.name}: cannot be sampled from; sample needs a model of "
            "sequences (data.format=tokens)"
        )


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
      sampling: temperature, filters and guidance; guidance costs twice the time.
      seed: picture i depends on (seed, i, caption i) alone.
      progress: called with the number of pictures done since the last call.

    Raises:
      UserError: a caption that is too long, or a setting that means nothing.
    """
    sampling = check_sampling(sampling or Sampling())
    prompts = [[BOS, *sampler.encode_text(caption), BOI] for caption in captions]
    guided = sampling.guidance != 1 and any(captions)
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
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    max_text_tokens: int = 48,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """A caption for each picture, of at least one and at most ``max_text_tokens`` tokens.

    ``sampling.guidance`` has no effect: models are not trained on captions without a picture.
    The other arguments are those of :func:`sample_images`.
    """
    sampling = check_sampling(sampling or Sampling())
    codes = sampler.image_codec.encode(np.asarray(images))
    prompts = [[BOS, BOI, *row, EOI] for row in sampler.vocabulary.image_ids(codes).tolist()]
    rows = _in_batches(
        sampler,
        prompts,
        grammar=TEXT_ONLY,
        max_new_tokens=min(max_text_tokens, sampler.text_room) + 1,
        sampling=sampling,
        seed=seed,
        unconditional=None,
        progress=progress,
    )
    return [sampler.decode_text(row) for row in rows]


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
    rows = []
    for parts in prompts:
        row = [BOS]
        for part in parts:
            is_text = isinstance(part, str)
            row += sampler.encode_text(part) if is_text else sampler.encode_image(part)
        rows.append(row)
    longest = max(map(len, rows))
    room = sampler.sequence_length - longest
    if room < 1 or (max_new_tokens or 0) > room:
        raise UserError(
            f"prompt: is {longest} tokens long, which leaves {max(room, 0)} of "
            f"data.sequence_length={sampler.sequence_length} for {max_new_tokens or 'any'} more"
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
    **options: Any,
) -> list[np.ndarray]:
    """The tokens written after each prompt; every batch has the shape of the first."""
    size = min(sampler.batch_size, len(prompts))
    rows: list[np.ndarray] = []
    for start in range(0, len(prompts), max(size, 1)):
        chunk = prompts[start : start + size]
        # Rows do not depend on each other, so the last batch is filled up with any.
        filled = chunk + [chunk[0]] * (size - len(chunk))
        result = generate(
            sampler.model,
            sampler.params,
            sampler.vocabulary,
            filled,
            row_ids=range(start, start + size),
            unconditional=None if unconditional is None else [unconditional] * size,
            **options,
        )
        rows += [result.row(i) for i in range(len(chunk))]
        if progress is not None:
            progress(len(chunk))
    return rows
