"""The record: what every data source yields, raw pixels and text, never model codes."""

from typing import Required, TypedDict

import numpy as np
from jaxtyping import Float, Int32, UInt8

SPLITS = ("train", "val", "test")


class Record(TypedDict, total=False):
    """One example. All but ``id`` may be missing, according to the source."""

    id: Required[str]  # unique within its source
    image: UInt8[np.ndarray, "height width 3"]  # RGB on white
    frames: UInt8[np.ndarray, "frames height width 3"]  # of a clip, in their order; then no image
    text: str
    audio: Float[np.ndarray, "samples"]  # mono, in [-1, 1]
    audio_codes: Int32[np.ndarray, "units"]  # of speech, each below the source's num_audio_codes
    label: int
    family: str  # records of one family never lie in two splits
    concept: str  # what it is of, whatever its style and language; within one family
    style: str  # in which it is drawn, where there are several
    mirror: bool  # whether the mirrored image still fits the text; absent: it may not


def frames_of(record: Record) -> UInt8[np.ndarray, "frames height width 3"] | None:
    """The frames of a clip, or a picture as the only one; None without either."""
    if "frames" in record:
        return record["frames"]
    return record["image"][None] if "image" in record else None
