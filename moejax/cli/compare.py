"""``moejax compare``: several configs at equal training FLOPs, with intervals over seeds."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.cli.common import STOPPED, command_parser, print_json
from moejax.errors import UserError

_DESCRIPTION = """Train several configs at equal training FLOPs and say, for each modality, what
share of the baseline's FLOPs each needs to reach the baseline's lowest held-out loss.

Every arm sees the same batches in the same order, has the same schedule and its own best learning
rate, and is run with the same seeds. The same command goes on with what was stopped, also by
kill -9, from the last checkpoint of that run; what is finished is not computed again. Start the
command several times, at once, and the processes share the runs: on a CPU with a core for each
(taskset -c 0 moejax compare ... & taskset -c 1 moejax compare ...).

    moejax compare --configs quickstart:dense,quickstart --budget flops=3e12 --seeds 3
    moejax compare --configs mot --arm half=mot,model.num_layers=2 --budget flops=3e12"""


# File systems take 255 bytes.
_LONGEST_NAME = 120


def run(argv: Sequence[str]) -> int:
    """Runs the command; exit code 0 when done, 130 when a signal stopped it."""
    parser = command_parser("compare", _DESCRIPTION, config=False)
    parser.add_argument(
        "--configs", default="", metavar="A,B", help="the configs to compare, the baseline first"
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=CONFIG,FIELD=VALUE",
        help="a further arm: a config with fields changed; can be given several times",
    )
    add_plan_flags(parser)
    parser.add_argument(
        "--match",
        choices=("flops", "tokens"),
        default="flops",
        help="tokens: all arms take the steps that the budget buys of the baseline",
    )
    parser.add_argument(
        "--schedule", choices=("constant", "wsd"), default="constant", help="of the learning rate"
    )
    parser.add_argument(
        "--also",
        default="",
        metavar="METRIC,METRIC",
        help="report these at the end of training too, e.g. image/accuracy,test/image/accuracy",
    )
    # `--config.a.b=v` without --config: it changes all arms.
    parser.set_defaults(config=None)
    parser.add_argument(
        "--width",
        type=int,
        default=0,
        metavar="D",
        help="model width of all arms, their other widths in proportion (default: their own)",
    )
    args = parser.parse(argv)

    from moejax.analysis.compare.arms import arms_of, folder_name
    from moejax.analysis.compare.output import write_comparison
    from moejax.analysis.compare.tables import comparison_markdown

    specs = arms_of(args.configs, args.arm)
    plan = plan_from(
        args,
        specs,
        match=args.match,
        schedule=args.schedule,
        width=args.width,
        also=tuple(filter(None, map(str.strip, args.also.split(",")))),
    )
    default = folder_name("_".join(spec.name for spec in specs))[:_LONGEST_NAME]
    workdir = Path(args.workdir or Path("runs") / f"compare_{default}")

    done = run_plan(args, plan, workdir, lambda results: write_comparison(plan, results, workdir))
    if done is None:
        return STOPPED
    results, rows = done
    if args.json:
        print_json({"workdir": str(workdir), "rows": [row.document() for row in rows]})
    else:
        print(comparison_markdown(plan, results, rows))
        print(f"table, picture and page: {workdir / 'index.html'}")
    return 0


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that trains several arms at equal FLOPs."""
    parser.add_argument(
        "--budget",
        default="",
        metavar="flops=N",
        help="training FLOPs of each run; or tokens=N, steps=N, equal in all arms",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="runs of each arm (3)")
    parser.add_argument(
        "--rates",
        default="",
        metavar="A,B,C",
        help="learning rates that each arm tries with seed 0, at least three (default: half, once "
        "and twice the first arm's); one alone is taken for all",
    )
    parser.add_argument(
        "--evaluations", type=int, default=8, metavar="N", help="of each run, evenly spread (8)"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="steps between checkpoints (default: one at each evaluation)",
    )


def plan_from(args: argparse.Namespace, specs: Sequence[Any], **options: Any) -> Any:
    """The plan that the flags ask for, every arm checked."""
    if not args.budget:
        raise UserError("--budget: give what every run may spend, e.g. --budget flops=3e12")

    from moejax.analysis.compare.arms import parse_budget
    from moejax.analysis.compare.plan import make_plan

    return make_plan(
        specs,
        parse_budget(args.budget),
        seeds=args.seeds,
        rates=_rates(args.rates),
        evaluations=args.evaluations,
        checkpoint_every=args.checkpoint_every,
        overrides=args.overrides,
        **options,
    )


def run_plan(
    args: argparse.Namespace, plan: Any, workdir: Path, report: Callable[[list], list]
) -> tuple[list, list] | None:
    """Trains what is missing; ``report`` writes what was found.

    Returns:
      (results, what ``report`` gave of all of them), or None when a signal asked to stop.
    """
    from moejax.train.compare import Stopped, run_comparison

    # With --json stdout carries the document alone.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        try:
            return run_comparison(plan, workdir, report)
        except Stopped:
            print("stopped; run the same command to go on")
            return None


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        rates = (0.0,)
    if any(not 0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rates {text}: write positive numbers, e.g. 1e-3,2e-3,4e-3")
    return rates
