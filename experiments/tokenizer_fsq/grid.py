"""Draws held-out pictures, their reconstruction by the image tokenizer, and by k-means codes.

    python experiments/tokenizer_fsq/grid.py

Rows from the top: original, FSQ, k-means, in bands of ``--columns`` pictures.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moejax.data.sources import open_source
from moejax.models.tokenizer import load_image_codec
from moejax.train.reconstruction import (
    image_mse,
    kmeans_decode,
    kmeans_encode,
    patch_centres,
    to_psnr,
)

SCALE = 3
GAP = 6
LABELS = ("original", "FSQ", "k-means")
LABEL_WIDTH = 60


def draw(rows: list[np.ndarray], columns: int) -> Image.Image:
    """``rows`` of n pictures [n, h, w, 3] each, one under the other, broken after ``columns``."""
    count, side = len(rows[0]), rows[0].shape[1] * SCALE
    bands = -(-count // columns)
    band_height = len(rows) * (side + GAP) + 2 * GAP
    size = (LABEL_WIDTH + columns * (side + GAP) + GAP, bands * band_height)
    canvas = Image.new("RGB", size, (225, 225, 225))
    pen = ImageDraw.Draw(canvas)
    for index in range(count):
        band, column = divmod(index, columns)
        for place, pictures in enumerate(rows):
            x = LABEL_WIDTH + column * (side + GAP)
            y = band * band_height + 2 * GAP + place * (side + GAP)
            picture = Image.fromarray(pictures[index])
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
            if column == 0:
                pen.text((GAP, y + side // 2 - 5), LABELS[place], fill=(0, 0, 0))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="builtin:fsq", help="builtin:fsq or an .npz file")
    parser.add_argument("--source", default="builtin:emoji32")
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, default=28, help="pictures, evenly spread")
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "reconstructions.png"
    )
    arguments = parser.parse_args()
    codec = load_image_codec(arguments.tokenizer)
    patch = codec.config.patch_size
    source = open_source(arguments.source, arguments.split, image_size=codec.image_size)
    chosen = np.unique(np.linspace(0, len(source) - 1, arguments.count).astype(int))
    images = np.stack([source[int(index)]["image"] for index in chosen])
    train = open_source(arguments.source, "train", image_size=codec.image_size)
    centres = patch_centres(train, patch, codec.num_codes)
    rows = [
        images,
        codec.decode(codec.encode(images)),
        kmeans_decode(kmeans_encode(images, centres, patch), centres, patch),
    ]
    draw(rows, arguments.columns).save(arguments.output, optimize=True)
    shown = [float(to_psnr(image_mse(images, row)).mean()) for row in rows[1:]]
    print(f"{arguments.output}: {len(images)} {arguments.split} pictures of {arguments.source}")
    print(f"mean PSNR of these: FSQ {shown[0]:.2f} dB, k-means {shown[1]:.2f} dB")


if __name__ == "__main__":
    main()
