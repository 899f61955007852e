"""The two tables of the README, from what `moejax compile --output` wrote.

    python experiments/scale/tables.py experiments/scale/reports/*.json

Bytes by formula, that a device receives in a step of fully sharded training: each weight is split
over n devices. Before use they gather it in bfloat16 (size S): S (n-1)/n bytes, once in the forward
and once more where model.remat=full computes the layer again for the gradient; with accumulation
for each microbatch, and once more, as the forward of a microbatch is computed again as well. Its
gradient is summed and split once a microbatch: S (n-1)/n as a reduce-scatter. Embedding and head
are in no layer: they are gathered once less. Router statistics, norms and the loss are left out.
"""

import json
import math
import sys
from pathlib import Path

BFLOAT16 = 2
GIB = 1 << 30
NAMES = ("all-gather", "reduce-scatter", "all-reduce")


def expected(report: dict) -> tuple[float, float]:
    """(gathered, reduced and scattered) bytes that one device receives in a step."""
    microbatches = report["accumulation_steps"]
    gathers = 2 if microbatches == 1 else 3
    gathered = scattered = 0.0
    for name, row in report["shardings"].items():
        # An axis of an array is whole, split over one axis of the mesh, or over several.
        split = (axes if isinstance(axes, list) else [axes] for axes in row["spec"] if axes)
        n = math.prod(report["mesh"][axis] for axes in split for axis in axes)
        moved = BFLOAT16 * math.prod(row["shape"]) * (n - 1) / n
        gathered += microbatches * (gathers - (not name.startswith("stack/"))) * moved
        scattered += microbatches * moved
    return gathered, scattered


def fit_row(report: dict) -> list[str]:
    """One row of the table of what fits."""
    mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    sizes = ("state_bytes_per_device", "peak_bytes_per_device", "hbm_bytes_per_device")
    return [
        f"{report['config']} on {report['topology']}",
        mesh,
        f"{report['batch_size']} x {report['sequence_length']}",
        str(report["accumulation_steps"]),
        *(f"{report[size] / GIB:.1f}" for size in sizes),
        "yes" if report["fits"] else "**no**",
        f"{report['flops'] / 1e15:.1f}",
        f"{report['counted_flops'] / 1e15:.1f}",
        f"{report['seconds_at_peak']:.2f}",
        f"{report['compile_seconds']:.0f}",
    ]


def bytes_row(report: dict) -> list[str]:
    """One row of the table of exchanged bytes."""
    gathered, scattered = expected(report)
    found = {kind: report["collectives"].get(kind, {"count": 0, "bytes": 0}) for kind in NAMES}
    mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    return [
        f"{report['config']} on {report['topology']} ({mesh})",
        f"{gathered / GIB:.1f}",
        f"{scattered / GIB:.1f}",
        *(f"{found[kind]['bytes'] / GIB:.1f} in {found[kind]['count']:,}" for kind in NAMES),
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---" if i == 0 else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def main(files: list[str]) -> None:
    """Prints both tables."""
    reports = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    sizes = ["state GiB", "step GiB", "of GiB", "fits"]
    work = ["PFLOPs", "in program", "s at peak", "compile s"]
    head = ["config", "mesh", "rows x tokens", "microbatches", *sizes, *work]
    print(table(head, [fit_row(report) for report in reports]), end="\n\n")
    head = ["config", "gather by formula, GiB", "scatter by formula, GiB", *NAMES]
    print(table(head, [bytes_row(report) for report in reports if report["compiled"]]))


if __name__ == "__main__":
    main(sys.argv[1:])
