"""Writes the image tokenizer of a finished run to one .npz file, with what it measures beside it.

    moejax train --config tokenizer_fsq
    python tools/export_image_tokenizer.py --workdir runs/tokenizer_fsq

Without ``--output`` it replaces ``builtin:fsq`` (moejax/data/builtin/fsq.npz and fsq.json), or
``builtin:kl`` where the run is of tokenizer_kl. The parameters are rounded to float16; the figures
in the .json are those of the rounded ones, on the val and the test split, beside the baseline's
(k-means patch codes at equal bits, or as many principal components of the patches).
"""

import argparse
import json
import os
import shlex
from pathlib import Path

import jax
import numpy as np

from moejax.config.schema import KLAutoencoderConfig
from moejax.models.tokenizer import (
    ImageCodec,
    LatentCodec,
    builtin_codec_path,
    save_image_codec,
    save_latent_codec,
)
from moejax.train.evaluate import evaluate
from moejax.train.load import Loaded, load

SPLITS = ("val", "test")


def save(loaded: Loaded, path: Path) -> ImageCodec | LatentCodec:
    """Writes the codec of the run to ``path``."""
    params = jax.tree.map(np.asarray, loaded.params)
    if not isinstance(loaded.config.model, KLAutoencoderConfig):
        return save_image_codec(path, loaded.config.model, params)
    source = loaded.train_pipeline().source
    images = np.stack([source[index]["image"] for index in range(len(source))])
    return save_latent_codec(path, loaded.config.model, params, images)


def measure(loaded: Loaded, codec: ImageCodec | LatentCodec) -> dict[str, dict[str, float]]:
    """The reconstruction metrics of the codec's parameters on each held-out split."""
    return {
        split: {
            name: round(value, 4)
            for name, value in evaluate(
                loaded.eval_context(split).with_params(codec.params)
            ).items()
        }
        for split in SPLITS
    }


def what_it_gives(codec: ImageCodec | LatentCodec) -> dict:
    """The entries of the .json that differ between codes and latents."""
    if isinstance(codec, ImageCodec):
        return {"codes": codec.num_codes}
    numbers = {"mean": codec.mean_z, "std": codec.std_z}
    rounded = {name: [round(float(x), 4) for x in values] for name, values in numbers.items()}
    return {"latent_channels": codec.channels, "latents_before_normalisation": rounded}


def describe(loaded: Loaded, codec: ImageCodec | LatentCodec, workdir: Path, command: str) -> dict:
    """What the .json says: where the weights come from, how to make them, what they measure."""
    config = loaded.config
    record = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    made_with = record["made_with"]
    return {
        "version": codec.version,
        "command": command,
        "paper": config.about.paper,
        "seed": config.train.seed,
        "steps": loaded.step,
        "batch_size": config.data.batch_size,
        "source": f"{config.data.source}, train split only",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(codec.params)),
        "stored_as": "float16",
        **what_it_gives(codec),
        "grid": list(codec.grid),
        "made_with": {name: made_with[name] for name in ("data_version", "jax", "flax")},
        "metrics": measure(loaded, codec),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, help="default: the built-in file of its kind")
    parser.add_argument(
        "--command",
        help="what the .json gives as the command of the run (default: that of its config)",
    )
    arguments = parser.parse_args()
    loaded = load(arguments.workdir, arguments.step)
    kind = "kl" if isinstance(loaded.config.model, KLAutoencoderConfig) else "fsq"
    output = arguments.output or builtin_codec_path(kind)
    command = arguments.command or f"moejax train --config {loaded.config.about.name}"
    # Replaced in one go: a reader never sees half a file.
    partial = output.with_name(f".{output.name}.part")
    codec = save(loaded, partial)
    table = describe(loaded, codec, arguments.workdir, shlex.join(shlex.split(command)))
    os.replace(partial, output)
    text = json.dumps(table, indent=2) + "\n"
    output.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"{output}: {output.stat().st_size:,} bytes")
    print(text, end="")


if __name__ == "__main__":
    main()
