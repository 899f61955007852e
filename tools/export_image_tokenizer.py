"""Writes the image tokenizer of a finished run to one .npz file, with what it measures beside it.

    moejax train --config tokenizer_fsq
    python tools/export_image_tokenizer.py --workdir runs/tokenizer_fsq

Without ``--output`` it replaces ``builtin:fsq`` (moejax/data/builtin/fsq.npz and fsq.json). The
parameters are rounded to float16; the figures in the .json are those of the rounded ones, on the
val and the test split, with k-means patch codes at equal bits beside them.
"""

import argparse
import json
import os
import shlex
from pathlib import Path

import jax
import numpy as np

from moejax.models.tokenizer import ImageCodec, builtin_codec_path, save_image_codec
from moejax.train.evaluate import evaluate
from moejax.train.load import Loaded, load

SPLITS = ("val", "test")


def measure(loaded: Loaded, codec: ImageCodec) -> dict[str, dict[str, float]]:
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


def describe(loaded: Loaded, codec: ImageCodec, workdir: Path, command: str) -> dict:
    """What fsq.json says: where the weights come from, how to make them, what they measure."""
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
        "codes": codec.num_codes,
        "grid": list(codec.grid),
        "made_with": {name: made_with[name] for name in ("data_version", "jax", "flax")},
        "metrics": measure(loaded, codec),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, default=builtin_codec_path())
    parser.add_argument(
        "--command",
        default="moejax train --config tokenizer_fsq",
        help="what the .json gives as the command of the run",
    )
    arguments = parser.parse_args()
    loaded = load(arguments.workdir, arguments.step)
    params = jax.tree.map(np.asarray, loaded.params)
    # Replaced in one go: a reader never sees half a file.
    partial = arguments.output.with_name(f".{arguments.output.name}.part")
    codec = save_image_codec(partial, loaded.config.model, params)
    table = describe(loaded, codec, arguments.workdir, shlex.join(shlex.split(arguments.command)))
    os.replace(partial, arguments.output)
    text = json.dumps(table, indent=2) + "\n"
    arguments.output.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    print(text, end="")


if __name__ == "__main__":
    main()
