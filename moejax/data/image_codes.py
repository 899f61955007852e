"""Image codes of a source by a frozen image tokenizer, kept on disk by content."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from moejax.data.sources import RecordSource


class ImageCodec(Protocol):
    """A frozen image tokenizer (moejax.models.tokenizer has one)."""

    num_codes: int
    codes_per_image: int
    version: str

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> i32 [n, codes_per_image]."""
        ...


def cache_folder() -> Path:
    """``$MOEJAX_CACHE``, or moejax's folder among the user's caches."""
    chosen = os.environ.get("MOEJAX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moejax"


def image_codes(source: RecordSource, codec: ImageCodec) -> Callable[[int], np.ndarray]:
    """A function from record index to its image's codes [codes_per_image] i32.

    Records that share a picture share its codes. All pictures are encoded once and stored under
    the hash of pictures and tokenizer; nothing else decides the codes, as nothing augments here.
    """
    images, which = _distinct_images(source)
    key = hashlib.sha256(codec.version.encode() + images.tobytes()).hexdigest()[:24]
    path = cache_folder() / "image_codes" / f"{key}.npy"
    codes = _read(path, (len(images), codec.codes_per_image))
    if codes is None:
        codes = np.asarray(codec.encode(images), np.int32)
        _write(path, codes)
    return lambda record: codes[which[record]]


def _distinct_images(source: RecordSource) -> tuple[np.ndarray, np.ndarray]:
    images, which, seen = [], [], {}
    for index in range(len(source)):
        image = source[index]["image"]
        key = image.tobytes()
        if key not in seen:
            seen[key] = len(images)
            images.append(image)
        which.append(seen[key])
    return np.stack(images), np.asarray(which)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        codes = np.load(path)
    except (OSError, ValueError):
        return None
    return codes if codes.shape == shape else None


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
