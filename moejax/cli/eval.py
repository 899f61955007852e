"""``moejax eval``: evaluates a checkpoint of a run."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

import ml_collections

from moejax.cli.common import command_parser, print_json
from moejax.config.convert import freeze, to_dict
from moejax.config.load import overridden
from moejax.config.schema import Config
from moejax.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "eval",
        "Evaluate a checkpoint: the evaluators that its config names, beside their baselines.\n"
        "Pictures that they draw go into WORKDIR/samples/step_N, arrays that `moejax report`\n"
        "shows into WORKDIR/arrays/step_N. Options of evaluators are set as in training, such as\n"
        "--config.eval.probe.source=tuxpaint:default.",
        config=False,
    )
    # Overrides are taken, of the group eval alone.
    parser.set_defaults(config=None)
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="data to evaluate on (default: eval.split, and what eval.metrics says otherwise)",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        default="",
        help="evaluators to run instead of those of eval.metrics, parted by commas: likelihood, "
        "routing, samples, ... (moejax list evaluators)",
    )
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse(argv)
    if not args.workdir:
        raise UserError("--workdir: name the folder of a run, e.g. --workdir runs/quickstart")

    from moejax.train.evaluate import eval_plans, format_table, run_evaluators
    from moejax.train.load import load
    from moejax.train.writers import save_arrays, save_images

    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        loaded = load(args.workdir, args.step)
        config = with_options(loaded.config, args.overrides)
        loaded = dataclasses.replace(loaded, config=config)
        split = args.split or loaded.config.eval.split
        context = loaded.eval_context(args.split, [args.metrics] if args.metrics else ())
        result = run_evaluators(context, eval_plans(context.config.eval))
        paths = save_images(loaded.workdir, loaded.step, result.images)
        saved = save_arrays(loaded.workdir, loaded.step, result.arrays)
    if args.json:
        document = {"step": loaded.step, "split": split, "metrics": result.values}
        # Only where there are any: most evaluators draw nothing.
        others = {"images": paths, "arrays": saved, "notes": result.notes}
        print_json({**document, **{k: list(map(str, v)) for k, v in others.items() if v}})
    else:
        print(f"{args.workdir} at step {loaded.step}, split {split}")
        lines = [format_table(result.values), *result.notes, *map(str, [*paths, *saved])]
        print("\n".join(lines))
    return 0


def with_options(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with overrides of its group ``eval``; UserError for those of another group."""
    for override in overrides:
        if not override.startswith("eval."):
            raise UserError(
                f"--config.{override}: the run keeps the config that it was made with; only "
                "--config.eval... can be changed"
            )
    if not overrides:
        return config
    return freeze(overridden(ml_collections.ConfigDict(to_dict(config)), overrides))
