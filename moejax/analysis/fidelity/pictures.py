"""Sets of pictures compared with real ones in a frozen network, beside real against real.

The network is EfficientNet-Lite0, trained on ImageNet, and the Frechet distance in it is called
FD-EffLite0. It is no FID: that is in another network (Inception), and no number of the one can be
held against a number of the other. With n pictures on both sides the distance of real pictures from
real ones is far above 0 where n is not far above the 1,280 features, and falls with n. So both
sides always have the same n, and the same distance of other real pictures, the floor, is beside it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from moejax.analysis.fidelity.frechet import Gaussian, frechet_distance
from moejax.analysis.fidelity.kernel import BLOCKS, kernel_distance
from moejax.analysis.fidelity.neighbours import (
    NEAR,
    copied,
    nearer,
    nearest,
    neighbour_rates,
    radii,
)
from moejax.data.prepare.efficientnet import SHA256, extract_features, installed_weights
from moejax.errors import UserError
from moejax.generate.images import nearest_images

Pictures = UInt8[np.ndarray, "n h w 3"]
Encode = Callable[[Pictures], Float[np.ndarray, "n d"]]

DISTANCES = ("fd_efflite0", "kid_efflite0")
RATES = ("precision", "recall", "density", "coverage")
# With what is expected where nothing is copied.
COPIES = {"nearer_to_train": 0.5, "memorised": NEAR, "memorised_pixels": NEAR}
SIZE = 64


def efficientnet_encoder(size: int = SIZE) -> Encode:
    """Features of pictures made ``size`` pixels wide and high.

    Raises:
      UserError: the weights are not installed.
    """
    return functools.partial(extract_features, weights=installed_weights(), size=size)


def metric_names(*, copies: bool = True) -> list[str]:
    """What :meth:`RealPictures.compare` returns; ``copies`` where there are held-out pictures."""
    names = [name + end for name in DISTANCES for end in ("", "_spread")] + list(RATES)
    names = [prefix + name for name in names for prefix in ("", "floor_")]
    if copies:
        names += [prefix + name for name in COPIES for prefix in ("", "chance_")]
    return ["pictures", "features", *names]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of some pictures, in random order, and what is known of them alone."""

    x_nd: Float[np.ndarray, "n d"]
    k: int

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        return Gaussian.of(self.x_nd)

    @functools.cached_property
    def radii_n(self) -> Float[np.ndarray, " n"]:
        return radii(self.x_nd, self.k)

    def beside(self, real: "FeatureSet") -> dict[str, float]:
        """Distances and rates of these pictures beside as many real ones."""
        return {
            "fd_efflite0": frechet_distance(real.gaussian, self.gaussian),
            "kid_efflite0": kernel_distance(self.x_nd, real.x_nd)[0],
            **neighbour_rates(self.x_nd, real.x_nd, self.radii_n, real.radii_n, self.k),
        }


class RealPictures:
    """Training pictures that sets of ``count`` others are compared with, several times over.

    Each of ``draws`` times ``count`` training pictures stand for what is real, and ``count`` others
    for the floor. No picture is in two of these sets where there are enough.

    Args:
      reference: training pictures, at least twice ``count``. Copies are looked for among them
        alone: give all, where there is the time.
      count: pictures of each set.
      held_out: real pictures that were not trained on; without them copies are not looked for.
      encode: features of pictures; left out, :func:`efficientnet_encoder`.
      draws: how often; one more than once gives distances their spread.
      k: neighbours that a ball reaches to.
      seed: of what is drawn.
      name: of the field or flag that ``count`` is from, for messages.

    Raises:
      UserError: too few pictures, or the weights are not installed.
    """

    def __init__(
        self,
        reference: Pictures,
        count: int,
        held_out: Pictures | None = None,
        *,
        encode: Encode | None = None,
        draws: int = 5,
        k: int = 5,
        seed: int = 0,
        name: str = "count",
    ):
        least = max(2 * BLOCKS, k + 1)
        if count < least:
            raise UserError(f"{name}={count}: too few to compare; give at least {least}")
        if len(reference) < 2 * count:
            raise UserError(
                f"{name}={count}: as many training pictures are compared with, and as many others "
                f"are the floor, but there are {len(reference)}; set it to {len(reference) // 2} "
                "or less"
            )
        self.count, self.k, self._seed = count, k, seed
        self._encode = encode or efficientnet_encoder()
        rows = draw_halves(len(reference), count, draws, np.random.default_rng(seed))
        # All of them: a copy of one that no draw has is one as well.
        features = self._encode(reference)
        sets = lambda half: FeatureSet(features[half], k)
        self._pairs = [(sets(real), sets(other)) for real, other in rows]
        self.floor = _over_draws([other.beside(real) for real, other in self._pairs])
        self._reference, self._features = reference, features
        self._held_out = None if held_out is None else self._near(held_out, self._encode(held_out))

    def _near(self, images: Pictures, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far the nearest training picture is, in features and in pixels."""
        return nearest(features, self._features), nearest_images(images, self._reference)[1]

    def compare(self, samples: Pictures) -> dict[str, float]:
        """How ``count`` samples compare, by the names of :func:`metric_names`.

        ``fd_efflite0`` and ``kid_efflite0`` (less is better; means over the draws, beside their
        standard deviation, ``..._spread``), ``precision``, ``recall``, ``density``, ``coverage``
        (more is better); ``floor_...``: the same of other training pictures.

        Of the samples' distances to training pictures beside those of held-out pictures:
        ``nearer_to_train`` and ``memorised`` (:func:`nearer` and :func:`copied`, in features) and
        ``memorised_pixels``; ``chance_...``: what is expected without copies.

        Raises:
          UserError: another number of samples, or pictures of another size.
        """
        shape = (self.count, *self._reference.shape[1:])
        if samples.shape != shape or samples.dtype != np.uint8:
            raise UserError(
                f"samples are {samples.dtype}{list(samples.shape)}, and the real pictures are "
                f"compared as uint8{list(shape)}; give as many, of that size"
            )
        features = self._encode(samples)
        # The kernel distance takes rows part by part: sorted pictures would fill each with its own.
        order = np.random.default_rng(self._seed).permutation(self.count)
        own = FeatureSet(features[order], self.k)
        found = _over_draws([own.beside(real) for real, _ in self._pairs])
        values = {"pictures": float(self.count), "features": float(features.shape[1])}
        for name, value in found.items():
            values |= {name: value, f"floor_{name}": self.floor[name]}
        if self._held_out is not None:
            near, real = self._near(samples, features), self._held_out
            rates = (nearer(near[0], real[0]), *map(copied, near, real))
            for (name, chance), rate in zip(COPIES.items(), rates, strict=True):
                values |= {name: rate, f"chance_{name}": chance}
        return values

    def nearest_training(self, images: Pictures) -> Pictures:
        """The training picture that is nearest to each in pixels, of all of them."""
        return self._reference[nearest_images(images, self._reference)[0]]

    def describe(self) -> str:
        """A line on what the distances are of."""
        return (
            f"FD-EffLite0 and the kernel distance are of {self.count:,} pictures on either side, "
            f"in {self._features.shape[1]:,} features of EfficientNet-Lite0 (weights "
            f"{SHA256[:8]}); compare them at this number alone, with their floor, and with no FID"
        )


def picture_metrics(
    samples: Pictures, reference: Pictures, held_out: Pictures | None = None, **options
) -> dict[str, float]:
    """:meth:`RealPictures.compare` of one set of samples; options are those of the class."""
    return RealPictures(reference, len(samples), held_out, **options).compare(samples)


def read_pictures(
    source: Any, rows: Int[np.ndarray, " n"] | None = None
) -> tuple[Pictures, Int[np.ndarray, " n"]]:
    """The pictures of those records of a source (of all), and their labels, -1 without one.

    Raises:
      UserError: its records are no single pictures.
    """
    records = [source[int(row)] for row in (range(len(source)) if rows is None else rows)]
    if not all("image" in record for record in records):
        raise UserError(f"data.source={source.name}: its records are no single pictures")
    labels = np.asarray([record.get("label", -1) for record in records], np.int32)
    return np.stack([record["image"] for record in records]), labels


def draw_halves(number: int, count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [draws, 2, count] of ``number`` pictures: two sets at a time that share none.

    Nor do those of several draws as far as there are enough; then all are dealt anew.
    """
    each = number // (2 * count)
    rows = []
    while len(rows) < draws:
        order = rng.permutation(number)[: each * 2 * count]
        rows += list(order.reshape(each, 2, count))
    return np.asarray(rows[:draws])


def _over_draws(found: list[dict[str, float]]) -> dict[str, float]:
    """Means over the draws, and of the distances the standard deviation too (0 of one draw)."""
    values = {}
    for name in found[0]:
        drawn = np.asarray([one[name] for one in found])
        values[name] = float(drawn.mean())
        if name in DISTANCES:
            values[f"{name}_spread"] = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    return values
