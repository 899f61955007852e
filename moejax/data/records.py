"""The record: what every data source yields, raw pixels and text, never model codes."""

from typing import Required, TypedDict

import numpy as np
from jaxtyping import Float, UInt8

SPLITS = ("train", "val", "test")


class Record(TypedDict, total=False):
    """One example. All but ``id`` may be missing, according to the source."""

    id: Required[str]  # unique within its source
    image: UInt8[np.ndarray, "height width 3"]  # RGB on white
    text: str
    audio: Float[np.ndarray, "samples"]  # mono, in [-1, 1]
    label: int
    family: str  # records of one family never lie in two splits
