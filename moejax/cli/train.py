"""``moejax train``: trains a config or every point of a sweep, or goes on with what is there."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moejax.cli.common import (
    STOPPED,
    command_parser,
    config_from,
    default_workdir,
    print_json,
)
from moejax.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command; exit code 0 when done, 130 when a signal stopped it, 1 if a run failed."""
    parser = command_parser(
        "train",
        "Train a config. The same command goes on with a run that was stopped, also by kill -9; "
        "SIGTERM or Ctrl-C saves first, and the exit code is 130.",
    )
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="",
        action="append",
        metavar="FIELD=VALUE,VALUE",
        help="train one point for each value, each in a folder of its own in --workdir (default: "
        "runs/<config>_sweep); given several times: every combination. Without a value: the "
        "points of the config file's get_hyper",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --sweep: print the command of each point"
    )
    parser.add_argument(
        "--distributed",
        metavar="SPEC",
        help="start this process as one of several: auto (the default: where a cluster is found), "
        "off, or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID; also by MOEJAX_DISTRIBUTED "
        "(docs/multihost.md)",
    )
    args = parser.parse(argv)
    if not args.config and not args.workdir:
        raise UserError("--config: give a config, e.g. --config quickstart")
    if args.sweep is not None:
        return _sweep(args)
    if args.dry_run:
        raise UserError("--dry-run: goes with --sweep")
    config = config_from(args)
    workdir = default_workdir(args, config)

    from moejax.parallel import distributed
    from moejax.train.loop import NonFiniteLoss, train
    from moejax.train.sweep import is_finished

    distributed.start(args.distributed)

    # With --json stdout carries the document alone.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    try:
        with aside:
            values = train(config, workdir)
    except NonFiniteLoss as error:
        print(f"moejax: error: {error}", file=sys.stderr)
        return 1
    if args.json and distributed.primary():
        print_json({"workdir": str(workdir), **values})
    return 0 if is_finished(config, workdir) else STOPPED


def _sweep(args: argparse.Namespace) -> int:
    from moejax.config.sweep import hyper_points, parse_sweep, plan_sweep, product

    if not args.config:
        raise UserError("--sweep: needs --config")
    parts = [parse_sweep(text) if text else hyper_points(args.config) for text in args.sweep]
    points = plan_sweep(args.config, product(*parts), args.overrides)
    name = points[0].config.about.name
    workdir = Path(args.workdir) if args.workdir else Path("runs") / f"{name}_sweep"
    if args.dry_run:
        commands = [_command(args, point.overrides, workdir / point.name) for point in points]
        if args.json:
            print_json(commands)
        else:
            print("\n".join(map(shlex.join, commands)))
        return 0

    from moejax.parallel import distributed
    from moejax.train.sweep import run_sweep

    distributed.start(args.distributed)
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        rows = run_sweep(points, workdir)
    if args.json and distributed.primary():
        print_json({"workdir": str(workdir), "points": rows})
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _command(args: argparse.Namespace, overrides: Sequence[str], workdir: Path) -> list[str]:
    """The words of the command that trains one point alone."""
    return [
        *("moejax", "train", "--config", args.config),
        *(word for name in args.imports for word in ("--import", name)),
        *(f"--config.{override}" for override in (*args.overrides, *overrides)),
        *("--workdir", str(workdir)),
    ]
