"""What deciding without later tokens in sight costs the arms of a comparison.

    python experiments/depth_price.py runs/experiments/mod_text_image_cpu experiments/mod

The evaluator "depth" on the last checkpoint of each run that the comparison reports: the loss as
decoded beside the loss with the choices of training, and how often the causal rule agrees with
them. Writes price.csv and price.md (means over seeds, and from the lowest to the highest) into the
second folder. Arms without a block that tokens can skip, or a rule that decides it, are left out.
"""

import csv
import sys
from pathlib import Path

from moejax.analysis.compare.arms import folder_name
from moejax.errors import UserError
from moejax.train.evaluate import eval_plans, run_evaluators
from moejax.train.load import load

VALUES = {
    "agreement": "depth/agreement",
    "ran": "depth/ran",
    "text as decoded": "depth/text/loss",
    "text as trained": "depth/text/loss_as_trained",
    "pictures as decoded": "depth/image/loss",
    "pictures as trained": "depth/image/loss_as_trained",
}


def reported_runs(work: Path) -> list[tuple[str, int, Path]]:
    """(arm, seed, workdir) of the runs at the learning rate that each arm was given."""
    with (work / "comparison.csv").open() as file:
        rows = [(row["arm"], row["seed"], row["learning_rate"]) for row in csv.DictReader(file)]
    return [
        (arm, int(seed), work / f"runs/{folder_name(arm)}/rate={float(rate):g},seed={seed}")
        for arm, seed, rate in dict.fromkeys(rows)
    ]


def price_of(workdir: Path) -> dict[str, float] | None:
    """The values of a run, or None where no token can skip a block, or no rule says which."""
    try:
        context = load(workdir).eval_context(None, ["depth"])
    except UserError:
        return None
    if context.config.model.depth.causal_rule == "none":
        return None
    values = run_evaluators(context, eval_plans(context.config.eval)).values
    return {name: values[key] for name, key in VALUES.items() if key in values}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: depth_price.py FOLDER_OF_COMPARISON FOLDER_FOR_THE_TABLE")
    work, out = map(Path, sys.argv[1:])
    rows = []
    for arm, seed, workdir in reported_runs(work):
        price = price_of(workdir)
        if price:
            rows.append({"arm": arm, "seed": seed, **price})
            print(arm, seed, {name: round(value, 4) for name, value in price.items()}, flush=True)
    with (out / "price.csv").open("w") as file:
        writer = csv.DictWriter(file, ["arm", "seed", *VALUES])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| arm | seeds | " + " | ".join(VALUES) + " |", "|---|--:|" + "--:|" * len(VALUES)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = [arm, str(len(own)), *(_spread(own, name) for name in VALUES)]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "price.md").write_text("\n".join(lines) + "\n")


def _spread(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
