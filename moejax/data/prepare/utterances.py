"""All names of emoji3m spoken, and their units; chunk by chunk, so that a killed run goes on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.prepare import speech
from moejax.data.prepare.stages import saved_arrays, say, track
from moejax.data.records import SPLITS

# Utterances whose log-mels are kept as one file: what a killed run loses at most.
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Speech:
    """``units[concept id, language]`` is an utterance, its units [n] u8."""

    units: dict[tuple[str, str], np.ndarray]
    centres: np.ndarray  # [256, 80] f32, log-mels as speech.log_mel gives them
    about: dict[str, Any]  # how they were made and how well the units fit, for dataset.json


def speak(concepts: Sequence[Mapping], folder: Path, engine: str) -> Speech:
    """Speaks every name that espeak-ng can read, and fits the units to those of train.

    Args:
      concepts: with ``id``, ``split`` and ``names``.
      folder: for what is kept.
      engine: the version of espeak-ng.
    """
    jobs = [
        (concept["id"], language, name, concept["split"])
        for concept in concepts
        for language, name in concept["names"].items()
        if speech.readable(name)
    ]
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    paths = [folder / f"{_key(chunk, engine)}.npz" for chunk in chunks]
    left = [(chunk, path) for chunk, path in zip(chunks, paths, strict=True) if not path.exists()]
    made = len(chunks) - len(left)
    if left:
        say(f"speech: {len(jobs):,} utterances; {made} of {len(chunks)} chunks are there already")
    for chunk, path in track(left, "speech, chunks of 256", len(chunks), start=made):
        saved_arrays(path, lambda chunk=chunk: _log_mels(chunk))
    held_out = [split != "train" for *_, split in jobs]
    key = hashlib.sha256(f"{[path.name for path in paths]} {held_out}".encode()).hexdigest()[:16]
    fitted = saved_arrays(folder / f"units-{key}.npz", lambda: _fit(paths, held_out))
    ends = np.cumsum(fitted["lengths"])
    utterances = np.split(fitted["units"], ends[:-1])
    units = {
        (job[0], job[1]): utterance
        for job, utterance in zip(jobs, utterances, strict=True)
        if len(utterance)
    }
    return Speech(units, fitted["centres"], _describe(fitted, len(jobs), len(units), engine))


def leave_out_homophones(concepts: Sequence[Mapping], spoken: Speech) -> list[list[str]]:
    """Takes held-out utterances out of ``spoken`` that sound just like one of another split.

    Of train and a held-out split that of the held-out split goes, of val and test that of test.

    Returns:
      [id, language] of each.
    """
    owner: dict[bytes, str] = {}
    gone = []
    for concept in sorted(concepts, key=lambda concept: SPLITS.index(concept["split"])):
        for language in concept["names"]:
            key = concept["id"], language
            if key not in spoken.units:
                continue
            if owner.setdefault(spoken.units[key].tobytes(), concept["split"]) != concept["split"]:
                del spoken.units[key]
                gone.append([*key])
    return gone


def _key(chunk: Sequence[tuple], engine: str) -> str:
    """What decides the log-mels of a chunk."""
    recipe = [engine, [job[1:3] for job in chunk], speech.settings()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def _log_mels(chunk: Sequence[tuple]) -> dict[str, np.ndarray]:
    """The frames of all utterances one after the other, and how many each has."""

    def one(job: tuple) -> np.ndarray:
        return speech.log_mel(speech.synthesise(job[2], job[1]))

    # espeak-ng is a process of its own for each utterance: threads keep all processors busy.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        mels = list(pool.map(one, chunk))
    lengths = np.asarray([len(mel) for mel in mels], np.int32)
    return {"frames": np.concatenate(mels), "lengths": lengths}


def _fit(paths: Sequence[Path], held_out: Sequence[bool]) -> dict[str, np.ndarray]:
    """Centres from the utterances that are not held out, and the units of all."""
    say("speech: fitting the units")
    stored = []
    for path in paths:
        with np.load(path) as chunk:
            stored.append((chunk["frames"], chunk["lengths"]))
    lengths = np.concatenate([chunk_lengths for _, chunk_lengths in stored])
    frames = np.concatenate([chunk_frames for chunk_frames, _ in stored])
    train = np.repeat(~np.asarray(held_out), lengths)
    centres = speech.fit_units(frames[train])
    encoded = [speech.encode_units(chunk_frames, centres) for chunk_frames, _ in stored]
    distance = np.concatenate([chunk_distance for _, chunk_distance in encoded])
    # The error beside that of one centre for all, on train and on what is held out.
    spread = np.var(frames[train].astype(np.float32), axis=0).sum()
    errors = [distance[part].mean() / spread if part.any() else 0 for part in (train, ~train)]
    return {
        "centres": centres,
        "units": np.concatenate([chunk_units for chunk_units, _ in encoded]),
        "lengths": lengths,
        "errors": np.asarray(errors, np.float32),
    }


def _describe(fitted: Mapping, jobs: int, spoken: int, engine: str) -> dict[str, Any]:
    lengths = fitted["lengths"]
    counts = np.bincount(fitted["units"], minlength=speech.NUM_UNITS)
    shares = counts[counts > 0] / counts.sum()
    utterances = np.split(fitted["units"], np.cumsum(lengths)[:-1])
    return {
        "engine": f"espeak-ng {engine}, one voice per language",
        **speech.settings(),
        "fitted_on": "train",
        "silent": jobs - spoken,
        "cut_at_max_units": int((lengths == speech.MAX_UNITS).sum()),
        "mean_units": round(float(lengths.mean()), 1),
        "hours": round(float(lengths.sum()) * speech.HOP / speech.SAMPLE_RATE / 3600, 2),
        "used_units": int((counts > 0).sum()),
        "unit_perplexity": round(float(np.exp(-(shares * np.log(shares)).sum())), 1),
        "distinct_utterances": len({utterance.tobytes() for utterance in utterances}),
        "normalised_error_train": round(float(fitted["errors"][0]), 4),
        "normalised_error_held_out": round(float(fitted["errors"][1]), 4),
    }
