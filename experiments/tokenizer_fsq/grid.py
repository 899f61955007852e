"""Draws held-out pictures and their reconstruction by image tokenizers and their baselines.

    python experiments/tokenizer_fsq/grid.py
    python experiments/tokenizer_fsq/grid.py --kind kl

Rows from the top, in bands of ``--columns`` pictures: original, FSQ, k-means; or with ``--kind kl``
original, KL, KL with noise on its latents, FSQ, PCA.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moejax.data.sources import open_source
from moejax.models.tokenizer import load_image_codec, load_latent_codec
from moejax.train.reconstruction import (
    image_mse,
    kmeans_decode,
    kmeans_encode,
    patch_centres,
    patch_components,
    pca_rebuild,
    to_psnr,
)

SCALE = 3
GAP = 6
LABEL_WIDTH = 60
# Standard deviation of the noise on the latents, which have that of 1.
NOISE = 0.2


def draw(rows: dict[str, np.ndarray], columns: int) -> Image.Image:
    """Rows of n pictures [n, h, w, 3] by label, one under the other, in bands of ``columns``."""
    first = next(iter(rows.values()))
    count, side = len(first), first.shape[1] * SCALE
    bands = -(-count // columns)
    band_height = len(rows) * (side + GAP) + 2 * GAP
    size = (LABEL_WIDTH + columns * (side + GAP) + GAP, bands * band_height)
    canvas = Image.new("RGB", size, (225, 225, 225))
    pen = ImageDraw.Draw(canvas)
    for index in range(count):
        band, column = divmod(index, columns)
        for place, (label, pictures) in enumerate(rows.items()):
            x = LABEL_WIDTH + column * (side + GAP)
            y = band * band_height + 2 * GAP + place * (side + GAP)
            picture = Image.fromarray(pictures[index])
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
            if column == 0:
                pen.text((GAP, y + side // 2 - 5), label, fill=(0, 0, 0))
    return canvas


def rebuild_fsq(spec: str, images: np.ndarray, train) -> dict[str, np.ndarray]:
    """The pictures by an image codec and by k-means codes."""
    codec = load_image_codec(spec)
    patch = codec.config.patch_size
    centres = patch_centres(train, patch, codec.num_codes)
    return {
        "FSQ": codec.decode(codec.encode(images)),
        "k-means": kmeans_decode(kmeans_encode(images, centres, patch), centres, patch),
    }


def rebuild_kl(spec: str, images: np.ndarray, train) -> dict[str, np.ndarray]:
    """The pictures by a latent codec, without and with noise, by builtin:fsq, and by PCA."""
    codec, fsq = load_latent_codec(spec), load_image_codec("builtin:fsq")
    patch = codec.config.patch_size
    latents = codec.encode(images)
    noise = NOISE * np.random.default_rng(0).normal(size=latents.shape)
    basis = patch_components(train, patch, codec.channels)
    return {
        "KL": codec.decode(latents),
        f"noise {NOISE}": codec.decode(latents + noise),
        "FSQ": fsq.decode(fsq.encode(images)),
        "PCA": pca_rebuild(images, *basis, patch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("fsq", "kl"), default="fsq")
    parser.add_argument("--tokenizer", help="an .npz file (default: the built-in one)")
    parser.add_argument("--source", default="builtin:emoji32")
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, default=28, help="pictures, evenly spread")
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kind = arguments.kind
    spec = arguments.tokenizer or f"builtin:{kind}"
    size = (load_image_codec if kind == "fsq" else load_latent_codec)(spec).image_size
    source = open_source(arguments.source, arguments.split, image_size=size)
    train = open_source(arguments.source, "train", image_size=size)
    chosen = np.unique(np.linspace(0, len(source) - 1, arguments.count).astype(int))
    images = np.stack([source[int(index)]["image"] for index in chosen])
    rebuilt = (rebuild_fsq if kind == "fsq" else rebuild_kl)(spec, images, train)
    folder = Path(__file__).parent.parent / f"tokenizer_{kind}"
    output = arguments.output or folder / "reconstructions.png"
    draw({"original": images, **rebuilt}, arguments.columns).save(output, optimize=True)
    print(f"{output}: {len(images)} {arguments.split} pictures of {arguments.source}")
    for label, pictures in rebuilt.items():
        print(f"{label:10} {to_psnr(image_mse(images, pictures)).mean():6.2f} dB")


if __name__ == "__main__":
    main()
