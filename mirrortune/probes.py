# SPDX-License-Identifier: Apache-2.0
"""Inputs on which a merged model is compared with base + adapter."""

from __future__ import annotations

from typing import Any

import numpy as np

from mirrortune.examples import Batch
from mirrortune.images import ImageReader
from mirrortune.model import ModelSource, load_tokenizer
from mirrortune.recordings import RecordingReader
from mirrortune.tokens import resolve_max_length

# Short, long, and with unusual characters, so that padding and unknown tokens take part.
SENTENCES = (
    "A gripping, beautifully acted film.",
    "No.",
    "It was neither good nor bad, though the second half dragged on for far longer than the thin story could carry it.",
    "Größe ≠ quality; 12 % of the plot made sense?!",
)


def text_probe(tokenizer: Any, config: Any, *, num_texts: int = 1) -> Batch:
    """The sentences, or pairs of them, as padded tokens (4, L)."""
    texts = [list(SENTENCES), list(reversed(SENTENCES))][:num_texts]
    limit = resolve_max_length(None, tokenizer, config)
    return dict(tokenizer(*texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"))


def noise_images(num_channels: int = 3, *, count: int = 2, side: int = 64) -> list[Any]:
    """Square images of seeded noise, RGB or grey: every pixel takes part."""
    from PIL import Image  # noqa: PLC0415

    random = np.random.default_rng(0)
    shape = (side, side, 3) if num_channels == 3 else (side, side)
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def noise_recordings(reader: RecordingReader) -> Batch:
    """Half a second, and a whole one, of seeded noise."""
    random = np.random.default_rng(0)
    return reader.features([random.normal(0, 0.1, n).astype(np.float32) for n in (reader.rate // 2, reader.rate)])


def any_processor(source: ModelSource, class_name: str) -> Any:
    """The processor of a model whose task is not known, by what its class says that it takes."""
    import transformers  # noqa: PLC0415

    taken = getattr(getattr(transformers, class_name, None), "main_input_name", "input_ids")
    if taken == "pixel_values":
        return ImageReader.load(source, class_name, None)
    return RecordingReader.load(source, 1.0) if taken in ("input_values", "input_features") else load_tokenizer(source)


def any_probe(processor: Any, config: Any) -> Batch:
    """A probe by the processor alone."""
    if isinstance(processor, ImageReader):
        return processor.pixels(noise_images(processor.num_channels), "probe")
    if isinstance(processor, RecordingReader):
        return noise_recordings(processor)
    return text_probe(processor, config)
