"""``moejax train``: trains a config, or goes on with the run in its workdir."""

import contextlib
import sys
from collections.abc import Sequence

from moejax.cli.common import command_parser, config_from, default_workdir, print_json
from moejax.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 0 when done or stopped by a signal."""
    parser = command_parser(
        "train",
        "Train a config. The same command goes on with a run that was stopped, also by kill -9; "
        "SIGTERM or Ctrl-C saves first.",
    )
    args = parser.parse(argv)
    if not args.config and not args.workdir:
        raise UserError("--config: give a config, e.g. --config quickstart")
    config = config_from(args)
    workdir = default_workdir(args, config)

    from moejax.train.loop import NonFiniteLoss, train

    # With --json stdout carries the document alone.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    try:
        with aside:
            values = train(config, workdir)
    except NonFiniteLoss as error:
        print(f"moejax: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print_json({"workdir": str(workdir), **values})
    return 0
