"""Speech units: text -> espeak-ng -> 16 kHz -> log-mel -> the nearest of 256 centres per frame.

A unit stands for 20 ms. The log-mel is relative to the loudest value of its utterance and kept in
256 steps of 60/255 dB, silence at both ends cut off. espeak-ng is a formant synthesiser with one
voice here: what it says is clean and always the same, unlike a person's speech.
"""

import functools
import re
import shutil
import subprocess

import numpy as np
from jaxtyping import Float32, UInt8

from moejax.errors import UserError
from moejax.ops.kmeans import fit_kmeans, nearest

SAMPLE_RATE = 16_000
HOP = 320  # samples: 20 ms
WINDOW = 400  # samples: 25 ms
FFT = 512
MELS = 80
RANGE_DB = 60.0
# Frames quieter than the loudest by more are silence at the ends of an utterance.
SILENCE_DB = 45.0
MAX_UNITS = 96
NUM_UNITS = 256
# Frames that the centres are fitted to: more of them change nothing but the time.
FIT_FRAMES = 200_000

# espeak-ng says "Chinese letter" in English for each of these.
UNREADABLE = re.compile("[\u3005\u3400-\u4dbf\u4e00-\u9fff]")


def settings() -> dict[str, float]:
    """What decides the log-mels, beside the text and the version of espeak-ng."""
    return {
        "sample_rate": SAMPLE_RATE,
        "hop": HOP,
        "window": WINDOW,
        "fft": FFT,
        "mels": MELS,
        "range_db": RANGE_DB,
        "silence_db": SILENCE_DB,
        "max_units": MAX_UNITS,
    }


def readable(text: str) -> bool:
    """Whether espeak-ng can say ``text``."""
    return not UNREADABLE.search(text)


def require_espeak() -> str:
    """The version of espeak-ng. UserError with the command that installs it if it is missing."""
    if shutil.which("espeak-ng") is None:
        raise UserError(
            "espeak-ng is not installed, which speaks the names: apt-get install espeak-ng, "
            "or give --no-speech"
        )
    done = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"text-to-speech: (\S+)", done.stdout)
    return found[1] if found else "unknown"


def synthesise(text: str, language: str) -> Float32[np.ndarray, "samples"]:
    """``text`` as espeak-ng says it, mono at ``SAMPLE_RATE`` in [-1, 1]."""
    # Through stdin: a text may begin with a dash.
    command = ["espeak-ng", "-v", language, "--stdin", "--stdout", "-z"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    samples, rate = read_wav(done.stdout)
    return resample(samples, rate)


def read_wav(content: bytes) -> tuple[Float32[np.ndarray, "samples"], int]:
    """(samples, samples per second) of a mono WAV of 16 bits.

    espeak-ng writes to a pipe before it knows the length: the data go to the end of the file.
    """
    at = content.find(b"data")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE" or at < 36:
        raise ValueError("not a WAV file")
    form, channels = (
        int.from_bytes(content[20:22], "little"),
        int.from_bytes(content[22:24], "little"),
    )
    bits = int.from_bytes(content[34:36], "little")
    if (form, channels, bits) != (1, 1, 16):
        raise ValueError(f"format {form}, {channels} channels, {bits} bits; wanted PCM, mono, 16")
    data = content[at + 8 :]
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
    return samples, int.from_bytes(content[24:28], "little")


def resample(
    samples: Float32[np.ndarray, "samples"], rate: int
) -> Float32[np.ndarray, "resampled"]:
    """From ``rate`` to ``SAMPLE_RATE``, what lies above half of either filtered out."""
    if rate == SAMPLE_RATE:
        return samples
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, SAMPLE_RATE))
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)


@functools.cache
def mel_filters() -> Float32[np.ndarray, "mels bins"]:
    """Triangles that rise from one centre to the next, evenly spaced on the mel scale.

    mel(f) = 2595 log10(1 + f / 700), O'Shaughnessy 1987; 0 to 8 kHz.
    """
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)
    low, centre, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(samples: Float32[np.ndarray, "samples"]) -> UInt8[np.ndarray, "frames mels"]:
    """Log-mel of an utterance without the silence around it, at most ``MAX_UNITS`` frames.

    255 is the loudest value, 0 is ``RANGE_DB`` below it or less. No frames if it is all silent.
    """
    samples = np.pad(samples, (0, max(0, WINDOW - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectrum = np.abs(np.fft.rfft(windows * np.hanning(WINDOW), FFT)) ** 2
    mel = spectrum @ mel_filters().T
    energy = mel.sum(1)
    if energy.max() <= 0:
        return np.zeros((0, MELS), np.uint8)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-SILENCE_DB / 10))
    mel = mel[loud[0] : loud[-1] + 1]
    decibels = 10 * np.log10(np.maximum(mel / mel.max(), 1e-12))
    steps = np.clip(1 + decibels / RANGE_DB, 0, 1) * 255
    return np.round(steps).astype(np.uint8)[:MAX_UNITS]


def fit_units(frames: UInt8[np.ndarray, "n mels"]) -> Float32[np.ndarray, "units mels"]:
    """256 centres of (a sample of) ``frames`` by k-means, in the units of :func:`log_mel`."""
    if len(frames) > FIT_FRAMES:
        chosen = np.random.default_rng(0).choice(len(frames), FIT_FRAMES, replace=False)
        frames = frames[np.sort(chosen)]
    return fit_kmeans(frames.astype(np.float32), NUM_UNITS)


def encode_units(
    frames: UInt8[np.ndarray, "n mels"], centres: Float32[np.ndarray, "units mels"]
) -> tuple[UInt8[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """(the unit of each frame, its squared distance from the unit's centre)."""
    index, distance = nearest(frames.astype(np.float32), centres)
    return index.astype(np.uint8), distance
