"""Linear classifiers of fixed features in closed form: ridge regression of one-hot labels.

With features x of n pictures, standardised, and targets y of -1 and 1, the weights minimise
``mean |x W + c - y|^2 + penalty |W|^2``, in which the bias c is not penalised. The class of a
picture is the largest output. That is the few-shot classifier of Vision Transformer (arXiv
2010.11929, section 4.1) and V-MoE. Pure numpy, in float64.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

# Shares of the mean variance of the features, which is 1 where they are standardised.
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))
# The penalty is chosen on this part of the families of the training pictures.
HELD_OUT = 5


@dataclasses.dataclass(frozen=True)
class Scale:
    """What makes features of mean 0 and variance 1; those that never vary become 0.

    Attributes:
      mean_d: of each feature.
      inverse_d: what each is multiplied by.
    """

    mean_d: Float[np.ndarray, " d"]
    inverse_d: Float[np.ndarray, " d"]

    @classmethod
    def of(cls, x_nd: Float[np.ndarray, "n d"]) -> "Scale":
        x_nd = np.asarray(x_nd, np.float64)
        mean, deviation = x_nd.mean(axis=0), x_nd.std(axis=0)
        # What differs by rounding alone is no feature.
        varies = deviation > 1e-7 * (1 + np.abs(mean))
        return cls(mean, np.where(varies, 1 / np.where(varies, deviation, 1), 0))

    def __call__(self, x_nd: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        return (np.asarray(x_nd, np.float64) - self.mean_d) * self.inverse_d


class Ridge:
    """Solutions for any number of penalties from one decomposition of the features.

    Args:
      x_nd: features.
      labels_n: classes, each in [0, classes).
      classes: how many there are.
    """

    def __init__(
        self, x_nd: Float[np.ndarray, "n d"], labels_n: Int[np.ndarray, " n"], classes: int
    ):
        x, y = np.asarray(x_nd, np.float64), 2 * np.eye(classes)[labels_n] - 1
        self._mean_d, self._target_v = x.mean(axis=0), y.mean(axis=0)
        x, y = x - self._mean_d, y - self._target_v
        self._count = len(x)
        # The smaller of the two products: few shots have fewer pictures than features.
        self._dual = x.shape[0] < x.shape[1]
        gram = x @ x.T if self._dual else x.T @ x
        values, self._vectors = np.linalg.eigh(gram)
        self._values = np.maximum(values, 0)
        right = y if self._dual else x.T @ y
        self._rotated = self._vectors.T @ right
        self._x = x if self._dual else None

    def solve(self, penalty: float) -> tuple[Float[np.ndarray, "d v"], Float[np.ndarray, " v"]]:
        """(weights, bias); outputs are ``x @ weights + bias``. ``penalty`` > 0."""
        scaled = self._rotated / (self._values + penalty * self._count)[:, None]
        solved = self._vectors @ scaled
        weights = solved if self._x is None else self._x.T @ solved
        return weights, self._target_v - self._mean_d @ weights

    def classify(self, x_nd: Float[np.ndarray, "n d"], penalty: float) -> Int[np.ndarray, " n"]:
        """The class of each row; of equal outputs the lower one."""
        weights, bias = self.solve(penalty)
        return (np.asarray(x_nd, np.float64) @ weights + bias).argmax(axis=-1)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Features and classes of pictures.

    Attributes:
      x_nd: features.
      labels_n: classes.
      families: of each picture; those of one family are alike.
    """

    x_nd: Float[np.ndarray, "n d"]
    labels_n: Int[np.ndarray, " n"]
    families: Sequence[str]


def held_out(families: Sequence[str], seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which rows choose the penalty: those of every fifth family in a random order."""
    names = sorted(set(families))
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = {names[i] for i in order[: max(1, len(names) // HELD_OUT)]}
    return np.asarray([family in chosen for family in families])


def choose_penalty(
    train: Labelled, classes: int, penalties: Sequence[float] = PENALTIES, seed: int = 0
) -> float:
    """The penalty that classifies a fifth of the training families best, fitted on the others.

    Of equal ones the largest. ``train`` has at least two families.
    """
    out = held_out(train.families, seed)
    ridge = Ridge(train.x_nd[~out], train.labels_n[~out], classes)
    right = [(ridge.classify(train.x_nd[out], p) == train.labels_n[out]).mean() for p in penalties]
    return max(zip(right, penalties, strict=True))[1]


def draw_shots(
    labels_n: Int[np.ndarray, " n"], shots: int, rng: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Rows of ``shots`` pictures of each class, or of all of a class that has fewer."""
    order = rng.permutation(len(labels_n))
    chosen = [order[labels_n[order] == label][:shots] for label in np.unique(labels_n)]
    return np.concatenate(chosen)


def few_shot(
    train: Labelled, test: Labelled, classes: int, *, shots: int, draws: int, penalty: float, seed=0
) -> Float[np.ndarray, " draws"]:
    """The accuracy of each draw of ``shots`` labelled pictures of each class."""
    found = []
    for draw in range(draws):
        rows = draw_shots(train.labels_n, shots, np.random.default_rng([seed, shots, draw]))
        ridge = Ridge(train.x_nd[rows], train.labels_n[rows], classes)
        found.append((ridge.classify(test.x_nd, penalty) == test.labels_n).mean())
    return np.asarray(found)
