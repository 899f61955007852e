"""The "retrieval" evaluator: pictures and texts found by each other, on families never trained on.

A gallery has one record of each of ``GALLERY`` concept families (of all, where a split has fewer),
drawn by a fixed seed, so that exactly one entry is right and chance at k is k over its size. All
values are means over ``DRAWS`` galleries, which are the same for every model:

* ``gallery``: its size;
* ``image/loss``, ``text/loss``: nats of the right text of a picture, and of the right picture of a
  text, in a softmax over the gallery by the learned scale: the held-out loss of CLIP;
* ``image_to_text/recall_at_1`` (5, 10): the share of pictures whose own text is among the first k;
  ``text_to_image/...``: the other way round;
* ``cross_style/...``, for sources with several art styles: pictures of one style, of which each is
  to find that of the same concept in a gallery of another style; all pairs of styles in turn;
* ``zero_shot/accuracy``: the share of all pictures whose nearest text among the names of the
  categories is that of their own; ``zero_shot/most_frequent`` is what always the most frequent
  category of the training split would have;
* ``.../chance_...``: what chance has. Of equal similarities the first in the gallery counts first.
"""

import itertools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from moejax.config.checks import require
from moejax.config.schema import Config
from moejax.parallel.batches import put_batch
from moejax.train.evaluate import EVALUATORS, EvalContext

GALLERY = 100
DRAWS = 24
RECALLS = (1, 5, 10)
TASKS = ("image_to_text", "text_to_image", "cross_style")


@EVALUATORS.register("retrieval")
def retrieval(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs a model of pairs."""
    pipeline, model = context.pipeline, context.model

    def embed(params: Any, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        outputs = model.apply({"params": params}, batch, train=False)
        return outputs.image, outputs.text, outputs.scale

    embed = context.program("retrieval", embed)
    images, texts, indices = [], [], []
    batch, scale = {}, 1.0
    for batch, on_device in context.batches():
        image, text, scale = jax.device_get(embed(context.params, on_device))
        counted = batch["weights"] > 0
        images.append(image[counted])
        texts.append(text[counted])
        indices.append(batch["index"][counted])
    image, text, index = map(np.concatenate, (images, texts, indices))
    family, concept = pipeline.families[index], pipeline.concepts[index]
    values = both_ways(image, text, draw_galleries(family), float(scale))
    values |= cross_style(image, draw_style_galleries(family, concept, pipeline.style_of[index]))
    if pipeline.categories:
        labels = np.asarray([pipeline.source[int(i)].get("label", -1) for i in index])
        prompts = pipeline.encode([prompt(name) for name in pipeline.categories])
        size, found = len(batch["weights"]), []
        for start in range(0, len(prompts), size):
            here = prompts[start : start + size]
            tokens = np.resize(here, (size, here.shape[1]))
            asked = {**batch, "tokens": tokens, "weights": np.ones_like(batch["weights"])}
            found.append(embed(context.params, put_batch(asked, context.mesh))[1][: len(here)])
        counts = context.train_pipeline.label_counts(len(prompts))
        values |= zero_shot(image @ np.concatenate(jax.device_get(found)).T, labels, counts)
    return values


def check(config: Config) -> None:
    """UserError unless the data are pictures with texts."""
    require(
        config.data.format == "pairs",
        "eval.metrics",
        "'retrieval' needs pictures with texts (data.format=pairs); leave it out",
    )


def metric_names(config: Config) -> list[str]:
    """What :func:`retrieval` can return."""
    del config
    recalls = [f"recall_at_{k}" for k in RECALLS]
    names = [f"{task}/{prefix}{r}" for task in TASKS for r in recalls for prefix in ("", "chance_")]
    names += [f"{name}/{prefix}loss" for name in ("image", "text") for prefix in ("", "chance_")]
    accuracies = ("accuracy", "chance_accuracy", "most_frequent")
    return ["gallery", *names, *(f"zero_shot/{name}" for name in accuracies)]


retrieval.check = check
retrieval.metric_names = metric_names


def prompt(category: str) -> str:
    """The name of a category as a text: ``"Food & Drink"`` -> ``"food and drink"``."""
    return category.replace("&", "and").lower()


def draw_galleries(family: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " g"]]:
    """Records (rows of ``family``) of each gallery, one of each of its families."""
    rng = np.random.default_rng(0)
    rows_of = _rows_by(family)
    size = min(GALLERY, len(rows_of))
    return [_one_of_each(rng, rows_of, size) for _ in range(DRAWS)]


def draw_style_galleries(
    family: Int[np.ndarray, " n"], concept: Int[np.ndarray, " n"], style: Int[np.ndarray, " n"]
) -> list[tuple[Int[np.ndarray, " g"], Int[np.ndarray, " g"]]]:
    """(queries, gallery) of records: the same concepts in one style and in another.

    Empty where there is one style alone. All galleries are of one size, the smallest that any two
    styles have.
    """
    rng = np.random.default_rng(0)
    # Of several languages that share a picture, the first stands for it.
    picture = {}
    for row, key in enumerate(zip(concept.tolist(), style.tolist(), strict=True)):
        picture.setdefault(key, row)
    of_pair = []
    for one, other in itertools.permutations(sorted(set(style.tolist())), 2):
        rows = [row for (c, s), row in picture.items() if s == one and (c, other) in picture]
        if rows:
            rows_of = _rows_by(family[rows])
            of_pair.append((other, [np.asarray(rows)[places] for places in rows_of]))
    if not of_pair:
        return []
    size = min(GALLERY, *(len(rows_of) for _, rows_of in of_pair))
    drawn = []
    for _, (other, rows_of) in zip(range(DRAWS), itertools.cycle(of_pair), strict=False):
        queries = _one_of_each(rng, rows_of, size)
        gallery = [picture[int(concept[row]), other] for row in queries]
        drawn.append((queries, np.asarray(gallery)))
    return drawn


def _rows_by(number: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " k"]]:
    """The rows of each number that occurs."""
    return [np.flatnonzero(number == value) for value in np.unique(number)]


def _one_of_each(rng: np.random.Generator, rows_of: list, size: int) -> Int[np.ndarray, " g"]:
    chosen = rng.permutation(len(rows_of))[:size]
    return np.asarray([rng.choice(rows_of[i]) for i in chosen])


def recalls(scores_qg: Float[np.ndarray, "q g"]) -> Float[np.ndarray, " k"]:
    """The share of queries whose own entry, that of the same number, is among the first k."""
    right = np.diagonal(scores_qg)[:, None]
    number = np.arange(len(scores_qg))
    earlier = number[None] < number[:, None]
    rank = ((scores_qg > right) | ((scores_qg == right) & earlier)).sum(axis=1)
    return np.asarray([(rank < k).mean() for k in RECALLS])


def nats(scores_qg: Float[np.ndarray, "q g"]) -> float:
    """The mean nats of each query's own entry, of the same number, in a softmax of the scores."""
    top = scores_qg.max(axis=1)
    total = np.log(np.exp(scores_qg - top[:, None]).sum(axis=1)) + top
    return float((total - np.diagonal(scores_qg)).mean())


def both_ways(
    image: Float[np.ndarray, "n z"], text: Float[np.ndarray, "n z"], galleries: list, scale: float
) -> dict[str, float]:
    """Recalls and nats of the texts by the pictures and of the pictures by the texts."""
    size = len(galleries[0])
    scores = [image[rows] @ text[rows].T for rows in galleries]
    return {
        "gallery": float(size),
        "image/loss": float(np.mean([nats(scale * one) for one in scores])),
        "image/chance_loss": float(np.log(size)),
        "text/loss": float(np.mean([nats(scale * one.T) for one in scores])),
        "text/chance_loss": float(np.log(size)),
        **_named("image_to_text", [recalls(one) for one in scores], size),
        **_named("text_to_image", [recalls(one.T) for one in scores], size),
    }


def cross_style(image: Float[np.ndarray, "n z"], galleries: list) -> dict[str, float]:
    """Recalls of pictures by pictures; nothing without galleries."""
    found = [recalls(image[queries] @ image[rows].T) for queries, rows in galleries]
    return _named("cross_style", found, len(galleries[0][0])) if galleries else {}


def _named(task: str, found: list, size: int) -> dict[str, float]:
    values = {}
    for k, value in zip(RECALLS, np.mean(found, axis=0), strict=True):
        values[f"{task}/recall_at_{k}"] = float(value)
        values[f"{task}/chance_recall_at_{k}"] = min(k / size, 1.0)
    return values


def zero_shot(
    scores_nv: Float[np.ndarray, "n v"], labels: Int[np.ndarray, " n"], counts: np.ndarray
) -> dict[str, float]:
    """The accuracy of the highest score over rows with a label; ``counts`` of each in training."""
    kept = labels >= 0
    labels, best = labels[kept], scores_nv[kept].argmax(axis=1)
    share = lambda right: float(right.mean()) if kept.any() else float("nan")
    return {
        "zero_shot/accuracy": share(best == labels),
        "zero_shot/chance_accuracy": 1 / scores_nv.shape[1],
        "zero_shot/most_frequent": share(labels == counts.argmax()),
    }
