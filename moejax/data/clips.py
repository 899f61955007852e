"""``builtin:emoji_clips``: short clips of the emoji of ``builtin:emoji32``, in the same splits.

In each clip one thing happens to one emoji, and the caption says it: "red apple moves left". What
happens is drawn by (seed, emoji) alone: a clip is the same on every host and in any order.
"""

import hashlib

import numpy as np
from jaxtyping import UInt8

from moejax.data.emoji import EmojiSource
from moejax.data.images import place_on_white
from moejax.data.records import Record
from moejax.errors import UserError

# In the words of the captions.
TURNS = ("turns clockwise", "turns counterclockwise")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", *TURNS)
# Shares of its size that an emoji has while it moves, and when it is smallest. Of 32 pixels the
# first leaves 12: three steps of a patch of 4 pixels, for four frames.
_MOVING, _SMALLEST = 0.625, 0.4
# An emoji turns only where it differs so much, on average and of 255, from itself after a quarter
# and after half a turn.
_SEEN = 8.0
# Raise when the same options give other clips than before.
_RECIPE = 1


def animate(
    image: UInt8[np.ndarray, "h w 3"], motion: str, frames: int
) -> UInt8[np.ndarray, "frames h w 3"]:
    """A clip of a square picture on white to which ``motion``, one of MOTIONS, happens.

    A turn is of 90 degrees from frame to frame, so that no pixel is lost; the rest is spread evenly
    over the frames.
    """
    if motion in TURNS:
        quarter = 1 if motion == "turns counterclockwise" else -1
        return np.stack([np.rot90(image, quarter * i) for i in range(frames)])
    side = image.shape[0]
    along = np.linspace(0, 1, frames)
    if motion in ("moves left", "moves up", "shrinks"):
        along = along[::-1]
    if motion in ("grows", "shrinks"):
        sizes = np.rint(side * (_SMALLEST + (1 - _SMALLEST) * along)).astype(int).tolist()
        middle = [(side - size) // 2 for size in sizes]
        return np.stack(
            [place_on_white(image, size, at, at) for size, at in zip(sizes, middle, strict=True)]
        )
    room = _room(side)
    offsets = np.rint(room * along).astype(int).tolist()
    sideways = motion in ("moves left", "moves right")
    places = [(room // 2, at) if sideways else (at, room // 2) for at in offsets]
    return np.stack([place_on_white(image, side - room, top, left) for top, left in places])


def motions_of(image: UInt8[np.ndarray, "h w 3"]) -> tuple[str, ...]:
    """Those of MOTIONS that can be seen: none of TURNS where the picture looks the same after."""
    turned = [np.abs(image.astype(np.int16) - np.rot90(image, k)).mean() for k in (1, 2)]
    return MOTIONS if min(turned) >= _SEEN else tuple(m for m in MOTIONS if m not in TURNS)


def _room(side: int) -> int:
    """Pixels that an emoji moves through."""
    return side - round(_MOVING * side)


class ClipSource:
    """The emoji of one split, each in one clip; ids as in ``builtin:emoji32``, like ``1F600/en``.

    Held-out clips do not depend on the seed, so that runs of several seeds can be compared.
    """

    name = "builtin:emoji_clips"

    def __init__(
        self,
        split: str,
        *,
        image_size: int,
        languages: tuple[str, ...],
        caption: str,
        frames: int,
        seed: int,
    ):
        if tuple(languages) != ("en",):
            raise UserError(f"data.languages: {self.name} has captions in 'en' alone")
        if caption != "name":
            raise UserError(f"data.caption: {self.name} has 'name' alone, not {caption!r}")
        if frames - 1 > _room(image_size):
            raise UserError(
                f"data.frames={frames}: an emoji of data.image_size={image_size} moves through at "
                f"most {_room(image_size) + 1} places; give fewer"
            )
        self.split = split
        self.frames = frames
        self._emoji = EmojiSource(split, image_size=image_size, languages=("en",), caption="name")
        self.categories = self._emoji.categories
        seed = seed if split == "train" else 0
        options = [_RECIPE, frames, seed, MOTIONS, _MOVING, _SMALLEST, _SEEN]
        self.version = hashlib.sha256(f"{self._emoji.version} {options}".encode()).hexdigest()[:16]
        self._motions = [_drawn_motion(record, seed) for record in self._emoji]

    def __len__(self) -> int:
        return len(self._emoji)

    def __getitem__(self, index: int) -> Record:
        emoji = self._emoji[index]
        frames = animate(emoji["image"], self._motions[index], self.frames)
        frames.setflags(write=False)
        return Record(
            id=emoji["id"],
            frames=frames,
            text=self.text_at(index),
            label=emoji["label"],
            family=emoji["family"],
        )

    def text_at(self, index: int) -> str:
        return f"{self._emoji.text_at(index)} {self._motions[index]}"


def _drawn_motion(record: Record, seed: int) -> str:
    digest = hashlib.sha256(record["id"].encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return str(rng.choice(motions_of(record["image"])))
