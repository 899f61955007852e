"""``moejax prepare emoji3m``: pictures in four art styles, names in 12 languages, and speech.

A concept is one emoji without skin tones. Its family and split are those of ``builtin:emoji32``
(moejax/data/prepare/concepts.py), so that what is held out there is held out here, in every style
and language. Left out are pictures with nothing to see, held-out pictures that look almost like
one of another split, also in a mirror, and held-out utterances with the units of one of another.

Each stage keeps its result in ``.work`` inside the set's folder (moejax/data/prepare/stages.py).
"""

import collections
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.emoji import load_emoji32
from moejax.data.local import RECIPES
from moejax.data.prepare import packages as sources
from moejax.data.prepare.concepts import LANGUAGES
from moejax.data.prepare.drawings import SIZE, require_rasteriser
from moejax.data.prepare.notice import LICENCES, notice
from moejax.data.prepare.renderings import STYLES, Renderings, leave_out, read_concepts, render
from moejax.data.prepare.speech import NUM_UNITS, require_espeak
from moejax.data.prepare.stages import only_one, saved_json, say
from moejax.data.prepare.utterances import Speech, leave_out_homophones, speak
from moejax.data.record_io import Row, read_description, write_set
from moejax.data.records import SPLITS
from moejax.errors import UserError

NAME = "emoji3m"
PACKAGES = (
    *(sources.NOTO, sources.TWEMOJI, sources.OPENMOJI, sources.FLUENT),
    *(sources.NAMES, sources.DERIVED_NAMES, sources.WEIGHTS),
)
CENTRES = "speech_units.npy"


def prepare(data_dir: str, *, speech: bool = True, limit: int = 0) -> dict[str, Any]:
    """Makes the set ``data_dir/emoji3m``, or goes on where an earlier run ended.

    Args:
      data_dir: as ``data.data_dir``.
      speech: whether names are spoken.
      limit: so many concepts, evenly spread; 0 is all.

    Returns:
      The set's dataset.json.

    Raises:
      UserError: a program or package is missing, or a larger set is there.
    """
    folder = Path(data_dir).expanduser() / NAME
    options = {"limit": limit, "speech": speech}
    known = _what_is_there(folder, options)
    if known is not None:
        say(f"{folder} is there already")
        return known
    require_rasteriser()
    engine = require_espeak() if speech else ""
    work = folder / ".work"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: {error}; give a folder to write to") from error
    with only_one(work):
        packages = work / "packages"
        sources.fetch(PACKAGES, packages)
        stage = work / _key(limit)
        concepts = saved_json(stage / "concepts.json", lambda: read_concepts(packages, limit))
        renderings = render(packages, concepts, stage)
        left_out = leave_out(packages, concepts, renderings, stage)
        concepts = [c for c in concepts if any(c["id"] in renderings[style] for style in STYLES)]
        spoken = speak(concepts, work / "speech", engine) if speech else None
        if spoken:
            left_out["homophones"] = leave_out_homophones(concepts, spoken)
        rows = make_rows(concepts, renderings, spoken)
        check_apart(rows)
        description = _describe(rows, left_out, spoken, options)
        files = {"NOTICE": notice(packages).encode()}
        if spoken:
            buffer = io.BytesIO()
            np.save(buffer, spoken.centres)
            files[CENTRES] = buffer.getvalue()
        version = _content_hash(rows, renderings, description)
        written = write_set(folder, rows, {"version": version, **description}, files)
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    say(f"{work} ({size / 1e6:.0f} MB) may be deleted; it spares the time of another run")
    return written


def make_rows(
    concepts: Sequence[Mapping], renderings: Renderings, spoken: Speech | None
) -> dict[str, list[Row]]:
    """Split -> its rows, in the order of ``concepts``."""
    categories = load_emoji32()[0]["categories"]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for concept in concepts:
        keys = ("id", "family", "mirror", "names", "keywords")
        header = {key: concept[key] for key in keys}
        header["label"] = categories.index(concept["category"])
        parts = {}
        for style in STYLES:
            if concept["id"] in renderings[style]:
                parts[f"image/{style}"] = _png(renderings[style][concept["id"]])
        for language in concept["names"]:
            if spoken and (concept["id"], language) in spoken.units:
                units = spoken.units[concept["id"], language]
                parts[f"speech/{language}"] = units.tobytes()
        rows[concept["split"]].append(Row(header, parts))
    return rows


def check_apart(rows: Mapping[str, Sequence[Row]]) -> None:
    """RuntimeError if two splits share a family, a name in one language, or an utterance.

    Names are compared case-folded.
    """
    owner: dict[tuple[str, str], str] = {}
    for split, members in rows.items():
        for header, parts in members:
            names = [(lang, name.casefold()) for lang, name in header["names"].items()]
            spoken = [("speech", part.hex()) for name, part in parts.items() if "speech/" in name]
            for key in [("family", header["family"]), *names, *spoken]:
                if owner.setdefault(key, split) != split:
                    raise RuntimeError(f"{key} lies in {owner[key]} and in {split}")


def report(description: Mapping[str, Any]) -> str:
    """What was made, as lines for people."""
    splits = description["splits"]

    def counts(kind: str, of: Sequence[str]) -> str:
        totals = {name: sum(about[kind].get(name, 0) for about in splits.values()) for name in of}
        each = ", ".join(f"{name} {total:,}" for name, total in totals.items())
        return f"{sum(totals.values()):,} ({each})"

    lines = [
        f"{description['name']}, version {description['version']}",
        f"concepts    {sum(about['rows'] for about in splits.values()):,}",
        f"renderings  {counts('renderings', description['styles'])}",
        f"names       {counts('names', description['languages'])}",
        f"utterances  {counts('utterances', description['languages'])}",
    ]
    if "speech" in description:
        about = description["speech"]
        lines.append(
            f"speech      {about['hours']} hours, {about['mean_units']} units of 20 ms each, "
            f"{about['used_units']} of {description['num_audio_codes']} units used (perplexity "
            f"{about['unit_perplexity']}), {about['cut_at_max_units']:,} cut at "
            f"{about['max_units']}"
        )
    for split, about in splits.items():
        lines.append(
            f"{split:<11} {about['families']:,} families, {about['rows']:,} concepts, "
            f"{sum(about['renderings'].values()):,} renderings, "
            f"{sum(about['utterances'].values()):,} utterances"
        )
    left_out = description["left_out"]
    lines.append(
        f"left out    {len(left_out['blank'])} pictures with nothing to see; held-out "
        f"{len(left_out['look_alikes'])} pictures that look and "
        f"{len(left_out.get('homophones', []))} utterances that sound like one of another split"
    )
    return "\n".join(lines)


def _what_is_there(folder: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """dataset.json if the set that is wanted is there; UserError if it holds more than that."""
    try:
        known = read_description(folder)
    except (FileNotFoundError, NotADirectoryError, UserError):
        return None
    if known["name"] != NAME or known.get("recipe") != RECIPES[NAME]:
        return None
    there = known["options"]
    if there == options:
        return known
    largest = lambda limit: limit or float("inf")
    if (
        largest(there["limit"]) <= largest(options["limit"])
        and there["speech"] <= options["speech"]
    ):
        return None
    has = f"{there['limit'] or 'all'} concepts, {'with' if there['speech'] else 'without'} speech"
    raise UserError(f"{folder} holds a set of {has}; delete it first, or give another --data-dir")


def _key(limit: int) -> str:
    """What decides concepts and pictures."""
    digests = [package.sha256 for package in PACKAGES]
    recipe = [RECIPES[NAME], load_emoji32()[0]["version"], limit, digests]
    return "pictures-" + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _describe(
    rows: Mapping[str, Sequence[Row]],
    left_out: Mapping[str, list],
    spoken: Speech | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """dataset.json without what is known only once the files are written."""
    description: dict[str, Any] = {
        "name": NAME,
        "recipe": RECIPES[NAME],
        "options": dict(options),
        "image_size": SIZE,
        "languages": list(LANGUAGES),
        "styles": list(STYLES),
        "categories": load_emoji32()[0]["categories"],
        "num_audio_codes": NUM_UNITS if spoken else 0,
        "splits": {split: _count(members) for split, members in rows.items()},
        "left_out": dict(left_out),
        "packages": {package.spec: package.sha256 for package in PACKAGES},
        "licences": list(LICENCES),
    }
    if spoken:
        description["speech"] = {**spoken.about, "centres": CENTRES}
    return description


def _count(rows: Sequence[Row]) -> dict[str, Any]:
    """What a split holds, by style and by language."""
    parts: dict[str, collections.Counter] = {
        "image": collections.Counter(),
        "speech": collections.Counter(),
    }
    units = 0
    for _, members in rows:
        for name, part in members.items():
            kind, _, which = name.partition("/")
            parts[kind][which] += 1
            units += len(part) if kind == "speech" else 0
    names = collections.Counter(lang for header, _ in rows for lang in header["names"])
    return {
        "families": len({header["family"] for header, _ in rows}),
        "renderings": {style: parts["image"][style] for style in STYLES},
        "names": {lang: names[lang] for lang in LANGUAGES},
        "utterances": {lang: parts["speech"][lang] for lang in LANGUAGES},
        "speech_units": units,
    }


def _content_hash(
    rows: Mapping[str, Sequence[Row]], renderings: Renderings, description: Mapping[str, Any]
) -> str:
    """16 hexadecimal digits of headers, pixels and units: the same whatever encodes the PNGs."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for split, members in rows.items():
        for header, parts in members:
            digest.update(json.dumps([split, header], sort_keys=True).encode())
            for name, part in parts.items():
                kind, _, which = name.partition("/")
                part = renderings[which][header["id"]].tobytes() if kind == "image" else part
                digest.update(name.encode() + hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
