"""``moejax prepare SET``: makes a data set from public packages or a folder of pictures."""

import contextlib
import sys
from collections.abc import Sequence

from moejax.cli.common import Parser, command_parser, print_json
from moejax.config.schema import DataConfig
from moejax.errors import UserError, did_you_mean


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    argv = list(argv)
    if argv and argv[0] in SETS:
        return SETS[argv[0]](argv[1:])
    parser = _parser("", "Make a data set from public packages or a folder of pictures.")
    parser.add_argument("set", metavar="SET", choices=[], help=f"one of {', '.join(SETS)}")
    if not argv:
        raise UserError(f"prepare: name a set; choose from: {', '.join(SETS)}")
    if not argv[0].startswith("-"):
        raise UserError(f"prepare: no set {argv[0]!r}{did_you_mean(argv[0], SETS)}")
    parser.parse(argv)
    return 0


def _parser(name: str, description: str) -> Parser:
    parser = command_parser(f"prepare {name}".strip(), description, config=False, workdir=False)
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=DataConfig().data_dir,
        help="where prepared sets lie; runs find them by data.data_dir (default: %(default)s)",
    )
    return parser


def _emoji3m(argv: Sequence[str]) -> int:
    parser = _parser(
        "emoji3m",
        "Four art styles of emoji, their names in 12 languages, and speech: local:emoji3m.\n"
        "Fetches about 165 MB of packages by npm and pip. A run that was cut off goes on where it\n"
        "was.",
    )
    parser.add_argument("--no-speech", action="store_true", help="pictures and names only")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only N concepts, for a quick look"
    )
    args = parser.parse(argv)
    if args.limit < 0:
        raise UserError(f"prepare emoji3m: --limit {args.limit} must be positive")

    from moejax.data.prepare.emoji3m import prepare, report

    # With --json stdout carries the document alone, whatever a library prints.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        description = prepare(args.data_dir, speech=not args.no_speech, limit=args.limit)
    if args.json:
        print_json(description)
    else:
        print(report(description))
    return 0


def _folder(argv: Sequence[str]) -> int:
    parser = _parser(
        "folder",
        "A folder of pictures with captions.jsonl, as folder:DIR reads it, becomes a set with one\n"
        "file per split (ArrayRecord): tfds:NAME.",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder that holds captions.jsonl")
    parser.add_argument("--name", required=True, help="what to call the set, as in tfds:NAME")
    args = parser.parse(argv)

    from moejax.data.tfds_builder import prepare_folder
    from moejax.data.tfds_set import open_set

    path = prepare_folder(args.folder, args.name, args.data_dir)
    counts = {name: int(split.num_examples) for name, split in open_set(path).info.splits.items()}
    source = f"tfds:{args.name}"
    if args.json:
        print_json({"source": source, "path": str(path), "records": counts})
    else:
        print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
        print(f"train with --config.data.source={source} --config.data.data_dir={args.data_dir}")
    return 0


# What can be prepared -> function(the rest of the command line) -> exit code.
SETS = {"emoji3m": _emoji3m, "folder": _folder}
