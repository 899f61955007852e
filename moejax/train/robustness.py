"""The "robustness" evaluator: how often the class is found in noisy and in blurred pictures.

Reported under ``robustness/``, over the pictures of the split that have a label: ``clean``,
``noise_S`` for Gaussian noise of S grey levels of 255 (``eval.robustness.noise``), ``blur_S`` for a
Gaussian blur of S pixels (``eval.robustness.blur``), and ``majority_clean``, the accuracy of the
most frequent class of the training split. The noise of a picture follows from
``eval.robustness.seed`` and the picture's number in the split. A curve of each is drawn.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from moejax.config.schema import Config
from moejax.objectives.classification import labelled, rank_of_label
from moejax.ops.corrupt import add_noise, blur
from moejax.train.accuracy import check_classes
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult
from moejax.train.rows_shown import check_one_size

NAME = "robustness"


@EVALUATORS.register(NAME)
def robustness(context: EvalContext) -> EvalResult:
    """See the module docstring. Needs a model with classes and labelled pictures."""
    model, levels = context.model, context.config.eval.robustness
    key = jax.random.key(levels.seed)
    damages: dict[str, Any] = {"clean": lambda images, index: images}
    for std in levels.noise:
        damages[_name("noise", std)] = lambda images, index, std=std: add_noise(
            key, images, index, std
        )
    for sigma in levels.blur:
        damages[_name("blur", sigma)] = lambda images, index, sigma=sigma: blur(images, sigma)
    # The model is compiled once. Names hold what a program depends on.
    damages = {
        name: context.kept(f"{NAME} {levels.seed} {name}", lambda damage=damage: jax.jit(damage))
        for name, damage in damages.items()
    }

    def right(params: Any, batch: dict) -> jax.Array:
        logits = model.apply({"params": params}, batch, train=False).logits
        counted = labelled(batch)
        rank = rank_of_label(logits, batch["labels"] * counted)
        return (counted & (rank == 0)).sum()

    forward = context.program(NAME, right)
    counts = context.train_pipeline.label_counts(context.config.model.num_classes)
    found, majority, pictures = dict.fromkeys(damages, 0), 0, 0
    for batch, on_device in context.batches():
        counted = labelled(batch)
        pictures += int(counted.sum())
        majority += int((counted & (batch["labels"] == counts.argmax())).sum())
        for name, damage in damages.items():
            images = damage(on_device["images"], on_device["index"])
            found[name] += int(forward(context.params, {**on_device, "images": images}))
    share = lambda number: number / pictures if pictures else float("nan")
    values = {f"{NAME}/{name}": share(number) for name, number in found.items()}
    values[f"{NAME}/majority_clean"] = share(majority)
    return EvalResult(values, {NAME: draw_curves(values, levels.noise, levels.blur)})


def check(config: Config) -> None:
    """UserError unless the model has classes, of one task, and a row of a batch is a picture."""
    check_classes(config, NAME)
    check_one_size(config, NAME)


def metric_names(config: Config) -> list[str]:
    """What :func:`robustness` returns."""
    levels = config.eval.robustness
    names = [_name("noise", std) for std in levels.noise]
    names += [_name("blur", sigma) for sigma in levels.blur]
    return [f"{NAME}/{name}" for name in ("clean", *names, "majority_clean")]


robustness.check = check
robustness.metric_names = metric_names


def _name(kind: str, level: float) -> str:
    return f"{kind}_{level:g}"


def draw_curves(
    values: Mapping[str, float], noise: Sequence[float], blurs: Sequence[float]
) -> UInt8[np.ndarray, "h w 3"]:
    """Accuracy against the strength of each damage, from none on; the majority class dashed."""
    from matplotlib.figure import Figure
    from PIL import Image

    panels = [("noise", noise, "standard deviation of the noise, grey levels of 255")]
    panels += [("blur", blurs, "standard deviation of the blur, pixels")]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
    plots = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for plot, (kind, levels, label) in zip(plots, panels, strict=True):
        levels = sorted(levels)
        found = [values[f"{NAME}/{_name(kind, level)}"] for level in levels]
        plot.plot([0, *levels], [values[f"{NAME}/clean"], *found], marker="o", label="model")
        plot.axhline(
            values[f"{NAME}/majority_clean"], color="#5f6b7a", ls="--", label="majority class"
        )
        plot.set_xlabel(label)
        plot.set_ylim(0, 1)
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("accuracy")
    plots[0].legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB"))
