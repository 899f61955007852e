"""The "samples" evaluator: pictures of held-out captions, the same ones at every evaluation.

Draws one grid, named ``samples``: each caption with its real picture and the model's. Captions and
random numbers are fixed, so that the grids of a run differ by its parameters alone.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import numpy as np

from moejax.axes import BATCH_AXES
from moejax.config.schema import Config
from moejax.errors import UserError
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult

if TYPE_CHECKING:
    from moejax.generate.samples import Example

CAPTIONS = 8
# As `moejax sample` draws.
TOP_P, GUIDANCE = 0.95, 2.0


@EVALUATORS.register("samples")
def samples(context: EvalContext) -> EvalResult:
    """Draws pictures of fixed held-out captions: a grid for every evaluation, no numbers."""
    from moejax.generate.api import sample_images, sampler_of
    from moejax.generate.images import GridRow, Tile, draw_grid
    from moejax.generate.samples import cut_caption
    from moejax.generate.sampling import Sampling

    split = context.split or context.config.eval.split
    sampler = context.kept("sampler", lambda: sampler_of(context.with_params(None)))
    examples = context.kept(f"captions of {split}", functools.partial(_examples, context, split))
    captions = [cut_caption(sampler, example.text) for example in examples]
    # Rows are split over the devices; a picture depends on none of the other rows.
    shards = math.prod(context.mesh.shape[axis] for axis in BATCH_AXES)
    rows = -(-len(captions) // shards) * shards
    pictures = sample_images(
        dataclasses.replace(sampler, params=context.params, batch_size=rows),
        (captions * rows)[:rows],
        sampling=Sampling(top_p=TOP_P, guidance=GUIDANCE),
    )
    grid = [
        GridRow(
            example.shown,
            "",
            [Tile(image, label) for image, label in ((example.image, "real"), (picture, "sample"))],
        )
        for example, picture in zip(examples, pictures, strict=False)
    ]
    header = f"captions of the {split} split, seed 0, top-p {TOP_P}, guidance {GUIDANCE}"
    drawn = draw_grid(grid, header, columns=2, panels=2)
    return EvalResult({}, {"samples": np.asarray(drawn)})


def check(config: Config) -> None:
    """UserError unless the model writes pictures after captions."""
    from moejax.generate.api import check_can_sample

    check_can_sample(config)
    if config.data.order == "image_first":
        raise UserError(
            "eval.metrics: 'samples' draws pictures of captions, and data.order=image_first "
            "trains none; leave it out or use data.order=random"
        )
    if jax.process_count() > 1:
        raise UserError(
            "eval.metrics: 'samples' runs on one host; leave it out, and use moejax sample"
        )


def metric_names(config: Config) -> list[str]:
    """It measures nothing."""
    del config
    return []


samples.check = check
samples.metric_names = metric_names


def _examples(context: EvalContext, split: str) -> "list[Example]":
    """``CAPTIONS`` records of different captions (or all there are), picked by seed 0."""
    from moejax.generate.samples import Examples

    examples = Examples(context.config.data, split, context.pipeline.source)
    found: dict[str, Example] = {}
    for index in np.random.default_rng(0).permutation(len(examples)):
        example = examples.get(int(index))
        if example.text:
            found.setdefault(example.text, example)
        if len(found) == CAPTIONS:
            break
    if not found:
        raise UserError(f"eval.metrics: 'samples' needs captions, and split {split!r} has none")
    return list(found.values())
