"""``moejax report``: one HTML file that shows a run, or lists all the runs below a folder."""

import contextlib
import sys
from collections.abc import Sequence

from moejax.cli.common import command_parser, print_json
from moejax.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "report",
        "Write one HTML file that shows a run: losses, samples, speed, config, environment. It\n"
        "needs no network, and can be written while the run is under way. With --index, one that\n"
        "lists all the runs below a folder, with their losses and links to their reports.",
        config=False,
    )
    parser.add_argument(
        "--index", metavar="DIR", help="list the runs below this folder, in place of one run"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the file (default: WORKDIR/report/index.html, or DIR/index.html)",
    )
    args = parser.parse(argv)
    if args.index and args.workdir:
        raise UserError("--index: lists all the runs below a folder; leave --workdir out")
    if not args.index and not args.workdir:
        raise UserError(
            "--workdir: name the folder of a run, e.g. --workdir runs/quickstart; or that of many, "
            "--index runs"
        )

    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        if args.index:
            from moejax.analysis.index_page import write_index

            path, runs, broken = write_index(args.index, args.out)
            document = {"path": str(path), "runs": runs}
            shown = f"{runs} run{'s' * (runs != 1)} below {args.index}"
            shown += f", {broken} of them cannot be shown" if broken else ""
        else:
            from moejax.analysis.report import write_report

            path, step = write_report(args.workdir, args.out)
            document = {"path": str(path), "steps": step}
            shown = f"{args.workdir} to step {step}"
    if args.json:
        print_json(document)
    else:
        print(f"{path}: {shown}")
    return 0
