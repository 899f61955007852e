"""Picture files to arrays: decoded fully, on white, letterboxed to a square, resized."""

import hashlib
import io
import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from moejax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG")
# Seconds of checking before a progress bar appears.
PROGRESS_AFTER = 5.0

# (path, bytes, time of change) -> SHA-256 of files that were decoded without an error: the second
# split of a folder need not decode the pictures of the first again.
_WHOLE_FILES: dict[tuple[str, int, int], bytes] = {}


def decode_image(content: bytes, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """RGB of a PNG or JPEG file: upright, on white, padded to a square, resized to ``size``.

    Raises whatever Pillow raises for a file that is damaged, cut off or of another format.
    """
    from PIL import Image, ImageOps

    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    # A large JPEG is decoded at 1/2 to 1/8 of its size, if that leaves twice what is asked for.
    picture.draft(None, (2 * size, 2 * size))
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert would clip, not scale.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return fit_image(picture, size)


def fit_image(picture: "Image.Image", size: int) -> UInt8[np.ndarray, "size size 3"]:
    """RGB of a Pillow picture: on white, padded to a square, resized to ``size``."""
    from PIL import Image

    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    canvas = canvas.convert("RGB")
    if side != size:
        canvas = canvas.resize((size, size), Image.Resampling.BICUBIC)
    image = np.asarray(canvas)
    image.setflags(write=False)
    return image


def place_on_white(
    image: UInt8[np.ndarray, "side side 3"], size: int, top: int, left: int
) -> UInt8[np.ndarray, "side side 3"]:
    """A square picture at another size on white; what lies beyond the border is cut off."""
    from PIL import Image

    side = image.shape[0]
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(resized, (left, top))
    return np.asarray(canvas)


def decode_images(
    folder: Path, paths: Sequence[str], size: int, where: dict[str, str], keep: Collection[str]
) -> tuple[dict[str, UInt8[np.ndarray, "size size 3"]], str]:
    """Decodes every file of ``paths`` in ``folder`` by a few threads.

    Args:
      folder: the paths are relative to it.
      paths: of PNG and JPEG files.
      size: height and width of the results.
      where: path -> the place that names it, for the error message.
      keep: the paths whose images are returned; the others are only checked.

    Returns:
      path -> image for the paths in ``keep``, and a hash of all the files' bytes.

    Raises:
      UserError: the first path, in order, that is missing or cannot be decoded.
    """

    def check(path: str):
        try:
            stat = (folder / path).stat()
            key = (os.path.abspath(folder / path), stat.st_size, stat.st_mtime_ns)
            if path not in keep and key in _WHOLE_FILES:
                return _WHOLE_FILES[key], None
            content = (folder / path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character in the path.
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{where[path]}: {why}: {folder / path}; mend the path or take the row out"
            ) from error
        try:
            image = decode_image(content, size)
        except Exception as error:  # Pillow's decoders raise many kinds for a damaged file.
            raise UserError(
                f"{where[path]}: {folder / path} is not a whole PNG or JPEG file ({error}); "
                "replace it or take the row out"
            ) from error
        _WHOLE_FILES[key] = hashlib.sha256(content).digest()
        return _WHOLE_FILES[key], image if path in keep else None

    digest, images = hashlib.sha256(), {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # When one fails, map cancels those that have not begun.
        results = pool.map(check, paths)
        for path, (file_digest, image) in zip(paths, _progress(results, len(paths)), strict=True):
            digest.update(file_digest)
            if image is not None:
                images[path] = image
    return images, digest.hexdigest()


def _progress(results, total: int):
    if not sys.stderr.isatty():
        return results
    from tqdm import tqdm

    return tqdm(results, "checking pictures", total, delay=PROGRESS_AFTER, leave=False)
