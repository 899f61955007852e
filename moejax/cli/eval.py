"""``moejax eval``: evaluates a checkpoint of a run."""

import contextlib
import sys
from collections.abc import Sequence

from moejax.cli.common import command_parser, print_json
from moejax.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "eval",
        "Evaluate a checkpoint: the evaluators that its config names, beside their baselines.",
        config=False,
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="data to evaluate on (default: eval.split)",
    )
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse(argv)
    if not args.workdir:
        raise UserError("--workdir: name the folder of a run, e.g. --workdir runs/quickstart")

    from moejax.train.evaluate import evaluate, format_table
    from moejax.train.load import load

    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        loaded = load(args.workdir, args.step)
        split = args.split or loaded.config.eval.split
        values = evaluate(loaded.eval_context(split))
    if args.json:
        print_json({"step": loaded.step, "split": split, "metrics": values})
    else:
        print(f"{args.workdir} at step {loaded.step}, split {split}")
        print(format_table(values))
    return 0
