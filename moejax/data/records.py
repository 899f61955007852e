"""The record: what every data source yields, raw pixels and text, never model codes."""

from typing import Required, TypedDict

import numpy as np
from jaxtyping import Float, Int32, UInt8

SPLITS = ("train", "val", "test")


class Record(TypedDict, total=False):
    """One example. All but ``id`` may be missing, according to the source."""

    id: Required[str]  # unique within its source
    image: UInt8[np.ndarray, "height width 3"]  # RGB on white
    text: str
    audio: Float[np.ndarray, "samples"]  # mono, in [-1, 1]
    audio_codes: Int32[np.ndarray, "units"]  # of speech, each below the source's num_audio_codes
    label: int
    family: str  # records of one family never lie in two splits
    mirror: bool  # whether the mirrored image still fits the text; absent: it may not
