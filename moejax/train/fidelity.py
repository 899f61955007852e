"""The "fidelity" evaluator: how good the pictures are that a model draws.

``eval.fidelity.pictures`` pictures are drawn, of classes as frequent as in training, always with
the same random numbers, and compared with real ones (moejax/analysis/fidelity/pictures.py).
Reported under ``fidelity/``: ``fd_efflite0`` (a Frechet distance in EfficientNet-Lite0; no FID) and
``kid_efflite0`` with their spread, ``precision``, ``recall``, ``density``, ``coverage``, beside
``floor_...``, the same of real pictures; ``nearer_to_train``, ``memorised``, ``memorised_pixels``,
beside ``chance_...``; and with ``eval.fidelity.classifier``, the workdir of a classifier,
``class_accuracy`` beside ``real_class_accuracy``. Some samples are drawn in a grid, each with the
nearest training picture.

How a model draws pictures is one function, registered by ``model.name``::

    @DRAWERS.register("mine")
    def mine(context: EvalContext) -> Draw: ...
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.analysis.fidelity.pictures import RealPictures, metric_names, read_pictures
from moejax.config import Registry
from moejax.config.checks import require
from moejax.config.diffusion import Diffusion
from moejax.config.schema import Config
from moejax.data.prepare.efficientnet import installed_weights
from moejax.data.prepare.stages import track
from moejax.errors import UserError
from moejax.generate.api import check_can_sample, sample_images, sampler_of
from moejax.generate.drawing import Drawing, check_drawing
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult, eval_plans

NAME = "fidelity"
SHOWN = 16
FILLER = -2

# draw(params, labels [b] int32, rng) -> pictures [b, h, w, 3] uint8, where b is data.batch_size and
# -1 stands for no class. The last rows may be labelled FILLER: they fill up the batch, and need no
# pictures. Called inside of jax.set_mesh; the same arguments give the same pictures.
Draw = Callable[[Any, np.ndarray, jax.Array], Any]
# model.name -> function(EvalContext) -> Draw
DRAWERS: Registry[Callable[[EvalContext], Draw]] = Registry("way to draw pictures with model")


@DRAWERS.register("dit")
def draw_denoised(context: EvalContext) -> Draw:
    """By the sampler, steps and guidance of ``eval.fidelity``; a class that the model has for each.

    Of other labels, and so by models without classes, pictures are drawn with nothing said.
    """
    from moejax.generate.denoiser import denoiser_of, draw_pictures

    sampler = denoiser_of(context.with_params(None))
    drawing = check_drawing(_drawing_of(context.config), sampler.diffusion)
    sampler = dataclasses.replace(sampler, drawing=drawing)

    def draw(params: Any, labels: np.ndarray, rng: jax.Array) -> np.ndarray:
        own = dataclasses.replace(sampler, params=params, batch_size=len(labels))
        known = sampler.model.config.num_classes
        conditions = [
            int(label) if 0 <= label < known else None for label in labels if label != FILLER
        ]
        # A seed of 32 bits: rows are numbered from 0 in each batch.
        seed = int(jax.random.bits(rng) >> 1)
        return draw_pictures(own, conditions, seed=seed, fill=True).pictures

    return draw


@DRAWERS.register("decoder")
def draw_sequences(context: EvalContext) -> Draw:
    """Pictures without a caption, whatever the labels.

    Those that are latents by the sampler and the steps of ``eval.fidelity``.
    """
    sampler = sampler_of(context.with_params(None))
    if sampler.diffusion is not None:
        drawing = check_drawing(_drawing_of(context.config), sampler.diffusion)
        sampler = dataclasses.replace(sampler, drawing=drawing)

    def draw(params: Any, labels: np.ndarray, rng: jax.Array) -> np.ndarray:
        own = dataclasses.replace(sampler, params=params, batch_size=len(labels))
        return sample_images(own, [""] * len(labels), seed=int(jax.random.bits(rng) >> 1))

    return draw


def _drawing_of(config: Config) -> Drawing:
    options = config.eval.fidelity
    return Drawing(sampler=options.sampler, steps=options.steps, guidance=options.guidance)


@EVALUATORS.register(NAME)
def fidelity(context: EvalContext) -> EvalResult:
    """See the module docstring. Needs a model that draws pictures, and the extra "metrics".

    Raises:
      UserError: on the training split.
    """
    options = context.config.eval.fidelity
    source = context.train_pipeline.source
    split = context.split or context.config.eval.split
    _require_held_out(split)
    real, label_pool = _real_of_process(context, split)
    rng = np.random.default_rng(options.seed)
    labels = rng.choice(label_pool, options.pictures).astype(np.int32)
    # No other is what a picture is said to show.
    labels = np.where(labels < getattr(context.config.model, "num_classes", 0), labels, -1)
    draw = context.kept(f"{NAME} draw", lambda: DRAWERS.get(context.config.model.name)(context))
    samples = draw_samples(
        draw, context.params, labels, jax.random.key(options.seed), context.config.data.batch_size
    )
    values = real.compare(samples)
    categories = tuple(getattr(source, "categories", ()))
    if options.classifier:
        from moejax.train.classifier import class_accuracy, load_classifier

        judge = context.kept(f"{NAME} classifier", lambda: load_classifier(options.classifier))
        values |= class_accuracy(
            judge,
            samples,
            labels,
            categories=categories,
            num_classes=getattr(context.config.model, "num_classes", 0),
        )
    values = {f"{NAME}/{name}": value for name, value in values.items()}
    shown = samples[:SHOWN]
    grid = _grid(shown, real.nearest_training(shown), labels[:SHOWN], categories)
    return EvalResult(values, {NAME: grid}, notes=(real.describe(),))


def check(config: Config) -> None:
    """UserError unless the model draws pictures, and what judges them is there."""
    if config.model.name not in DRAWERS:
        raise UserError(
            f"eval.metrics: 'fidelity' needs a model that draws pictures ({', '.join(DRAWERS)}), "
            f"not model.name={config.model.name}; leave it out"
        )
    options, diffusion = config.eval.fidelity, _diffusion_of(config)
    if config.model.name == "decoder":
        check_can_sample(config)
        require(
            config.data.drop_text > 0,
            "eval.metrics",
            "'fidelity' draws pictures without a caption, which data.drop_text=0 trains none of; "
            "leave it out",
        )
    require(
        not options.classifier or getattr(config.model, "num_classes", 0) > 0,
        "eval.fidelity.classifier",
        f"judges pictures of classes, which model.name={config.model.name} is not told; leave it "
        "out",
    )
    if diffusion is not None:
        try:
            check_drawing(_drawing_of(config), diffusion)
        except UserError as error:
            raise UserError(_of_fields(str(error))) from error
    if jax.process_count() > 1:
        raise UserError("eval.metrics: 'fidelity' runs on one host; leave it out, use moejax eval")
    for plan in eval_plans(config.eval):
        if plan.name == NAME:
            _require_held_out(plan.split)
    folder = config.eval.fidelity.classifier
    if folder and not (Path(folder) / "config.json").is_file():
        raise UserError(f"eval.fidelity.classifier: no run in {folder} (no config.json)")
    installed_weights()


def _diffusion_of(config: Config) -> Diffusion | None:
    """The process by which the model draws pictures; None of one of our own, and of codes."""
    if config.model.name == "dit":
        return config.objective
    latents = getattr(config.model, "latents", None)
    return config.objective.diffusion if latents is not None and latents.channels else None


def _of_fields(message: str) -> str:
    """What is said of a flag, said of the field that it is here."""
    fields = {"--sampler": "sampler", "--denoise-steps": "steps", "--guidance": "guidance"}
    for flag, field in fields.items():
        message = message.replace(f"{flag}:", f"eval.{NAME}.{field}:")
    return message


def _require_held_out(split: str) -> None:
    """UserError for the training split: all of its pictures are as near as copies are."""
    if split == "train":
        raise UserError(
            "eval.metrics: 'fidelity' tells copies by pictures that were not trained on; run it on "
            "the split val or test, not on train"
        )


def names(config: Config) -> list[str]:
    """What :func:`fidelity` returns."""
    found = metric_names()
    if config.eval.fidelity.classifier:
        found += ["class_accuracy", "real_class_accuracy"]
    return [f"{NAME}/{name}" for name in found]


fidelity.check = check
fidelity.metric_names = names


def draw_samples(
    draw: Draw, params: Any, labels: np.ndarray, rng: jax.Array, batch_size: int
) -> np.ndarray:
    """A picture for each label, [n, h, w, 3] uint8, batch by batch of always the same size."""
    found = []
    starts = range(0, len(labels), batch_size)
    for start in track(starts, f"drawing, {batch_size} pictures at a time", len(starts)):
        part = labels[start : start + batch_size]
        part = np.pad(part, (0, batch_size - len(part)), constant_values=FILLER)
        drawn = draw(params, part, jax.random.fold_in(rng, start // batch_size))
        found.append(np.asarray(drawn))
    return np.concatenate(found)[: len(labels)]


# Describing real pictures takes a minute: they are kept for the next run of this process.
_REAL: dict[tuple, tuple[RealPictures, np.ndarray]] = {}


def _real_of_process(context: EvalContext, split: str) -> tuple[RealPictures, np.ndarray]:
    options = context.config.eval.fidelity
    sources = context.train_pipeline.source.version, context.pipeline.source.version
    counts = options.pictures, options.draws, options.reference, options.neighbours
    key = (*sources, split, *counts, options.seed)
    if key not in _REAL:
        _REAL.clear()
        _REAL[key] = _real_pictures(context)
    return _REAL[key]


def _real_pictures(context: EvalContext) -> tuple[RealPictures, np.ndarray]:
    """What samples are compared with, and the labels of the training pictures."""
    options = context.config.eval.fidelity
    rng = np.random.default_rng(options.seed)
    train, held_out = context.train_pipeline.source, context.pipeline.source
    rows = rng.permutation(len(train))[: options.reference or None]
    pictures, labels = read_pictures(train, rows)
    others, _ = read_pictures(held_out, rng.permutation(len(held_out))[: options.pictures])
    real = RealPictures(
        pictures,
        options.pictures,
        others,
        draws=options.draws,
        k=options.neighbours,
        seed=options.seed,
        name="eval.fidelity.pictures",
    )
    return real, labels


def _grid(
    samples: np.ndarray, nearest: np.ndarray, labels: np.ndarray, categories: tuple[str, ...]
) -> np.ndarray:
    from moejax.generate.images import GridRow, Tile, draw_grid, drawable

    rows = []
    for sample, near, label in zip(samples, nearest, labels, strict=True):
        known = 0 <= label < len(categories)
        title = drawable(categories[label]) if known else ""
        rows.append(GridRow(title, "", [Tile(sample, "sample"), Tile(near, "nearest")]))
    header = "samples, each beside the nearest training picture, in pixels"
    return np.asarray(draw_grid(rows, header, columns=2, panels=2))
