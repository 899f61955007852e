"""Drop rate over the tenths of a row, of each policy: drops.csv and drops.png."""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from moejax.analysis.compare.matching import mean_interval
from moejax.analysis.routing_record import read_records

POLICIES = ("order", "priority")
TENTHS = 10


def drop_rates(workdir: Path) -> np.ndarray:
    """The share of choices dropped in each tenth of the rows, over all layers."""
    records = read_records(workdir, "val")
    record = records[max(records)]
    return record.dropped.sum(axis=0) / record.choices.sum(axis=0)


def main(work: Path, out: Path) -> None:
    """Reads the runs below ``work``, writes into ``out`` and prints the first and last tenths."""
    rows = []
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for policy in POLICIES:
        runs = sorted((work / policy).glob("seed=*"))
        rates = np.array([drop_rates(run) for run in runs])
        for run, one in zip(runs, rates, strict=True):
            rows += [(policy, run.name, tenth + 1, rate) for tenth, rate in enumerate(one)]
        bands = [mean_interval(rates[:, tenth]) for tenth in range(TENTHS)]
        x = np.arange(TENTHS) * 10 + 5
        (line,) = panel.plot(x, [100 * band.mean for band in bands], ".-", label=policy)
        if len(runs) > 1:
            low, high = ([100 * getattr(band, end) for band in bands] for end in ("low", "high"))
            panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        late = mean_interval(rates[:, -1] - rates[:, 0])
        print(
            f"{policy}: first tenth {bands[0].mean:.2%}, last {bands[-1].mean:.2%}; last less "
            f"first {late.mean:.2%} [{late.low:.2%}, {late.high:.2%}], {len(runs)} seeds"
        )
    panel.set(xlabel="place in the row (%)", ylabel="choices dropped (%)", ylim=(0, None))
    panel.legend(title="who is dropped", frameon=False)
    figure.savefig(out / "drops.png", dpi=130, metadata={"Software": None})
    with (out / "drops.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("policy", "run", "tenth", "drop_rate"))
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
