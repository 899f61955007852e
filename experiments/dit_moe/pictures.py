"""What the arms of this comparison draw, and how good it is.

    python experiments/dit_moe/pictures.py runs/experiments/dit_moe_fashion_mnist_cpu OUT.png

Writes OUT: the first two samples of each class from each arm (seed 0, the same noise for all, drawn
as those that are judged), below real pictures.
"""

import csv
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

from moejax.analysis.compare.arms import folder_name
from moejax.generate.denoiser import Drawing, draw_pictures, load_denoiser
from moejax.generate.images import GridRow, Tile, draw_grid, save_png
from moejax.train.load import load
from moejax.train.setup import open_pipeline

EACH = 2


def runs_of_seed_0(work: Path) -> dict[str, Path]:
    """The run of each arm at the learning rate that it was given."""
    with (work / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "0"]
    rates = {row["arm"]: float(row["learning_rate"]) for row in rows}
    return {
        arm: work / f"runs/{folder_name(arm)}/rate={rate:g},seed=0" for arm, rate in rates.items()
    }


def grid(work: Path):
    """A row of real pictures, and one for each arm."""
    rows = []
    for arm, folder in runs_of_seed_0(work).items():
        config = load(folder).config
        sampler = dataclasses.replace(load_denoiser(folder), drawing=drawing_of(config))
        classes = range(sampler.model.config.num_classes)
        labels = [label for label in classes for _ in range(EACH)]
        if not rows:
            source = open_pipeline(config, "test").source
            rows.append(GridRow("real", "test split", real_tiles(source, labels)))
        drawn = draw_pictures(sampler, labels, seed=0).pictures
        rows.append(GridRow(arm, "", [Tile(picture) for picture in drawn]))
    header = "Fashion-MNIST: the first samples of each class, the same noise for all (seed 0)"
    return draw_grid(rows, header, columns=len(labels), panels=1)


def drawing_of(config) -> Drawing:
    """As the samples are drawn that the evaluator ``fidelity`` judges."""
    options = config.eval.fidelity
    return Drawing(sampler=options.sampler, steps=options.steps, guidance=options.guidance)


def real_tiles(source, labels: list[int]) -> list[Tile]:
    """The first pictures of each class of a split."""
    found = defaultdict(list)
    for number in range(len(source)):
        found[source[number]["label"]].append(source[number]["image"])
        if all(len(found[label]) >= EACH for label in labels):
            break
    return [Tile(found[label].pop(0), source.categories[label]) for label in labels]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: pictures.py FOLDER_OF_COMPARISON OUT.png")
    save_png(grid(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
