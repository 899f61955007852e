"""The samples of diffusion models: of classes, on the way, by the weight of guidance.

Those of texts and of nothing said are moejax/generate/samples.py's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.config.schema import DiTConfig
from moejax.generate import samples
from moejax.generate.api import Sampler, draw_captions
from moejax.generate.denoiser import Condition, draw_pictures
from moejax.generate.drawing import Drawn
from moejax.generate.images import GridRow, Tile, drawable
from moejax.generate.samples import (
    Example,
    Outcome,
    Request,
    cut_caption,
    describe,
    median,
    neighbour_tile,
    pick_examples,
)

# Pictures on the way that a strip shows, and how many strips and sweeps there are at most.
FRAMES, ROWS = 8, 10
WEIGHTS = (1.0, 1.5, 2.0, 3.0, 5.0)


def sample_mode(mode: str, request: Request) -> Outcome:
    """The samples of one of :func:`modes_of` the model; writes nothing."""
    own: dict[str, Callable[[Request], Outcome]] = {
        "class2image": class_to_image,
        "denoising": denoising,
        "guidance": guidance,
    }
    return own[mode](request) if mode in own else samples.sample_mode(mode, request)


def modes_of(config: DiTConfig) -> tuple[str, ...]:
    """What a model of pictures alone can be asked for."""
    told = ("class2image",) if config.num_classes else ()
    told += ("text2image",) if config.text_length else ()
    # Without anything said there is nothing to guide by.
    return (*told, "unconditional", *(("denoising", "guidance") if told else ()))


def class_to_image(request: Request) -> Outcome:
    """Pictures of each class, beside a real one of the split; of many classes of some."""
    sampler = request.sampler
    classes = some_classes(sampler.model.config.num_classes, request.count)
    each = request.count // len(classes)
    examples = class_examples(request, classes)
    conditions = [label for label in classes for _ in range(each)]
    drawn = draw_pictures(sampler, conditions, seed=request.seed, progress=request.progress)
    neighbours = request.train_images.nearest(drawn.pictures)
    grid, rows, lines = [], [], []
    for i, label in enumerate(classes):
        own = slice(i * each, (i + 1) * each)
        example = examples.get(label)
        name = example.shown if example else f"class {label}"
        real = None if example is None else example.image
        tiles = [] if real is None else [Tile(real, "real")]
        lines += ["", f"[class {label}] {name}"]
        for k, (picture, near) in enumerate(
            zip(drawn.pictures[own], neighbours[own], strict=True), 1
        ):
            tiles += [Tile(picture, f"sample {k}"), neighbour_tile(near)]
            lines.append(f"  sample {k}: {describe(near)}")
        grid.append(GridRow(name, f"class {label}", tiles))
        samples = [{"nearest": near.document()} for near in neighbours[own]]
        rows.append({"label": label, "name": name, "samples": samples})
    summary = {"median_distance": median([near.distance for near in neighbours])}
    columns = min(9, max(len(row.tiles) for row in grid))
    return Outcome("class2image", grid, columns, rows, lines, summary)


def denoising(request: Request) -> Outcome:
    """Strips of the pictures that the model has in mind on the way, from noise to the sample."""
    sampler = request.sampler
    shown = _shown(request, request.count)
    steps = sampler.drawing.steps
    keep = tuple(dict.fromkeys(np.linspace(0, steps - 1, FRAMES).round().astype(int).tolist()))
    drawn = _draw(
        sampler,
        [condition for condition, _ in shown],
        seed=request.seed,
        keep=keep,
        progress=request.progress,
    )
    labels = [f"time {time:.3g}" for time in drawn.times]
    grid = [
        GridRow(name, "", [Tile(x, label) for x, label in zip(frames, labels, strict=True)])
        for (_, name), frames in zip(shown, drawn.kept.swapaxes(0, 1), strict=True)
    ]
    rows: list[dict[str, Any]] = [{"shows": name} for _, name in shown]
    lines = ["", "times: " + ", ".join(f"{time:.4g}" for time in drawn.times)]
    lines += [f"row {i}: {name}" for i, (_, name) in enumerate(shown, 1)]
    return Outcome("denoising", grid, len(keep), rows, lines, {"steps": steps})


def guidance(request: Request) -> Outcome:
    """The same noise under several weights of guidance, and how near the training pictures are.

    One sweep at least, also if ``request.count`` is less than its pictures.
    """
    sampler = request.sampler
    shown = _shown(request, max(1, request.count // len(WEIGHTS)))
    conditions = [condition for condition, _ in shown for _ in WEIGHTS]
    drawn = _draw(
        sampler,
        conditions,
        seed=request.seed,
        row_ids=[i for i in range(len(shown)) for _ in WEIGHTS],
        guidance=[*WEIGHTS] * len(shown),
        progress=request.progress,
    )
    neighbours = request.train_images.nearest(drawn.pictures)
    grid, rows, lines = [], [], []
    for i, (_, name) in enumerate(shown):
        own = slice(i * len(WEIGHTS), (i + 1) * len(WEIGHTS))
        near = neighbours[own]
        tiles = [
            Tile(picture, f"w {weight:g}, nearest {found.distance:.1f}")
            for picture, weight, found in zip(drawn.pictures[own], WEIGHTS, near, strict=True)
        ]
        grid.append(GridRow(name, "", tiles))
        weighed = zip(WEIGHTS, near, strict=True)
        samples = [{"weight": weight, "nearest": found.document()} for weight, found in weighed]
        rows.append({"shows": name, "samples": samples})
        lines += ["", name]
        lines += [
            f"  weight {weight:g}: {describe(found)}"
            for weight, found in zip(WEIGHTS, near, strict=True)
        ]
    summary = {
        f"median_distance_at_{weight:g}": median(
            [near.distance for near in neighbours[k :: len(WEIGHTS)]]
        )
        for k, weight in enumerate(WEIGHTS)
    }
    return Outcome("guidance", grid, len(WEIGHTS), rows, lines, summary)


def _draw(sampler: Any, conditions: Sequence[Any], **options: Any) -> Drawn:
    """By a model of pictures alone, or by one that writes them into its sequences as latents."""
    if isinstance(sampler, Sampler):
        return draw_captions(sampler, conditions, **options)
    return draw_pictures(sampler, conditions, **options)


def some_classes(classes: int, most: int) -> list[int]:
    """At most so many of the classes, spread evenly over them."""
    number = min(classes, most)
    return [i * classes // number for i in range(number)]


def class_examples(request: Request, classes: Sequence[int]) -> dict[int, Example]:
    """A record of each class, from the split that is asked for; classes without one are missing."""
    found: dict[int, Example] = {}
    source = request.held_out.source
    for index in range(len(source)):
        label = source[index].get("label", -1)
        if label in classes and label not in found:
            found[label] = request.held_out.get(index)
            if len(found) == len(classes):
                break
    return found


def _shown(request: Request, most: int) -> list[tuple[Condition, str]]:
    """At most so many things to show, and ``ROWS``, with their names: prompts, texts or classes."""
    sampler, most = request.sampler, min(most, ROWS)
    if request.prompts:
        return [(text, drawable(text, "?")) for text in request.prompts[:most]]
    if sampler.text_tokenizer is not None:
        examples = pick_examples(request, most)
        return [(cut_caption(sampler, example.text), example.shown) for example in examples]
    classes = some_classes(sampler.model.config.num_classes, most)
    examples = class_examples(request, classes)
    name = lambda label: examples[label].shown if label in examples else f"class {label}"
    return [(label, name(label)) for label in classes]
