"""Bytes that a device receives in a step of fully sharded training: by formula, and compiled.

    python experiments/scale/formula.py experiments/scale/reports/*.json

Each weight is split over n devices. Before use they gather it in bfloat16 (size S): S (n-1)/n
bytes, once in the forward and once more where model.remat=full computes the layer again for the
gradient; with accumulation for each microbatch, and once more, as the forward of a microbatch is
computed again as well. Its gradient is summed and split once a microbatch: S (n-1)/n as a
reduce-scatter. Embedding and head are in no layer: they are gathered once less. Router statistics,
norms and the loss are left out.
"""

import json
import math
import sys
from pathlib import Path

BFLOAT16 = 2
GIB = 1 << 30


def expected(report: dict) -> tuple[float, float]:
    """(gathered, reduced and scattered) bytes that one device receives in a step."""
    microbatches = report["accumulation_steps"]
    gathers = 2 if microbatches == 1 else 3
    gathered = scattered = 0.0
    for name, row in report["shardings"].items():
        n = math.prod(report["mesh"][axis] for axis in row["spec"] if axis is not None)
        moved = BFLOAT16 * math.prod(row["shape"]) * (n - 1) / n
        gathered += microbatches * (gathers - (not name.startswith("stack/"))) * moved
        scattered += microbatches * moved
    return gathered, scattered


def main(files: list[str]) -> None:
    print(
        "| report | gather: formula | all-gather | scatter: formula | reduce-scatter | all-reduce |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    for file in files:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        if not report["compiled"]:
            continue
        gathered, scattered = expected(report)
        kinds = {kind: one["bytes"] for kind, one in report["collectives"].items()}
        read = [kinds.get(kind, 0) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
        cells = [gathered, read[0], scattered, *read[1:]]
        numbers = " | ".join(f"{value / GIB:.1f}" for value in cells)
        print(f"| {Path(file).stem} | {numbers} |")


if __name__ == "__main__":
    main(sys.argv[1:])
