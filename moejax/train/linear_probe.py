"""The "linear_probe" evaluator: what a linear classifier of a model's features finds.

The model is not trained. Features are its ``outputs.pooled``; of a model of pictures and texts they
are ``outputs.image``, the picture in the common space, of length one, with a text that is padding
alone. Classifiers are ridge regressions in closed form (moejax/analysis/probe.py), on the labelled
pictures of the training split, and their accuracy is that on the split. Reported under ``probe/``:

* ``accuracy``: with all training pictures (at most ``eval.probe.pictures``), with the penalty that
  classifies a fifth of the training families best, which is ``penalty``; the split itself chooses
  nothing;
* ``K_shot``, ``K_shot_spread``: with K pictures of each class, mean and standard deviation over
  ``eval.probe.draws`` draws; their penalty is fixed;
* ``majority_accuracy``: of the most frequent class of the training pictures.

Features are standardised by all training pictures, for which no label is needed. With
``eval.probe.source`` the pictures are those of another source, such as a domain that the model has
never seen.
"""

from typing import Any

import numpy as np

from moejax.analysis.probe import Labelled, Ridge, Scale, choose_penalty, few_shot
from moejax.config.checks import require
from moejax.config.schema import Config
from moejax.data.sources import open_source
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.models.two_towers import PairOutput
from moejax.parallel.batches import put_batch
from moejax.train.evaluate import EVALUATORS, EvalContext


@EVALUATORS.register("linear_probe")
def linear_probe(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs a model with features of labelled pictures."""
    probe = context.config.eval.probe
    train_source, test_source = _sources(context)
    rng = np.random.default_rng(probe.seed)
    order = rng.permutation(len(train_source))[: probe.pictures or None]
    train = features(context, train_source, np.sort(order))
    size = context.config.data.batch_size
    most = context.config.eval.batches * size or len(test_source)
    test = features(context, test_source, np.arange(min(most, len(test_source))))
    for data, split in ((train, "train"), (test, test_source.split)):
        if not len(data.labels_n):
            raise UserError(
                f"eval.metrics: 'linear_probe': {train_source.name} has no labelled pictures in "
                f"{split!r}; choose another with eval.probe.source"
            )
    if len(set(train.families)) < 2:
        raise UserError(
            f"eval.metrics: 'linear_probe': the training pictures of {train_source.name} are of "
            "one family, so that none can choose the penalty; use another source"
        )
    classes = 1 + int(max(train.labels_n.max(), test.labels_n.max()))
    scale = Scale.of(train.x_nd)
    train = Labelled(scale(train.x_nd), train.labels_n, train.families)
    test = Labelled(scale(test.x_nd), test.labels_n, test.families)
    penalty = choose_penalty(train, classes, seed=probe.seed)
    right = Ridge(train.x_nd, train.labels_n, classes).classify(test.x_nd, penalty)
    majority = np.bincount(train.labels_n).argmax()
    values = {
        "accuracy": (right == test.labels_n).mean(),
        "majority_accuracy": (test.labels_n == majority).mean(),
        "penalty": penalty,
    }
    for shots in probe.shots:
        found = few_shot(
            train,
            test,
            classes,
            shots=shots,
            draws=probe.draws,
            penalty=probe.shot_penalty,
            seed=probe.seed,
        )
        values |= {f"{shots}_shot": found.mean(), f"{shots}_shot_spread": found.std()}
    return {f"probe/{name}": float(value) for name, value in values.items()}


def check(config: Config) -> None:
    """UserError unless the model reads pictures."""
    require(
        config.data.format in ("images", "pairs"),
        "eval.metrics",
        f"'linear_probe' needs a model of pictures, and model.name={config.model.name} reads "
        "tokens; leave it out",
    )


def metric_names(config: Config) -> list[str]:
    """What :func:`linear_probe` returns."""
    names = ["accuracy", "majority_accuracy", "penalty"]
    for shots in config.eval.probe.shots:
        names += [f"{shots}_shot", f"{shots}_shot_spread"]
    return [f"probe/{name}" for name in names]


linear_probe.check = check
linear_probe.metric_names = metric_names


def _sources(context: EvalContext) -> tuple[Any, Any]:
    """The records to fit on and those to test on."""
    spec = context.config.eval.probe.source
    if not spec:
        return context.train_pipeline.source, context.pipeline.source
    split = context.split or context.config.eval.split

    def opened(part: str) -> Any:
        source = open_source(spec, part, context.config.data)
        require(len(source) > 0, "eval.probe.source", f"{spec} has no records in {part!r}")
        return source

    return tuple(
        context.kept(f"probe {spec} {part}", lambda part=part: opened(part))
        for part in ("train", split)
    )


def features(context: EvalContext, source: Any, rows: np.ndarray) -> Labelled:
    """The features of those of ``rows`` of a source that have a label."""
    model, data = context.model, context.config.data

    def pooled(params: Any, batch: dict) -> Any:
        outputs = model.apply({"params": params}, batch, train=False)
        if isinstance(outputs, PairOutput):
            return outputs.image
        if getattr(outputs, "pooled", None) is None:
            raise UserError(
                "eval.metrics: 'linear_probe' needs a model with pooled features, and "
                f"model.name={context.config.model.name} has none; leave it out"
            )
        return outputs.pooled

    program = context.program("pooled features", pooled)
    size = data.batch_size
    # No words: they are not seen by the picture, nor do they take part in the routing.
    texts = np.full((size, data.sequence_length), PAD, np.int32)
    extra = {"tokens": texts} if data.format == "pairs" else {}
    found, labels, families = [], [], []
    for start in range(0, len(rows), size):
        records = [source[int(row)] for row in rows[start : start + size]]
        records = [record for record in records if record.get("label", -1) >= 0]
        if not records:
            continue
        # Rows that only fill up the batch take no part in the routing.
        images = np.stack([record["image"] for record in records])
        filled = np.concatenate([images, np.repeat(images[:1], size - len(images), axis=0)])
        weights = (np.arange(size) < len(records)).astype(np.float32)
        batch = put_batch({"images": filled, "weights": weights, **extra}, context.mesh)
        found.append(np.asarray(program(context.params, batch), np.float32)[: len(records)])
        labels += [record["label"] for record in records]
        families += [record.get("family", record["id"]) for record in records]
    x_nd = np.concatenate(found) if found else np.zeros((0, 0), np.float32)
    return Labelled(x_nd, np.asarray(labels, np.int64), families)
