"""``moejax convert KIND``: makes a run, or a file, of runs, without training."""

from collections.abc import Sequence

from moejax.cli.common import command_parser, print_json
from moejax.config.checks import refuse_url
from moejax.errors import UserError, did_you_mean

# What a run can become.
KINDS = {
    "dense": "experts averaged into one feed-forward layer (EWA)",
    "experts": "the feed-forward layers of several runs, --workdir A,B,..., as experts (CLIP-MoE)",
    "clusters": "a file of which training pairs a model finds alike (CLIP-MoE)",
}


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "convert",
        "Make a run of others, for eval, load and train.init_from. Nothing is trained, and what\n"
        "is there stays as it is.\n\n"
        + "\n".join(f"  {name:8}  {line}" for name, line in KINDS.items()),
        config=False,
    )
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--to", metavar="PATH", help="the new folder, or file of clusters")
    parser.add_argument("--step", type=int, help="checkpoint, for dense (default: the newest)")
    parser.add_argument("--before", default="", metavar="FILE", help="clusters of the stage before")
    args = parser.parse(argv)
    if args.kind not in KINDS:
        raise UserError(f"convert: no kind {args.kind!r}{did_you_mean(args.kind, KINDS)}")
    for flag in ("workdir", "to"):
        if not getattr(args, flag):
            raise UserError(f"--{flag}: name a folder, e.g. --workdir runs/ewa --to runs/ewa_dense")
    if args.step is not None and args.kind != "dense":
        raise UserError(f"--step: is for dense; {args.kind} takes the newest checkpoint")
    if args.before and args.kind != "clusters":
        raise UserError(f"--before: is for clusters, not for {args.kind}")
    refuse_url(args.to)

    from moejax.surgery.convert import convert_to_dense, convert_to_experts, write_pair_clusters

    said = f"made of {args.workdir}"
    if args.kind == "clusters":
        count = write_pair_clusters(args.workdir, args.to, args.before)
        said += f": {count} clusters; train with --config.data.clusters={args.to}"
    elif args.kind == "experts":
        convert_to_experts(str(args.workdir).split(","), args.to)
        said += f"; train with --config.train.init_from={args.to}"
    else:
        convert_to_dense(args.workdir, args.to, args.step)
        said += f"; moejax eval --workdir {args.to}"
    if args.json:
        print_json({"clusters" if args.kind == "clusters" else "workdir": str(args.to)})
    else:
        print(f"{args.to}: {said}")
    return 0
