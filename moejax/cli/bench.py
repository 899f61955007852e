"""``moejax bench``: how long a layer takes beside the dense one of equal FLOPs."""

import sys
from typing import Any

from moejax.cli.common import command_parser, print_json
from moejax.errors import UserError

_DESCRIPTION = """Times a layer beside other ways to compute it and the dense MLP of equal active
FLOPs: in turns, in one process, forward and forward + backward, with balanced and Zipf-skewed
routing.

  moe_layer   experts, sorting included and the router not: cases A (4,096 tokens, width 256,
              8 experts of 512, 2 for each token) and B (64 experts of 128, 8 for each token)
  untied_ffn  a feed-forward layer with weights for each of 2 modalities: case C (hidden 1,024)
  kernels     the kernels of pallas_kernels: matmuls of 2 to 128 groups (E2, E8, E64, E128)
              beside one dense matmul of the same rows, and beside lax.ragged_dot, a one-hot
              einsum and torch's grouped matmul; dispatch, combine, gather, scatter (of rows and
              of tokens) and router beside a copy of the same bytes. 1 / ratio is the share of the
              dense rate, or of the bandwidth
  decode      tokens of one sequence, one by one, by models whose tokens skip blocks (mod) or run
              them again (mor, mor_sharing), beside a dense one of as many layers (case A); with
              the ratio that FLOPs predict

`auto` is the function that training calls. Ratios mean most on a machine that does nothing else."""


def run(argv: list[str]) -> int:
    """Runs ``moejax bench`` and returns the exit code."""
    parser = command_parser("bench", _DESCRIPTION, config=False, workdir=False)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="moe_layer, untied_ffn, kernels or decode"
    )
    parser.add_argument(
        "--cases", default="", metavar="A,B", help="sizes to time (default: all but tiny)"
    )
    parser.add_argument(
        "--implementations",
        default="",
        metavar="I,J",
        help="what to time (default: all that do not take minutes)",
    )
    parser.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="timings of each (default: 10)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    args = parser.parse(argv)

    from moejax.analysis.bench import BENCHES, DECODE, KERNELS, bench

    if not args.name:
        raise UserError(f"bench: give a NAME: {', '.join((*BENCHES, KERNELS, DECODE))}")
    rows = bench(
        args.name,
        cases=_words(args.cases),
        implementations=_words(args.implementations),
        repeats=args.repeats,
        dtype=args.dtype,
        say=lambda line: print(f"moejax: {line}", file=sys.stderr, flush=True),
    )
    if args.json:
        print_json(rows)
    else:
        print(_table(rows), end="")
    return 0


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [f"{first['bench']} on {first['device']}, {versions}; ratio to {first['baseline']}"]
    lines.append(f"{'case':<10}{'skew':<10}{'direction':<11}{'implementation':<16}{'ms':>9}  ratio")
    for row in rows:
        lines.append(
            f"{row['case']:<10}{row['skew']:<10}{row['direction']:<11}{row['implementation']:<16}"
            f"{row['ms_median']:>9.2f}  {row['ratio']:>5.2f}"
            + (f"  (FLOPs {row['flops_ratio']:.2f})" if "flops_ratio" in row else "")
        )
    return "\n".join(lines) + "\n"
