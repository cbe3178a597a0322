# SPDX-License-Identifier: Apache-2.0
"""Recordings -> waveforms at the rate that the model takes, decoded when their batch is made.

soundfile reads, SciPy's polyphase filter resamples, the model's own feature extractor does the rest. A training row
that is too long is cut where (seed, epoch, row) says; a scored one keeps its beginning.
"""

from __future__ import annotations

import math
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
_HIGHEST_RATE = 1_000_000  # samples a second; the resampling filter grows with it
_FILTER_REACH = 10  # periods of the lower rate on either side: what resample_poly's own filter has
_BLOCK = 1 << 16  # frames that are decoded at a time
_SAMPLES_PER_POSITION = 320  # of wav2vec 2.0 and its relatives; an estimate of cost for the others


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingReader:
    """A model's feature extractor and the longest recording, in seconds."""

    extractor: Any
    max_seconds: float

    @classmethod
    def load(cls, source: ModelSource, max_seconds: float) -> RecordingReader:
        """The reader for a model; ConfigError without soundfile or without a feature extractor."""
        try:
            import soundfile  # noqa: F401, PLC0415
        except (ImportError, OSError) as error:
            raise ConfigError("--task", f"audio needs soundfile ({error})",
                              fix="pip install 'mirrortune[audio]'") from error  # fmt: skip
        return cls(extractor=load_feature_extractor(source), max_seconds=max_seconds)

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    @property
    def max_samples(self) -> int:
        """Of the longest recording."""
        return round(self.max_seconds * self.rate)

    def features(self, waves: list[Wave]) -> Batch:
        """What the model's forward takes for recordings (samples,) at ``rate``: tensors (B, ...)."""
        made = self.extractor(waves, sampling_rate=self.rate, padding=True, return_tensors="pt")
        return dict(made)

    def save_pretrained(self, folder: str | Path) -> None:
        """The feature extractor's files."""
        self.extractor.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingExamples(Examples):
    """Rows of recordings.

    Attributes:
        recordings: one a row.
        targets: one a row, shape (N,).
        num_unlabelled: rows without a target.
        reader: makes features.
        samples: of each row at the model's rate, cut ones at their length, shape (N,).
        num_truncated: rows cut to the longest.
        seed: of the cuts.
    """

    recordings: FileCells
    targets: Targets
    num_unlabelled: int
    reader: RecordingReader
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
        """The given rows: what the feature extractor makes of them, and ``targets`` (B,)."""
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
        except Exception as error:  # libsndfile's, and whatever soundfile makes of a header
            raise self.recordings.unreadable(row, error) from error
        if not len(wave):
            raise self.recordings.unreadable(row, "it has no samples")
        return wave


def encode_recordings(
    split: Split, column: str, targets: Targets, missing: Any, reader: RecordingReader, *, seed: int
) -> RecordingExamples:
    """The recordings of a split; DataError with the row of one that cannot be opened."""
    import soundfile  # noqa: PLC0415

    recordings = FileCells.of(
        split, column, role="recording", readable="wav, flac, ogg, mp3 or what else libsndfile opens"
    )
    counts = np.zeros(len(recordings), dtype=np.int64)
    for row in range(len(recordings)):
        try:
            found = soundfile.info(recordings.open(row))
        except Exception as error:  # libsndfile's, and whatever soundfile makes of a header
            raise recordings.unreadable(row, error) from error
        if not 1 <= found.samplerate <= _HIGHEST_RATE:
            problem = f"it has {found.samplerate:,} samples a second, allowed are 1 to {_HIGHEST_RATE:,}"
            raise recordings.unreadable(row, problem)
        counts[row] = min(_resampled_length(found.frames, found.samplerate, reader.rate), reader.max_samples + 1)
    return RecordingExamples(
        recordings=recordings, targets=targets, num_unlabelled=int(missing.sum()), reader=reader,
        samples=np.minimum(counts, reader.max_samples),
        num_truncated=int((counts > reader.max_samples).sum()), seed=seed,
    )  # fmt: skip


def read_part(file: Any, first: int, count: int, wanted: int) -> Wave:
    """``count`` samples from ``first`` on of a recording at ``wanted`` samples a second (fewer where it ends before),
    shape (samples,), channels averaged.

    Only what they depend on is read, whatever the header says of the rest: a few bytes of zeros may stand for hours.
    Within rounding they are those of the whole recording resampled.

    Args:
        file: an open ``soundfile.SoundFile``.
        first: counted at ``wanted`` samples a second, as is ``count``.
        count: at most so many.
        wanted: samples a second.
    """
    common = math.gcd(file.samplerate, wanted)
    up, down = wanted // common, file.samplerate // common
    reach = 0 if up == down else -(-_FILTER_REACH * max(up, down) // up) + 1  # frames that the filter looks around
    start = max(0, first * down // up - reach) // down * down  # a frame that falls on an output sample
    stop = min(file.frames, -(-(first + count) * down // up) + reach)
    file.seek(start)
    parts, left = [], stop - start
    while left > 0:
        block = file.read(min(left, _BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            break  # the header promised more
        parts.append(block.mean(axis=1))
        left -= len(block)
    samples = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    before = first - start // down * up
    return resample(samples, file.samplerate, wanted)[before : before + count]


def _resampled_length(frames: int, rate: int, wanted: int) -> int:
    return -(-frames * wanted // rate)


def resample(samples: Wave, rate: int, wanted: int) -> Wave:
    """A waveform (samples,) of ``rate`` at ``wanted`` samples a second."""
    if rate == wanted:
        return samples
    import scipy.signal  # noqa: PLC0415

    common = math.gcd(rate, wanted)
    return np.asarray(scipy.signal.resample_poly(samples, wanted // common, rate // common), dtype=np.float32)
