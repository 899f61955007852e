"""Clips of the built-in set: what their captions say happens, in splits that do not leak."""

import subprocess
import sys

import numpy as np
import pytest

from moejax.config import freeze, load_config, load_config_dict
from moejax.data.build import build_pipeline
from moejax.data.clips import MOTIONS, TURNS, animate, motions_of
from moejax.data.latents import PatchCodec
from moejax.data.records import frames_of
from moejax.data.sources import RecordSource, open_source
from moejax.data.variants import variant
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, PATCH
from moejax.errors import UserError
from moejax.ops.pictures import max_pictures


class RedCodec:
    """Codes that are the mean red value of each quarter."""

    num_codes, codes_per_image, version = 256, 4, "red quarters"

    def encode(self, images):
        return images[..., 0].reshape(-1, 2, 16, 2, 16).mean(axis=(2, 4)).reshape(-1, 4)


class RedLatents:
    """The same as a grid of 2 x 2 latents of one channel."""

    channels, grid, version = 1, (2, 2), "red cells"

    def encode(self, images):
        return RedCodec().encode(images)[..., None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def clips():
    return open_source("builtin:emoji_clips", "train")


@pytest.fixture(scope="module")
def emoji():
    return open_source("builtin:emoji32", "train")


def ink(frames):
    """(how much is not white, its middle from the left, from the top) of each frame."""
    dark = 255.0 - frames.mean(axis=-1)
    total = dark.sum(axis=(1, 2))
    place = np.arange(frames.shape[1])
    return total, dark.sum(axis=1) @ place / total, dark.sum(axis=2) @ place / total


def shows(motion, frames) -> bool:
    """Whether that happens, from the pixels alone."""
    total, left, top = ink(frames)
    # Of the same size all along.
    slides = np.ptp(total) < 0.1 * total[0]
    apart = [np.abs(frames[1] - np.rot90(frames[0], k).astype(float)).max() for k in (1, -1)]
    return {
        "moves left": slides and (np.diff(left) < -1).all() and np.ptp(top) < 1,
        "moves right": slides and (np.diff(left) > 1).all() and np.ptp(top) < 1,
        "moves up": slides and (np.diff(top) < -1).all() and np.ptp(left) < 1,
        "moves down": slides and (np.diff(top) > 1).all() and np.ptp(left) < 1,
        "grows": (total[1:] > 1.2 * total[:-1]).all(),
        "shrinks": (total[:-1] > 1.2 * total[1:]).all(),
        "turns counterclockwise": apart[0] == 0,
        "turns clockwise": apart[1] == 0,
    }[motion]


def test_captions_say_what_happens_and_to_what(clips, emoji):
    assert len(clips) == len(emoji)
    counts = dict.fromkeys(MOTIONS, 0)
    for index in range(0, len(clips), 3):
        record, still = clips[index], emoji[index]
        (motion,) = [m for m in MOTIONS if record["text"] == f"{still['text']} {m}"]
        counts[motion] += 1
        assert [m for m in MOTIONS if shows(m, record["frames"])] == [motion], record["text"]
    # Each of eight things happens to about an eighth of 509 emoji.
    assert min(counts.values()) > 35


def test_frames_are_of_the_emoji_and_all_different(clips, emoji):
    for index in range(0, len(clips), 11):
        record, still = clips[index], emoji[index]
        frames = record["frames"]
        assert frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8
        assert (record["id"], record["family"]) == (still["id"], still["family"])
        assert "image" not in record and record["text"] == clips.text_at(index)
        assert len({frame.tobytes() for frame in frames}) == 4
        if "turns" in record["text"] or "shrinks" in record["text"]:
            np.testing.assert_array_equal(frames[0], still["image"])
        if "grows" in record["text"]:
            np.testing.assert_array_equal(frames[-1], still["image"])
    with pytest.raises(ValueError, match="read-only"):
        clips[0]["frames"][:] = 0


def test_what_looks_the_same_turned_does_not_turn(emoji):
    image = next(r["image"] for r in emoji if r["text"] == "hollow red circle")
    assert not set(motions_of(image)) & set(TURNS)
    image = next(r["image"] for r in emoji if r["text"] == "red apple")
    assert motions_of(image) == MOTIONS
    clip = animate(image, "turns clockwise", 5)
    # The stalk goes from the top to the right.
    np.testing.assert_array_equal(clip[1][:, ::-1].swapaxes(0, 1), image)
    np.testing.assert_array_equal(clip[4], image)


def test_a_clip_is_decided_by_the_seed_and_the_emoji():
    code = (
        "import hashlib\n"
        "from moejax.data.sources import open_source\n"
        "source = open_source('builtin:emoji_clips', 'train', seed=3)\n"
        "print(hashlib.sha256(source[700]['frames'].tobytes()).hexdigest(), source.text_at(700))"
    )
    run = lambda: (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )
    assert run() == run()
    train = [open_source("builtin:emoji_clips", "train", seed=seed) for seed in (3, 4)]
    same = np.mean([a["text"] == b["text"] for a, b in zip(*train, strict=True)])
    assert 0.05 < same < 0.25
    assert train[0].version != train[1].version
    # Runs of several seeds are measured on the same clips.
    held_out = [open_source("builtin:emoji_clips", "val", seed=seed) for seed in (3, 4)]
    assert held_out[0].version == held_out[1].version
    assert [r["text"] for r in held_out[0]] == [r["text"] for r in held_out[1]]


def test_splits_are_those_of_the_built_in_set():
    families = {}
    for split in ("train", "val", "test"):
        clips = open_source("builtin:emoji_clips", split)
        assert isinstance(clips, RecordSource) and clips.split == split
        ids = [record["id"] for record in clips]
        assert ids == [record["id"] for record in open_source("builtin:emoji32", split)]
        families[split] = {record["family"] for record in clips}
    assert not families["train"] & families["val"] and not families["train"] & families["test"]
    assert not families["val"] & families["test"]


def pipeline(split="train", codec=None, **changes):
    base = {"data.batch_size": 4, "model.depth.room": 0.0}
    config = load_config("videollm_mod", {**base, **changes})
    return build_pipeline(config, split, codec=codec or RedCodec())


def segments_of(row):
    for segment in range(1, row["segments"].max() + 1):
        here = row["segments"] == segment
        yield {name: row[name][here] for name in row}


def test_a_row_holds_whole_clips_frame_by_frame():
    pipe = pipeline(**{"data.sequence_length": 150, "data.drop_text": 0.0})
    whole = 0
    for index in range(40):
        row = pipe.row(index)
        segments = list(segments_of(row))
        assert len(segments) == len(pipe.row_records(index))
        for record, item in zip(pipe.row_records(index), segments, strict=True):
            tokens = item["tokens"]
            assert tokens[0] == BOS and tokens[-1] == EOS
            frames = np.reshape(tokens[1:25], (4, 6))
            assert (frames[:, 0] == BOI).all() and (frames[:, -1] == EOI).all()
            codes = RedCodec().encode(pipe.source[record]["frames"]).astype(int)
            np.testing.assert_array_equal(frames[:, 1:-1] - pipe.vocabulary.image_offset, codes)
            text = pipe.tokenizer.decode(pipe.vocabulary.to_text_ids(tokens[25:]))
            assert text == pipe.source.text_at(record)
            np.testing.assert_array_equal(item["modality"][1:25].reshape(4, 6)[:, 1:-1], 1)
            assert item["modality"].sum() == 16
            whole += 1
    assert whole > 80 and pipe.truncated == 0


@pytest.mark.parametrize("length, most", [(63, 1), (96, 2)])
def test_each_frame_is_a_picture_of_its_own_where_pictures_are_latents(length, most):
    codec = PatchCodec(RedLatents(), 1)
    config = load_config_dict("quickstart")
    config.model.latents.update(channels=1, grid=2, patch=1)
    config.data.update(source="builtin:emoji_clips", sequence_length=length)
    with config.unlocked():
        config.objective = load_config_dict("transfusion").objective
    pipe = build_pipeline(freeze(config), "train", codec=codec)
    clips = []
    for index in range(pipe.rows_per_epoch):
        row, records = pipe.row(index), pipe.row_records(index)
        clips.append(len(records))
        of_picture = row["image_id"] > 0
        numbers = np.arange(1, 4 * len(records) + 1)
        np.testing.assert_array_equal(row["image_id"][of_picture], np.repeat(numbers, 4))
        assert set(row["tokens"][of_picture]) == {PATCH}
        # So many the model has places for.
        assert len(numbers) <= max_pictures(length, 4)
        if index < 20:
            frames = np.concatenate([pipe.source[record]["frames"] for record in records])
            vectors = row["latents"][of_picture].reshape(-1, 4)
            np.testing.assert_allclose(vectors, RedCodec().encode(frames), rtol=1e-3)
    assert max(clips) == most


def test_variants_change_all_frames_alike(clips):
    record = next(r for r in clips if r["text"].endswith("moves left"))
    frames = frames_of(record)
    for number in range(1, 6):
        changed = variant(frames, number, 0, False)
        assert changed.shape == frames.shape and not np.array_equal(changed, frames)
        assert shows("moves left", changed)
    np.testing.assert_array_equal(
        variant(frames[:1], 3, 0, True)[0], variant(frames[0], 3, 0, True)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"languages": ("en", "de")}, "data.languages: builtin:emoji_clips has .* 'en' alone"),
        ({"caption": "keywords"}, "data.caption: builtin:emoji_clips has 'name' alone"),
        ({"frames": 1}, "data.frames: a clip has at least 2"),
        ({"frames": 14}, "data.frames=14: .* at most 13 places"),
    ],
)
def test_mistakes_are_named_with_the_mend(options, message):
    with pytest.raises(UserError, match=message):
        open_source("builtin:emoji_clips", "train", **options)


def test_a_clip_is_no_single_picture_and_needs_room():
    config = load_config("tokenizer_fsq", {"data.source": "builtin:emoji_clips"})
    with pytest.raises(UserError, match="builtin:emoji_clips: its records are no single pictures"):
        build_pipeline(config, "train")
    with pytest.raises(UserError, match="data.sequence_length=20: .* at least 27"):
        pipeline("val", **{"data.sequence_length": 20})
