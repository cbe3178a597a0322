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
from torch import nn

from mirrortune.data import Split
from mirrortune.errors import ConfigError, counted
from mirrortune.examples import Batch, IntArray, Rows, Targets
from mirrortune.file_cells import FileCells
from mirrortune.model import ModelSource, load_feature_extractor

Wave = npt.NDArray[np.float32]
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
class RecordingExamples:
    """Rows of recordings; see :class:`mirrortune.examples.Examples`.

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

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> IntArray:
        """Positions of each row, shape (N,)."""
        return self.samples // _SAMPLES_PER_POSITION + 1

    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """The given rows: what the feature extractor makes of them, and ``targets`` (B,)."""
        batch = self.reader.features([self._wave(int(row), epoch) for row in rows])
        batch["targets"] = torch.from_numpy(np.ascontiguousarray(self.targets[rows]))
        return batch

    def describe(self) -> str:
        """Rows, and the lengths of their recordings."""
        seconds = self.samples / self.reader.rate
        text = f"{counted(len(self), 'row')}, {np.median(seconds):.1f} s (median), {seconds.max():.1f} s at most"
        return f"{text}; {self.num_truncated} cut" if self.num_truncated else text

    def verify(self, model: nn.Module) -> None:
        """Nothing."""

    def _wave(self, row: int, epoch: int | None) -> Wave:
        import soundfile  # noqa: PLC0415

        try:
            samples, rate = soundfile.read(self.recordings.open(row), dtype="float32")
        except (OSError, ValueError, RuntimeError) as error:
            raise self.recordings.unreadable(row, error) from error
        wave = resample(samples.mean(axis=1) if samples.ndim > 1 else samples, rate, self.reader.rate)
        if not len(wave):
            raise self.recordings.unreadable(row, ValueError("no samples"))
        longest, first = self.reader.max_samples, 0
        if len(wave) > longest and epoch is not None:
            first = int(np.random.default_rng([self.seed, epoch, row]).integers(len(wave) - longest + 1))
        return wave[first : first + longest]


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
        except (OSError, ValueError, RuntimeError) as error:
            raise recordings.unreadable(row, error) from error
        counts[row] = math.ceil(found.frames * reader.rate / found.samplerate)
    return RecordingExamples(
        recordings=recordings, targets=targets, num_unlabelled=int(missing.sum()), reader=reader,
        samples=np.minimum(counts, reader.max_samples),
        num_truncated=int((counts > reader.max_samples).sum()), seed=seed,
    )  # fmt: skip


def resample(samples: Wave, rate: int, wanted: int) -> Wave:
    """A waveform (samples,) of ``rate`` at ``wanted`` samples a second."""
    if rate == wanted:
        return samples
    import scipy.signal  # noqa: PLC0415

    common = math.gcd(rate, wanted)
    return np.asarray(scipy.signal.resample_poly(samples, wanted // common, rate // common), dtype=np.float32)
