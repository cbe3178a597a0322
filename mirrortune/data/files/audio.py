# SPDX-License-Identifier: Apache-2.0
"""Decode audio files to waveforms at the model's sampling rate when their batch is made.

soundfile reads, SciPy's polyphase filter resamples, and the model's feature extractor does the rest. Of a training row
that is too long, a part is chosen at random by (seed, epoch, row); an evaluation row keeps its beginning.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Examples, IntArray, Rows, Targets
from mirrortune.data.files.media import FileCells
from mirrortune.errors import ConfigError, counted
from mirrortune.models.load import ModelSource, load_feature_extractor

Wave = npt.NDArray[np.float32]
_HIGHEST_RATE = 1_000_000  # samples per second; the resampling filter grows with it
_FILTER_REACH = 10  # periods of the lower rate on either side, as in resample_poly's default filter
_SILENT = "it has no samples"
_BLOCK = 1 << 16  # frames decoded at a time
# libsndfile's note of a file that ends before the samples that its header states.
_CUT_OFF = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7F000000  # written by programs that cannot go back to the header, such as ffmpeg into a pipe
_LEAST_THERE = 0.99  # of the samples
_MISCOUNT = 128  # bytes; some programs state the size of the file, header and all
_SAMPLES_PER_POSITION = 320  # of wav2vec 2.0 and similar models; an estimate of cost for others


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioReader:
    """A model's feature extractor and the maximum length of a recording, in seconds."""

    extractor: Any
    max_seconds: float

    @classmethod
    def load(cls, source: ModelSource, max_seconds: float) -> AudioReader:
        """Load the reader for a model; ConfigError without soundfile or without a feature extractor."""
        try:
            import soundfile  # noqa: F401, PLC0415
        except (ImportError, OSError) as error:
            raise ConfigError("--task", f"audio needs soundfile ({error})",
                              fix="pip install 'mirrortune[audio]'") from error  # fmt: skip
        return cls(extractor=load_feature_extractor(source), max_seconds=max_seconds)

    @property
    def rate(self) -> int:
        """Samples per second."""
        return int(self.extractor.sampling_rate)

    @property
    def max_samples(self) -> int:
        """Maximum length of a recording, in samples."""
        return round(self.max_seconds * self.rate)

    def features(self, waves: list[Wave]) -> Batch:
        """Return the model inputs for waveforms (samples,) at ``rate``: tensors (B, ...)."""
        # Whisper's extractor and model take 30 seconds, whatever the length of the recordings.
        padding = "max_length" if hasattr(self.extractor, "nb_max_frames") else True
        made = self.extractor(waves, sampling_rate=self.rate, padding=padding, return_tensors="pt")
        return dict(made)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the feature extractor's files."""
        self.extractor.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioExamples(Examples):
    """Rows of recordings.

    Attributes:
        recordings: one per row.
        targets: one per row, shape (N,).
        num_unlabelled: rows without a target.
        reader: of the model.
        samples: length of each row at the model's rate, after cutting, shape (N,).
        num_truncated: rows cut to the maximum length.
        seed: of the places of cuts.
    """

    recordings: FileCells
    targets: Targets
    num_unlabelled: int
    reader: AudioReader
    samples: IntArray
    num_truncated: int
    seed: int

    @override
    def __len__(self) -> int:
        return len(self.targets)

    @property
    @override
    def lengths(self) -> IntArray:
        return self.samples // _SAMPLES_PER_POSITION + 1

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return the outputs of the feature extractor for the given rows, and ``targets`` (B,)."""
        batch = self.reader.features([self._wave(int(row), epoch) for row in rows])
        batch["targets"] = torch.from_numpy(np.ascontiguousarray(self.targets[rows]))
        return batch

    @override
    def describe(self) -> str:
        seconds = self.samples / self.reader.rate
        text = f"{counted(len(self), 'row')}, {np.median(seconds):.1f} s (median), {seconds.max():.1f} s at most"
        return f"{text}; {self.num_truncated} cut" if self.num_truncated else text

    def _wave(self, row: int, epoch: int | None) -> Wave:
        import soundfile  # noqa: PLC0415

        longest, wanted = self.reader.max_samples, self.reader.rate
        try:
            with soundfile.SoundFile(self.recordings.open(row)) as file:
                total, first = _resampled_length(file.frames, file.samplerate, wanted), 0
                if total > longest and epoch is not None:
                    first = int(np.random.default_rng([self.seed, epoch, row]).integers(total - longest + 1))
                wave = read_part(file, first, longest, wanted)
        except Exception as error:  # of libsndfile, and others that soundfile raises for odd headers
            raise self.recordings.unreadable(row, error) from error
        if not len(wave):
            raise self.recordings.unreadable(row, _SILENT)
        return wave


def encode_audio(
    split: Split, column: str, targets: Targets, missing: Any, reader: AudioReader, *, seed: int
) -> AudioExamples:
    """Encode the recordings of a split; DataError with the row of one that cannot be opened."""
    import soundfile  # noqa: PLC0415

    recordings = FileCells.of(
        split, column, role="recording", readable="wav, flac, ogg, mp3 or what else libsndfile opens"
    )
    counts = np.zeros(len(recordings), dtype=np.int64)
    for row in range(len(recordings)):
        try:
            found = soundfile.info(recordings.open(row))
        except Exception as error:  # of libsndfile, and others that soundfile raises for odd headers
            raise recordings.unreadable(row, error) from error
        if not 1 <= found.samplerate <= _HIGHEST_RATE:
            problem = f"it has {found.samplerate:,} samples a second, allowed are 1 to {_HIGHEST_RATE:,}"
            raise recordings.unreadable(row, problem)
        if reason := _missing_part(found.extra_info):
            raise recordings.unreadable(row, reason)
        if not found.frames:
            raise recordings.unreadable(row, _SILENT)
        counts[row] = min(_resampled_length(found.frames, found.samplerate, reader.rate), reader.max_samples + 1)
    return AudioExamples(
        recordings=recordings, targets=targets, num_unlabelled=int(missing.sum()), reader=reader,
        samples=np.minimum(counts, reader.max_samples),
        num_truncated=int((counts > reader.max_samples).sum()), seed=seed,
    )  # fmt: skip


def _missing_part(log: str) -> str | None:
    """Return what is wrong with a file that is cut off, from libsndfile's log of opening it; None if it is whole.

    libsndfile opens such files as shorter recordings: wav, aiff, au, w64 and others whose header states the length.
    """
    for found in _CUT_OFF.finditer(log):
        stated, there = int(found[1]), int(found[2])
        if stated < _UNKNOWN_SIZE and there < min(_LEAST_THERE * stated, stated - _MISCOUNT):
            return f"it is cut off: {there:,} of the {stated:,} bytes that its header states"
    return None


def read_part(file: Any, first: int, count: int, wanted: int) -> Wave:
    """Read a part of a recording, resampled, channels averaged.

    Only the frames that the part depends on are decoded, because a few bytes may encode hours of silence. Up to
    rounding, the result equals that part of the resampled recording.

    Args:
        file: an open ``soundfile.SoundFile``.
        first: first sample, counted at the rate ``wanted``.
        count: maximum number of samples, at the rate ``wanted``.
        wanted: samples per second.

    Returns:
        Shape (samples,); fewer than ``count`` if the recording ends before.
    """
    common = math.gcd(file.samplerate, wanted)
    up, down = wanted // common, file.samplerate // common
    reach = 0 if up == down else -(-_FILTER_REACH * max(up, down) // up) + 1  # frames that the filter needs
    start = max(0, first * down // up - reach) // down * down  # a frame that coincides with an output sample
    stop = min(file.frames, -(-(first + count) * down // up) + reach)
    file.seek(start)
    parts, left = [], stop - start
    while left > 0:
        block = file.read(min(left, _BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            break  # the header claimed more
        parts.append(block.mean(axis=1))
        left -= len(block)
    samples = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    before = first - start // down * up
    return resample(samples, file.samplerate, wanted)[before : before + count]


def _resampled_length(frames: int, rate: int, wanted: int) -> int:
    return -(-frames * wanted // rate)


def resample(samples: Wave, rate: int, wanted: int) -> Wave:
    """Resample a waveform (samples,) from ``rate`` to ``wanted`` samples per second."""
    if rate == wanted:
        return samples
    import scipy.signal  # noqa: PLC0415

    common = math.gcd(rate, wanted)
    return np.asarray(scipy.signal.resample_poly(samples, wanted // common, rate // common), dtype=np.float32)
