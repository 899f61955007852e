"""``moejax convert KIND``: makes a run of another one, without training."""

from collections.abc import Sequence

from moejax.cli.common import command_parser, print_json
from moejax.config.checks import refuse_url
from moejax.errors import UserError, did_you_mean

# What a run can become.
KINDS = {"dense": "experts averaged into one feed-forward layer (EWA)"}


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "convert",
        "Make a run of another one, for eval, load and train.init_from. Nothing is trained, and "
        "the\nfirst run stays as it is.\n\n"
        + "\n".join(f"  {name}  {line}" for name, line in KINDS.items()),
        config=False,
    )
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--to", metavar="DIR", help="the new folder")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse(argv)
    if args.kind not in KINDS:
        raise UserError(f"convert: no kind {args.kind!r}{did_you_mean(args.kind, KINDS)}")
    for flag in ("workdir", "to"):
        if not getattr(args, flag):
            raise UserError(f"--{flag}: name a folder, e.g. --workdir runs/ewa --to runs/ewa_dense")

    refuse_url(args.to)

    from moejax.surgery.convert import convert_to_dense

    path = convert_to_dense(args.workdir, args.to, args.step)
    if args.json:
        print_json({"workdir": str(path)})
    else:
        print(f"{path}: made of {args.workdir}; moejax eval --workdir {path}")
    return 0
