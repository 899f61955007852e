"""What the latents of a continuous image tokenizer are like, as a table.

    python experiments/tokenizer_kl/latents.py

For each channel, over the train split: standard deviation before the normalisation, that of the
posterior as a share of it, correlation of neighbours along a row and a column, kurtosis (3 for a
normal). Then the held-out PSNR with noise on the normalised latents.
"""

import argparse

import jax
import numpy as np

from moejax.data.sources import open_source
from moejax.models.autoencoder import KLAutoencoder, to_signed
from moejax.models.tokenizer import load_latent_codec
from moejax.train.reconstruction import image_mse, to_psnr

NOISE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


def pictures(split: str) -> np.ndarray:
    source = open_source("builtin:emoji32", split)
    return np.stack([source[index]["image"] for index in range(len(source))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="builtin:kl", help="builtin:kl or an .npz file")
    codec = load_latent_codec(parser.parse_args().tokenizer)
    model, train = KLAutoencoder(codec.config), pictures("train")
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="posterior"))
    # Some hundred pictures at a time: the encoder's features of all would take a gigabyte.
    parts = [posterior(codec.params, to_signed(part)) for part in np.array_split(train, 16)]
    spread = np.concatenate([np.exp(0.5 * np.asarray(part[1])) for part in parts])
    latents = codec.encode(train).reshape(len(train), *codec.grid, codec.channels)
    columns = {
        "std": codec.std_z,
        "posterior": spread.mean(axis=(0, 1, 2)) / codec.std_z,
        "row": (latents[:, :, 1:] * latents[:, :, :-1]).mean(axis=(0, 1, 2)),
        "column": (latents[:, 1:] * latents[:, :-1]).mean(axis=(0, 1, 2)),
        "kurtosis": (latents**4).mean(axis=(0, 1, 2)),
    }
    print("channel  " + "".join(f"{name:>11}" for name in columns))
    for channel in range(codec.channels):
        numbers = "".join(f"{values[channel]:11.3f}" for values in columns.values())
        print(f"{channel:7}  {numbers}")
    print(f"largest absolute value {np.abs(latents).max():.2f}")
    images = pictures("val")
    held_out = codec.encode(images)
    draws = np.random.default_rng(0).normal(size=held_out.shape)
    for noise in NOISE:
        rebuilt = codec.decode(held_out + noise * draws)
        print(f"noise {noise:4}  val PSNR {to_psnr(image_mse(images, rebuilt)).mean():.2f} dB")


if __name__ == "__main__":
    main()
