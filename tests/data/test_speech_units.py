"""From text to speech units: mel bands of tones, silence, sample rates, units fitted on train."""

import shutil
import struct

import numpy as np
import pytest

from moejax.data.prepare import speech, utterances
from moejax.errors import UserError

RATE = speech.SAMPLE_RATE
needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None,
    reason="espeak-ng is not installed (apt-get install espeak-ng)",
)


def tone(hertz, seconds=0.5, rate=RATE, loudness=0.5):
    time = np.arange(int(seconds * rate)) / rate
    return (loudness * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


def wav(samples, rate, channels=1, length=None):
    """As espeak-ng writes it to a pipe: with a length that is not true."""
    data = (np.asarray(samples) * 32767).astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    size = 0x7FFFF000 if length is None else length
    return (
        b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<I", 16) + form
        + b"data" + struct.pack("<I", size) + data
    )  # fmt: skip


@pytest.mark.parametrize("hertz", [200, 440, 1000, 2500, 6000])
def test_a_tone_is_loudest_in_its_mel_band(hertz):
    frames = speech.log_mel(tone(hertz))
    # 80 triangles between 0 and 8 kHz: the peak of band i is at (i + 1) / 81 of the mel scale.
    expected = mel(hertz) / mel(RATE / 2) * (speech.MELS + 1) - 1
    loudest = frames[2:-2].argmax(1)
    # Below 500 Hz the bands are narrower than the 31 Hz between two bins of the spectrum.
    assert np.abs(loudest - expected).max() <= (1.5 if hertz < 500 else 0.75)
    assert (frames[2:-2].max(1) > 240).all()


def test_two_tones_have_two_peaks():
    frames = speech.log_mel(tone(500) + tone(3000))
    middle = frames[len(frames) // 2].astype(int)
    for hertz in (500, 3000):
        band = round(mel(hertz) / mel(RATE / 2) * (speech.MELS + 1) - 1)
        assert middle[band - 1 : band + 2].max() > 230
    assert middle[round(mel(1300) / mel(RATE / 2) * 81 - 1)] < 120


def test_every_band_hears_something():
    filters = speech.mel_filters()
    assert filters.shape == (speech.MELS, speech.FFT // 2 + 1)
    assert (filters.max(1) > 0.3).all() and filters.min() == 0 and filters.max() <= 1


def test_frames_are_20_ms_and_loudness_does_not_matter():
    frames = speech.log_mel(tone(700, seconds=1))
    assert len(frames) == (RATE - speech.WINDOW) // speech.HOP + 1 == 49
    quiet = speech.log_mel(tone(700, seconds=1, loudness=0.01))
    assert np.abs(frames.astype(int) - quiet).max() <= 1


def test_silence_is_cut_at_both_ends_only():
    gap = np.zeros(RATE // 5, np.float32)
    bare = speech.log_mel(np.concatenate([tone(700, 0.2), gap, tone(700, 0.2)]))
    padded = speech.log_mel(np.concatenate([gap, gap, tone(700, 0.2), gap, tone(700, 0.2), gap]))
    # One frame at each end may reach into the sound.
    assert 0 <= len(padded) - len(bare) <= 2
    assert padded[0].max() > 0 and padded[1].max() > 200
    assert padded[-1].max() > 0 and padded[-2].max() > 200
    assert (padded[10:18].max(1) == 0).any(), "the pause inside stays"


def test_no_sound_at_all_and_less_than_a_window():
    assert speech.log_mel(np.zeros(RATE, np.float32)).shape == (0, speech.MELS)
    assert speech.log_mel(np.zeros(0, np.float32)).shape == (0, speech.MELS)
    assert speech.log_mel(tone(1000)[:100]).shape == (1, speech.MELS)


def test_a_long_utterance_is_cut():
    assert len(speech.log_mel(tone(700, seconds=3))) == speech.MAX_UNITS


def test_resampling_keeps_the_tone_and_drops_what_would_fold_back():
    low = speech.resample(tone(1000, 1.0, rate=22_050), 22_050)
    assert abs(len(low) - RATE) <= 1
    assert abs(np.abs(np.fft.rfft(low)).argmax() - 1000) <= 1
    folded = speech.resample(tone(9500, 1.0, rate=22_050), 22_050)
    assert np.abs(folded[500:-500]).max() < 0.02
    same = tone(1000)
    assert speech.resample(same, RATE) is same


def test_wav_from_a_pipe():
    samples = tone(440, 0.1, rate=22_050)
    found, rate = speech.read_wav(wav(samples, 22_050))
    assert rate == 22_050
    np.testing.assert_allclose(found, samples, atol=1e-4)
    with pytest.raises(ValueError, match="2 channels"):
        speech.read_wav(wav(samples, 22_050, channels=2))
    with pytest.raises(ValueError, match="not a WAV file"):
        speech.read_wav(b"espeak-ng: error")


def test_units_tell_tones_apart_and_stand_for_their_centre():
    frames = np.concatenate([speech.log_mel(tone(hertz)) for hertz in (300, 900, 2700)])
    centres = speech.fit_units(frames)
    assert centres.shape == (speech.NUM_UNITS, speech.MELS)
    units, distance = speech.encode_units(frames, centres)
    assert units.dtype == np.uint8 and distance.max() < 1, "fewer frames than units: each its own"
    thirds = np.split(units, 3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(thirds[one]) & set(thirds[other])
    np.testing.assert_array_equal(centres, speech.fit_units(frames))


def test_only_some_frames_are_fitted_to(monkeypatch):
    monkeypatch.setattr(speech, "FIT_FRAMES", 40)
    frames = np.random.default_rng(0).integers(0, 256, (400, speech.MELS), dtype=np.uint8)
    centres = speech.fit_units(frames)
    assert len(np.unique(centres, axis=0)) == 40


def test_kanji_cannot_be_read():
    assert (
        speech.readable("grinning face")
        and speech.readable("ウインク")
        and speech.readable("きゃー")
    )
    assert (
        not speech.readable("笑顔")
        and not speech.readable("ねこの顔")
        and not speech.readable("時々")
    )


CONCEPTS = [
    {"id": "A", "split": "train", "names": {"en": "ay", "ja": "顔"}},
    {"id": "B", "split": "train", "names": {"en": "bee", "de": "be"}},
    {"id": "C", "split": "val", "names": {"en": "sea"}},
]


def chord(text, language):
    """What stands for a voice here: a sweep that the text decides."""
    start = 200 + 37 * (sum(map(ord, text + language)) % 101)
    return np.concatenate([tone(start + 20 * step, 0.04) for step in range(10)])


def test_utterances_of_all_names_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "synthesise", chord)
    spoken = utterances.speak(CONCEPTS, tmp_path, "1")
    assert sorted(spoken.units) == [("A", "en"), ("B", "de"), ("B", "en"), ("C", "en")]
    assert {units.dtype for units in spoken.units.values()} == {np.dtype(np.uint8)}
    assert spoken.about["distinct_utterances"] == 4 and spoken.about["silent"] == 0
    expected = speech.encode_units(speech.log_mel(chord("bee", "en")), spoken.centres)[0]
    np.testing.assert_array_equal(spoken.units["B", "en"], expected)


def test_what_is_held_out_has_no_say_in_the_units(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "synthesise", chord)
    before = utterances.speak(CONCEPTS, tmp_path, "1")
    other = [*CONCEPTS[:2], {**CONCEPTS[2], "names": {"en": "quite another", "fr": "mot"}}]
    after = utterances.speak(other, tmp_path, "1")
    np.testing.assert_array_equal(before.centres, after.centres)
    as_train = [*other[:2], {**other[2], "split": "train"}]
    assert not np.array_equal(utterances.speak(as_train, tmp_path, "1").centres, after.centres)


def test_another_version_of_the_engine_speaks_again(tmp_path, monkeypatch):
    spoken = []
    monkeypatch.setattr(
        speech, "synthesise", lambda text, language: spoken.append(text) or chord(text, language)
    )
    for engine, total in (("1", 4), ("1", 4), ("2", 8)):
        utterances.speak(CONCEPTS, tmp_path, engine)
        assert len(spoken) == total


def test_silent_names_have_no_utterance(tmp_path, monkeypatch):
    def sound(text, language):
        return np.zeros(RATE, np.float32) if text == "bee" else chord(text, language)

    monkeypatch.setattr(speech, "synthesise", sound)
    spoken = utterances.speak(CONCEPTS, tmp_path, "1")
    assert ("B", "en") not in spoken.units and len(spoken.units) == 3
    assert spoken.about["silent"] == 1


def test_held_out_homophones_are_left_out(tmp_path, monkeypatch):
    """The "sea" of val sounds like "see" of train; two of train may sound alike."""
    sound = {"sea": "see", "bee": "see"}
    monkeypatch.setattr(speech, "synthesise", lambda text, lang: chord(sound.get(text, text), lang))
    concepts = [*CONCEPTS[::-1], {"id": "D", "split": "train", "names": {"en": "see"}}]
    spoken = utterances.speak(concepts, tmp_path, "1")
    assert utterances.leave_out_homophones(concepts, spoken) == [["C", "en"]]
    assert {("B", "en"), ("D", "en")} < set(spoken.units) and ("C", "en") not in spoken.units


def test_without_espeak_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install espeak-ng, or give --no-speech"):
        speech.require_espeak()


@needs_espeak
def test_espeak_speaks():
    assert speech.require_espeak()[0].isdigit()
    english = speech.synthesise("grinning face", "en")
    assert 0.3 < len(english) / RATE < 2 and 0.05 < np.abs(english).max() <= 1
    np.testing.assert_array_equal(english, speech.synthesise("grinning face", "en"))
    frames = [speech.log_mel(speech.synthesise("1 - 2", language)) for language in ("en", "de")]
    assert len(frames[0]) != len(frames[1])
    assert len(speech.log_mel(speech.synthesise("-v", "en"))) > 5, "a dash is no flag"
