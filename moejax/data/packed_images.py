"""Several pictures of different size in one row of patches.

As in NaViT (arXiv 2307.06304, section 2.1), with the sizes of ``data.image_sizes`` in turn for
pictures that are square. Which sizes share a row is decided once; an epoch deals the pictures out
to the places, so that each has another size in another epoch, and the batch of a step is a function
of the step alone.
"""

import numpy as np
from jaxtyping import UInt8

from moejax.config.schema import Config
from moejax.data.packing import first_fit
from moejax.data.pipeline import Batch, ImagePipeline, recipe_hash
from moejax.data.sources import RecordSource
from moejax.ops.patchify import patchify
from moejax.ops.positions import grid_positions


class PackedImagePipeline(ImagePipeline):
    """Rows of at most ``data.max_patches`` patches p, with places for i pictures.

    A row has ``patches`` [p, f] uint8, ``image_id`` [p] (which of its pictures, from 1 on; 0 for
    padding), ``places`` [p, 2] (row and column in the picture's own grid), and ``labels``,
    ``index``, ``weights`` [i] of the pictures, of weight 0 where there is none.
    """

    def __init__(self, config: Config, source: RecordSource):
        super().__init__(config, source)
        data = config.data
        self._patch, self._images = config.model.patch_size, config.images_per_row
        self._sizes = np.resize(np.asarray(data.image_sizes), len(source))
        lengths = (self._sizes // self._patch) ** 2
        self._bins = first_fit(lengths, data.max_patches)
        self.rows_per_epoch = len(self._bins)
        self.steps_per_epoch = max(1, self.rows_per_epoch // data.batch_size)
        packing = [*data.image_sizes, data.max_patches, self._patch]
        self.version = recipe_hash(source=source.version, seed=data.seed, packing=packing)

    def row_records(self, index: int) -> list[int]:
        epoch, place = divmod(index, self.rows_per_epoch)
        return [int(self._order(epoch)[slot]) for slot in self._bins[place]]

    def row(self, index: int) -> Batch:
        slots, numbers = self._bins[index % self.rows_per_epoch], self.row_records(index)
        length = self.config.data.max_patches
        row = {
            "patches": np.zeros((length, self._patch**2 * 3), np.uint8),
            "image_id": np.zeros(length, np.int32),
            "places": np.zeros((length, 2), np.int32),
            "labels": np.full(self._images, -1, np.int32),
            "index": np.zeros(self._images, np.int32),
            "weights": np.zeros(self._images, np.float32),
        }
        begin = 0
        for i, (slot, number) in enumerate(zip(slots, numbers, strict=True)):
            record = self.source[number]
            image = resized(record["image"], int(self._sizes[slot]))
            grid = patchify(image[None], self._patch)[0]
            rows, columns, pixels = grid.shape
            here = slice(begin, begin + rows * columns)
            begin = here.stop
            row["patches"][here] = grid.reshape(-1, pixels)
            row["image_id"][here] = i + 1
            row["places"][here] = grid_positions(rows, columns)
            row["labels"][i] = record.get("label", -1)
            row["index"][i], row["weights"][i] = number, 1
        return row


def resized(image: UInt8[np.ndarray, "a a 3"], size: int) -> UInt8[np.ndarray, "b b 3"]:
    """A square picture of ``size`` pixels."""
    if len(image) == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
