"""A trained classifier of pictures that judges those of another model: does it find the class?"""

import dataclasses
import os

import numpy as np
from jaxtyping import Int, UInt8

from moejax.analysis.fidelity.pictures import read_pictures
from moejax.errors import UserError
from moejax.train.load import Loaded, load
from moejax.train.setup import open_pipeline


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """The model of a run with classes, such as one of ``moejax train --config vit``.

    Attributes:
      run: as it was loaded.
    """

    run: Loaded

    def classify(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, " n"]:
        """The class with the highest logit of each picture; of equal ones the lower.

        Raises:
          UserError: the pictures are of another size than those that it was trained on.
        """
        size = self.run.config.data.image_size
        if images.shape[1:] != (size, size, 3):
            height, width = images.shape[1:3]
            raise UserError(
                f"{self.run.workdir}: the classifier reads pictures of {size}x{size}, and these "
                f"are {height}x{width}; train one with data.image_size={height}"
            )
        rows = self.run.config.data.batch_size
        found = []
        for start in range(0, len(images), rows):
            part = images[start : start + rows]
            # Rows that only fill up the batch take no part in the routing.
            filled = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])
            weights = (np.arange(rows) < len(part)).astype(np.float32)
            logits = self.run.apply({"images": filled, "weights": weights}).logits
            found.append(np.asarray(logits)[: len(part)].argmax(axis=-1))
        return np.concatenate(found)


def load_classifier(workdir: str | os.PathLike) -> Classifier:
    """The classifier of a run, of its newest checkpoint.

    Raises:
      UserError: there is no such run, or its model has no classes of single pictures.
    """
    run = load(workdir)
    if run.config.objective.name != "classification" or run.config.data.image_sizes:
        raise UserError(
            f"{workdir}: its model is no classifier of pictures of one size; give a run of "
            "moejax train --config vit"
        )
    return Classifier(run)


def class_accuracy(
    classifier: Classifier,
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int[np.ndarray, " n"],
    *,
    categories: tuple[str, ...] = (),
    num_classes: int = 0,
    split: str = "test",
) -> dict[str, float]:
    """How often a classifier finds the class that pictures were drawn for.

    Args:
      classifier: trained on real pictures, by itself.
      images: pictures to judge.
      labels: the class that each was asked for; negative ones do not count.
      categories: the names of the classes, to be held against those of the classifier's data.
      num_classes: how many there are, to be held against the classifier's; 0: not known.
      split: of the classifier's data, whose real pictures are judged too.

    Returns:
      ``class_accuracy``, and ``real_class_accuracy``, that of the real pictures.

    Raises:
      UserError: the classifier knows other classes, or pictures of another size.
    """
    run = classifier.run
    source = open_pipeline(run.config, split).source
    known = tuple(getattr(source, "categories", ()))
    if known and categories and known != tuple(categories):
        raise UserError(
            f"{run.workdir}: its classes are those of {source.name} ({', '.join(known[:3])}, ...), "
            f"not these ({', '.join(categories[:3])}, ...); train one on the same data"
        )

    own = run.config.model.num_classes
    if num_classes and num_classes != own:
        raise UserError(
            f"{run.workdir}: it knows {own} classes, and these pictures have {num_classes}; train "
            "one on the same data"
        )

    def share(images: np.ndarray, labels: np.ndarray) -> float:
        counted = labels >= 0
        if not counted.any():
            return float("nan")
        return float((classifier.classify(images[counted]) == labels[counted]).mean())

    real = share(*read_pictures(source))
    return {"class_accuracy": share(images, labels), "real_class_accuracy": real}
