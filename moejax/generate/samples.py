"""The samples of a run: pictures of captions, captions of pictures, each beside what is real."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config.schema import DataConfig
from moejax.data.build import open_records
from moejax.data.records import Record, frames_of
from moejax.data.sources import RecordSource
from moejax.errors import UserError
from moejax.generate.api import Sampler, caption_images, sample_images
from moejax.generate.denoiser import PictureSampler, draw_pictures
from moejax.generate.images import (
    GridRow,
    Tile,
    draw_grid,
    drawable,
    nearest_images,
    save_png,
)
from moejax.generate.sampling import Sampling

MODES = ("text2image", "image2text", "unconditional")
TITLES = {
    "text2image": "text to image",
    "image2text": "image to text",
    "unconditional": "images without a caption",
    "class2image": "class to image",
    "denoising": "what the model has in mind on the way from noise",
    "guidance": "the same noise under several weights of guidance",
}
_PER_PROMPT = 2
# Of the pictures and captions that are not the user's own, so many are from the training split.
_TRAIN_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Example:
    """A caption to draw, or a picture to describe; ``group`` is its split, or "prompt"."""

    group: str
    text: str
    shown: str  # text, or what the grid's font has in its place
    record_id: str | None = None
    frames: np.ndarray | None = None  # [frames, h, w, 3]: one picture, or those of a clip

    @property
    def image(self) -> np.ndarray | None:
        """The picture, of a clip the first."""
        return None if self.frames is None else self.frames[0]


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """The nearest training picture to another, and how far it is (RMSE, 0 to 255)."""

    example: Example
    distance: float

    def document(self) -> dict[str, Any]:
        return {
            "record_id": self.example.record_id,
            "text": self.example.text,
            "distance": round(self.distance, 3),
        }


def pictures_of(record: Record) -> np.ndarray:
    """The record's picture or the frames of its clip, [frames, h, w, 3] uint8.

    Raises:
      UserError: it has none.
    """
    frames = frames_of(record)
    if frames is None:
        raise UserError(f"data.source: record {record['id']} has no picture; sample needs one")
    return frames


class Examples:
    """The records of one split, and the English names of those in another language."""

    def __init__(self, data: DataConfig, split: str, source: RecordSource | None = None):
        self.split = split
        if source is None:
            source = open_records(data, split)
        self.source = source
        self._english: dict[str, str] = {}
        if set(data.languages) - {"en"}:
            try:
                english = open_records(data, split, languages=("en",))
            except UserError:  # A source without English: the record's id is shown instead.
                english = []
            self._english = {record["id"]: record.get("text", "") for record in english}

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int) -> Example:
        record = self.source[index]
        text, record_id = record.get("text", ""), record["id"]
        english = self._english.get(f"{record_id.rpartition('/')[0]}/en", "")
        shown = drawable(text, drawable(english) or drawable(record_id, "?"))
        return Example(self.split, text, shown, record_id, pictures_of(record))


class TrainImages:
    """The different pictures of the training split; of each clip the first."""

    def __init__(self, examples: Examples):
        self._examples = examples
        first: dict[bytes, int] = {}
        for index in range(len(examples)):
            first.setdefault(pictures_of(examples.source[index])[0].tobytes(), index)
        self._indices = list(first.values())
        self._images = np.stack([pictures_of(examples.source[i])[0] for i in self._indices])

    def nearest(self, images: np.ndarray) -> list[Neighbour]:
        """Of each of ``images`` [n, h, w, 3] uint8."""
        index, distance = nearest_images(images, self._images)
        return [
            Neighbour(self._examples.get(self._indices[i]), float(d))
            for i, d in zip(index, distance, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, and with what.

    Attributes:
      sampler: the model, a Sampler or a PictureSampler.
      data: where held-out and training records come from.
      split: of the held-out records.
      prompts: captions of the user's own; instead of those of records.
      count: pictures (or captions) per mode.
      sampling: temperature, filters, guidance of models of sequences.
      seed: of the samples and of the choice of records.
      progress: called with the number of samples done since the last call.
      sources: splits that are open already.
    """

    sampler: Any
    data: DataConfig
    split: str
    prompts: Sequence[str]
    count: int
    sampling: Sampling
    seed: int
    progress: Callable[[int], Any] | None = None
    sources: Mapping[str, RecordSource] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def train(self) -> Examples:
        return Examples(self.data, "train", self.sources.get("train"))

    @functools.cached_property
    def held_out(self) -> Examples:
        if self.split == "train":
            return self.train
        return Examples(self.data, self.split, self.sources.get(self.split))

    @functools.cached_property
    def train_images(self) -> TrainImages:
        return TrainImages(self.train)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One mode's samples: rows of the picture, rows for the JSON file, lines of the text file."""

    mode: str
    grid: list[GridRow]
    columns: int
    rows: list[dict[str, Any]]
    lines: list[str]
    summary: dict[str, float]
    panels: int = 1


def sample_mode(mode: str, request: Request) -> Outcome:
    """The samples of one of ``MODES``; writes nothing."""
    functions = {
        "text2image": _text_to_image,
        "image2text": _image_to_text,
        "unconditional": _unconditional,
    }
    return functions[mode](request)


def pick_examples(request: Request, count: int) -> list[Example]:
    """``count`` different captions: held-out ones, then about a quarter from training."""
    known = 0 if request.split == "train" else round(count * _TRAIN_SHARE)
    rng = np.random.default_rng(request.seed)
    return _draw(rng, request.held_out, count - known) + _draw(rng, request.train, known)


def _draw(rng: np.random.Generator, examples: Examples, count: int) -> list[Example]:
    found: dict[str, Example] = {}
    for index in rng.permutation(len(examples)):
        if len(found) >= count:
            break
        example = examples.get(int(index))
        found.setdefault(example.text, example)
    return list(found.values())


def _text_to_image(request: Request) -> Outcome:
    sampler = request.sampler
    if request.prompts:
        examples = [Example("prompt", text, drawable(text, "?")) for text in request.prompts]
        each = max(1, request.count // len(examples))
    else:
        each = min(_PER_PROMPT, request.count)
        examples = pick_examples(request, request.count // each)
    # Captions of records are cut to what training cut them to.
    texts = [
        example.text if example.group == "prompt" else cut_caption(sampler, example.text)
        for example in examples
    ]
    pictures = _pictures(request, [text for text in texts for _ in range(each)])
    neighbours = request.train_images.nearest(pictures)
    grid, rows, lines, real_distances = [], [], [], []
    for i, example in enumerate(examples):
        own = slice(i * each, (i + 1) * each)
        row: dict[str, Any] = {"prompt": example.text, "group": example.group}
        tiles = []
        lines += ["", f"[{example.group}] {example.text}"]
        if example.frames is not None:
            row["record_id"] = example.record_id
            real_label = "real" if len(example.frames) == 1 else "real, frame 1"
            tiles.append(Tile(example.frames[0], real_label))
            if example.group != "train":
                (real,) = request.train_images.nearest(example.frames[:1])
                row["nearest_of_real"] = real.document()
                real_distances.append(real.distance)
                lines.append(f"  real picture {example.record_id}: {describe(real)}")
        row["samples"] = [{"nearest": near.document()} for near in neighbours[own]]
        for k, (picture, near) in enumerate(zip(pictures[own], neighbours[own], strict=True), 1):
            tiles += [Tile(picture, f"sample {k}"), neighbour_tile(near)]
            lines.append(f"  sample {k}: {describe(near)}")
        note = "your prompt" if example.group == "prompt" else f"from the {example.group} split"
        grid.append(GridRow(example.shown, note, tiles))
        rows.append(row)
    summary = {"median_distance": median([near.distance for near in neighbours])}
    if real_distances:
        summary["median_distance_of_real"] = median(real_distances)
    columns = min(9, max(len(row.tiles) for row in grid))
    return Outcome("text2image", grid, columns, rows, lines, summary)


def _image_to_text(request: Request) -> Outcome:
    examples = pick_examples(request, request.count)
    clips = [example.frames for example in examples if example.frames is not None]
    captions = caption_images(
        request.sampler,
        clips,
        sampling=request.sampling,
        seed=request.seed,
        progress=request.progress,
    )
    codec = request.sampler.image_codec
    seen = codec.decode(codec.encode(np.concatenate(clips)))
    seen = np.split(seen, np.cumsum([len(clip) for clip in clips])[:-1])
    grid, rows, lines = [], [], []
    for example, clip, decoded, caption in zip(examples, clips, seen, captions, strict=True):
        shown = drawable(caption, "(see the text file)")
        tiles = [Tile(image, "real") for image in clip]
        tiles += [Tile(image, "its codes") for image in decoded]
        note = f"is: {example.shown} ({example.group} split)"
        grid.append(GridRow(f"model: {shown}", note, tiles))
        rows.append(
            {
                "record_id": example.record_id,
                "group": example.group,
                "text": example.text,
                "output": caption,
            }
        )
        lines += ["", f"[{example.group}] {example.record_id}: {example.text}"]
        lines.append(f"  model: {caption}")
    same = [row["output"].casefold() == row["text"].casefold() for row in rows]
    summary = {"equal_captions": float(np.mean(same))}
    # Of a clip the codes lie below.
    columns = max(2, *(len(clip) for clip in clips))
    return Outcome("image2text", grid, columns, rows, lines, summary, panels=2)


def _unconditional(request: Request) -> Outcome:
    pictures = _pictures(request, [""] * request.count)
    neighbours = request.train_images.nearest(pictures)
    tiles = []
    for k, (picture, near) in enumerate(zip(pictures, neighbours, strict=True), 1):
        tiles += [Tile(picture, f"sample {k}"), neighbour_tile(near)]
    rows = [{"sample": k, "nearest": near.document()} for k, near in enumerate(neighbours, 1)]
    lines = [f"sample {k}: {describe(near)}" for k, near in enumerate(neighbours, 1)]
    summary = {"median_distance": median([near.distance for near in neighbours])}
    grid = [GridRow("", "", tiles)]
    return Outcome("unconditional", grid, 8, rows, ["", *lines], summary)


def write_outcome(outcome: Outcome, folder: Path, about: dict[str, Any]) -> dict[str, Path]:
    """Writes ``MODE.png``, ``.txt`` and ``.json`` into ``folder``, each in one piece.

    ``about`` goes into each of them: the run, its step, the seed, the settings.

    Returns:
      {"png": path, "txt": path, "json": path}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{outcome.mode}.{kind}" for kind in ("png", "txt", "json")}
    settings = ", ".join(f"{name} {value}" for name, value in about.items() if value is not False)
    header = f"{TITLES[outcome.mode]}: {settings}"
    if outcome.mode == "image2text":
        legend = ["its codes: what the image tokenizer keeps of the picture, and the model reads"]
    else:
        legend = ["nearest: the nearest training picture, its distance (RMSE, 0 to 255), its name"]
    summary = [f"{name.replace('_', ' ')}: {value}" for name, value in outcome.summary.items()]
    text = "\n".join([header, *legend, *summary, *outcome.lines]) + "\n"
    document = {"mode": outcome.mode, **about, **outcome.summary, "rows": outcome.rows}
    _write_text(paths["txt"], text)
    _write_text(paths["json"], json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    grid_header = "\n".join([drawable(header, TITLES[outcome.mode]), *legend])
    picture = draw_grid(outcome.grid, grid_header, columns=outcome.columns, panels=outcome.panels)
    save_png(picture, paths["png"])
    return paths


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pictures(request: Request, captions: list[str]) -> np.ndarray:
    """A picture for each caption, "" for none; [n, h, w, 3] uint8."""
    sampler, shared = request.sampler, {"seed": request.seed, "progress": request.progress}
    if isinstance(sampler, PictureSampler):
        return draw_pictures(sampler, captions, **shared).pictures
    return sample_images(sampler, captions, sampling=request.sampling, **shared)


def cut_caption(sampler: Sampler | PictureSampler, text: str) -> str:
    """``text``, cut to what training cuts it to."""
    tokenizer = sampler.text_tokenizer
    ids = tokenizer.encode(text) if tokenizer else []
    if tokenizer is None or len(ids) <= sampler.text_room:
        return text
    return tokenizer.decode(ids[: sampler.text_room])


def neighbour_tile(near: Neighbour) -> Tile:
    """The picture, its distance and below it its name, where it has one."""
    assert near.example.image is not None
    label = f"nearest: {near.distance:.1f}\n{near.example.shown}"
    return Tile(near.example.image, label.rstrip())


def describe(near: Neighbour) -> str:
    return (
        f"nearest training picture {near.example.record_id} ({near.example.text}), "
        f"distance {near.distance:.1f}"
    )


def median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)
