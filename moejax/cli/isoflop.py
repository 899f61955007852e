"""``moejax isoflop``: one config at several widths and equal FLOPs; a scaling law through them."""

from collections.abc import Sequence
from pathlib import Path

from moejax.cli.common import STOPPED, command_parser, print_json
from moejax.cli.compare import add_plan_flags, plan_from, run_plan
from moejax.errors import UserError

_DESCRIPTION = """Train one config at several widths, all at the same training FLOPs, and fit for
each modality the size of least loss at each budget and the scaling law
L = E + A / N^alpha + B / D^beta, with intervals over seeds.

    moejax isoflop --config quickstart:dense --widths 64,96,128,192 --budget flops=2e12"""


def run(argv: Sequence[str]) -> int:
    """Runs the command; exit code 0 when done, 130 when a signal stopped it."""
    parser = command_parser("isoflop", _DESCRIPTION)
    parser.add_argument("--widths", default="", metavar="A,B,C", help="three model widths or more")
    add_plan_flags(parser)
    args = parser.parse(argv)
    if not args.config:
        raise UserError("--config: give the config to scale, e.g. --config quickstart:dense")
    widths = [part.strip() for part in args.widths.split(",") if part.strip()]
    if not all(width.isdecimal() for width in widths):
        raise UserError(f"--widths {args.widths}: write whole numbers, e.g. 64,96,128")

    from moejax.analysis.compare.arms import folder_name
    from moejax.analysis.compare.isoflop import width_arms
    from moejax.analysis.compare.isoflop_output import isoflop_markdown, write_isoflop

    specs = width_arms(args.config, [int(width) for width in widths], args.overrides)
    if args.budget and not args.budget.startswith("flops="):
        raise UserError(f"--budget {args.budget}: sizes are compared at equal FLOPs; flops=2e12")
    plan = plan_from(args, specs)
    workdir = Path(args.workdir or Path("runs") / f"isoflop_{folder_name(args.config)}")

    def report(results: list) -> list:
        # A parabola needs all sizes.
        return write_isoflop(plan, results, workdir) if len(results) == len(specs) else []

    done = run_plan(args, plan, workdir, report)
    if done is None:
        return STOPPED
    results, fits = done
    if args.json:
        print_json({"workdir": str(workdir), "fits": [fit.document() for fit in fits]})
    else:
        print(isoflop_markdown(plan, results, fits))
        print(f"table, picture and page: {workdir / 'index.html'}")
    return 0
