"""What a frozen image tokenizer makes of a source's pictures, kept on disk by content."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from moejax.data.records import frames_of
from moejax.data.sources import RecordSource
from moejax.data.variants import variant


class ImageCodec(Protocol):
    """A frozen image tokenizer (moejax.models.tokenizer has one).

    ``num_codes`` is 0 for one that gives latent vectors (moejax.data.latents.PatchCodec).
    """

    @property
    def num_codes(self) -> int: ...

    @property
    def codes_per_image(self) -> int: ...

    @property
    def version(self) -> str: ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> codes i32 [n, codes_per_image], or f32 [n, codes_per_image, z]."""
        ...


def cache_folder() -> Path:
    """``$MOEJAX_CACHE``, or moejax's folder among the user's caches."""
    chosen = os.environ.get("MOEJAX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moejax"


def image_codes(
    source: RecordSource, codec: ImageCodec, variants: int = 1, seed: int = 0
) -> Callable[[int, int], np.ndarray | None]:
    """A function (record index, variant) -> what ``codec`` makes of its frames; None without any.

    Codes are [frames, codes_per_image] i32, latent vectors [frames, codes_per_image, z] f16; a
    picture is one frame. Records that share a picture share them. All variants of all pictures
    (moejax.data.variants) are encoded once and stored under the hash of pictures and tokenizer.
    """
    images, places = _distinct_images(source, variants, seed)
    if not len(images):
        return lambda record, number=0: None
    key = hashlib.sha256(codec.version.encode() + images.tobytes()).hexdigest()[:24]
    path = cache_folder() / "image_codes" / f"{key}.npy"
    codes = _read(path, (len(images), codec.codes_per_image))
    if codes is None:
        codes = np.asarray(codec.encode(images))
        codes = codes.astype(np.int32 if codec.num_codes else np.float16)
        _write(path, codes)

    def of_record(record: int, number: int = 0) -> np.ndarray | None:
        first, frames = places[record]
        start = first + number * frames
        return codes[start : start + frames] if frames else None

    return of_record


def _distinct_images(
    source: RecordSource, variants: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(all variants of each record's frames side by side, [records, 2]: the first, how many)."""
    images, places, seen = [], [], {}
    for index in range(len(source)):
        record = source[index]
        frames, mirror = frames_of(record), record.get("mirror", False)
        if frames is None:
            places.append((0, 0))
            continue
        key = frames.shape, frames.tobytes(), mirror
        if key not in seen:
            seen[key] = len(images), len(frames)
            for number in range(variants):
                images += list(variant(frames, number, seed, mirror))
        places.append(seen[key])
    return np.stack(images) if images else np.zeros(0), np.asarray(places)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        codes = np.load(path)
    except (OSError, ValueError):
        return None
    return codes if codes.shape[:2] == shape else None


def _write(path: Path, codes: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, codes)
        temporary.replace(path)
    except OSError:
        # A read-only home only costs encoding again.
        temporary.unlink(missing_ok=True)
