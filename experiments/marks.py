"""The values at the end of a comparison, a mark for each seed.

    python experiments/marks.py FOLDER_OF_COMPARISON OUT.png "TITLE=METRIC" "TITLE=METRIC:REFERENCE"

A panel for each ``TITLE=METRIC`` of the comparison's ``final.csv`` (what ``--also`` named), a row
for each arm; a dashed line at the mean of ``REFERENCE``, another metric, where one is given.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def values_by_metric(path: Path) -> dict[str, dict[str, list[float]]]:
    """The values of all seeds, by metric and arm."""
    values = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            values[row["metric"]][row["arm"]].append(float(row["value"]))
    return values


def figure(values: dict[str, dict[str, list[float]]], panels: list[str]):
    made, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        title, _, metric = panel.partition("=")
        name, _, reference = metric.partition(":")
        for place, found in enumerate(values[name].values()):
            axis.plot(found, [place] * len(found), "o", color="tab:blue", alpha=0.6)
            axis.plot([sum(found) / len(found)], [place], "|", color="black", markersize=18)
        if reference:
            known = [value for found in values[reference].values() for value in found]
            axis.axvline(sum(known) / len(known), color="tab:green", linestyle="--")
        axis.set_yticks(range(len(values[name])), list(values[name]))
        axis.invert_yaxis()
        axis.set_xlabel(title)
    made.suptitle("marks: seeds; line: their mean")
    return made


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit('usage: marks.py FOLDER_OF_COMPARISON OUT.png "TITLE=METRIC[:REFERENCE]" ...')
    work, out, *panels = sys.argv[1:]
    figure(values_by_metric(Path(work) / "final.csv"), panels).savefig(out, dpi=110)


if __name__ == "__main__":
    main()
