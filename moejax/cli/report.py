"""``moejax report``: one HTML file that shows a run."""

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
        "needs no network, and can be written while the run is under way.",
        config=False,
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the file (default: WORKDIR/report/index.html)"
    )
    args = parser.parse(argv)
    if not args.workdir:
        raise UserError("--workdir: name the folder of a run, e.g. --workdir runs/quickstart")

    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        from moejax.analysis.report import write_report

        path, step = write_report(args.workdir, args.out)
    if args.json:
        print_json({"path": str(path), "steps": step})
    else:
        print(f"{path}: {args.workdir} to step {step}")
    return 0
