# SPDX-License-Identifier: Apache-2.0
"""recordings: rates, channels, lengths, and where recordings can be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from mirrortune.data.dataset import Split, load_data
from mirrortune.data.files.audio import AudioExamples, AudioReader, encode_audio, resample
from mirrortune.errors import DataError
from mirrortune.models.load import find_model
from mirrortune.system.paths import DataPlace
from tests.tiny_models import write_tiny_audio


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny wav2vec 2.0."""
    return write_tiny_audio(tmp_path_factory.mktemp("models") / "tiny-wav2vec2")


def tone(hertz: float, rate: int = 16000, seconds: float = 0.2, channels: int = 1) -> bytes:
    """A tone as a wav file."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([wave] * channels, axis=1), rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def examples(values: list[Any], folder: Path, max_seconds: float = 1.0, where: Path | None = None) -> AudioExamples:
    """Rows of recordings."""
    split = Split(table=pa.table({"audio": values}), source="rows.parquet", folder=where)
    reader = AudioReader.load(find_model(str(folder)), max_seconds)
    targets = np.arange(len(values))
    return encode_audio(split, "audio", targets, targets < 0, reader, seed=0)


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 1), (8000, 2)])
def test_any_rate_and_any_channels_are_the_same_tone(audio: Path, rate: int, channels: int) -> None:
    found = examples([tone(440, rate, channels=channels)], audio)
    values = found.batch(np.array([0]))["input_values"][0].numpy()
    assert len(values) == found.samples[0] == 3200
    peak = np.abs(np.fft.rfft(values)).argmax() * 16000 / len(values)
    assert peak == pytest.approx(440, abs=6)


def test_resampling_keeps_what_both_rates_can_hold() -> None:
    wave = np.sin(2 * np.pi * 200 * np.arange(8000) / 8000).astype(np.float32)
    again = resample(resample(wave, 8000, 16000), 16000, 8000)
    np.testing.assert_allclose(again[100:-100], wave[100:-100], atol=1e-2)


def test_long_recordings_are_cut_by_the_seed_and_scored_from_the_beginning(audio: Path) -> None:
    noise = np.random.default_rng(0).normal(size=16000)
    stream = io.BytesIO()
    soundfile.write(stream, noise, 16000, format="WAV", subtype="FLOAT")
    found = examples([stream.getvalue()], audio, max_seconds=0.25)
    scored, first, again, second = (found.batch(np.array([0]), e)["input_values"] for e in (None, 0, 0, 1))
    assert scored.shape == (1, 4000)
    assert found.num_truncated == 1
    assert found.describe().endswith("; 1 cut")
    assert first.equal(again)
    assert not first.equal(second)
    expected = (noise[:4000] - noise[:4000].mean()) / noise[:4000].std()
    np.testing.assert_allclose(scored[0].numpy(), expected, atol=1e-3)


def test_bytes_paths_and_structs_are_the_same_recording(audio: Path, tmp_path: Path) -> None:
    content = tone(300)
    (tmp_path / "a.wav").write_bytes(content)
    places: list[list[Any]] = [[content], ["a.wav"], [{"bytes": content, "path": None}]]
    made = [examples(values, audio, where=tmp_path).batch(np.array([0]))["input_values"] for values in places]
    assert all(values.equal(made[0]) for values in made)


@pytest.mark.parametrize("value", [b"not a recording", None, b""])
def test_recordings_that_cannot_be_opened_are_refused_at_once(audio: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.parquet row 2: its recording cannot be read"):
        examples([tone(300), value], audio)


def test_class_folders_of_recordings_are_tables_of_audio(tmp_path: Path) -> None:
    for label in ("low", "high"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.wav").write_bytes(tone(300))
    train = load_data(DataPlace.parse(str(tmp_path))).require("train", "here")
    assert train.table.to_pydict() == {"audio": ["high/1.wav", "low/1.wav"], "label": ["high", "low"]}


def test_a_recording_without_samples_is_refused_before_training(audio: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: .*it has no samples"):
        examples([tone(440), tone(440, seconds=0)], audio)


def pcm(kind: str) -> bytes:
    """A second of noise in a format without compression."""
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(0).normal(0, 0.1, 16000), 16000, format=kind, subtype="PCM_16")
    return stream.getvalue()


def test_a_short_recording_whose_header_states_the_size_of_the_file_is_whole(audio: Path) -> None:
    short = tone(440, seconds=0.05)
    place = short.index(b"data") + 4
    assert len(examples([short[:place] + len(short).to_bytes(4, "little") + short[place + 4 :]], audio)) == 1


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "SVX"])
def test_a_recording_that_is_cut_off_is_refused_before_training(audio: Path, tmp_path: Path, kind: str) -> None:
    whole = pcm(kind)
    (tmp_path / "whole.wav").write_bytes(whole)
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])

    assert examples([whole, whole[:-40]], audio).samples.min() >= 15900, "a few bytes less do no harm"
    with pytest.raises(DataError, match=r"row 2: its recording 'half\.wav' cannot be read \(it is cut off: 1\d,\d+ of"):
        examples(["whole.wav", "half.wav"], audio, where=tmp_path)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_recording_whose_header_was_written_before_its_samples_is_whole(audio: Path, size: int) -> None:
    content = bytearray(pcm("WAV"))
    place = content.index(b"data") + 4
    content[place : place + 4] = size.to_bytes(4, "little")
    assert examples([bytes(content)], audio).samples[0] == 16000


def test_short_recordings_are_padded_to_what_whisper_takes() -> None:
    from transformers import WhisperFeatureExtractor

    reader = AudioReader(extractor=WhisperFeatureExtractor(feature_size=80), max_seconds=1.0)
    assert reader.features([np.zeros(16000, np.float32)] * 2)["input_features"].shape == (2, 80, 3000)
