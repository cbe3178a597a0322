# SPDX-License-Identifier: Apache-2.0
"""Probes: inputs on which the outputs of a merged model are compared with those of base + adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mirrortune.data.examples import Batch
from mirrortune.data.files.audio import AudioReader
from mirrortune.data.tokenize import resolve_max_length
from mirrortune.models.load import (
    ModelSource,
    NoProcessorError,
    empty_model,
    load_feature_extractor,
    load_image_processor,
    load_tokenizer,
    model_class,
)
from mirrortune.tasks.drawn_inputs import drawn_inputs, input_names

# Short, long, and with unusual characters, so that padding and unknown tokens occur.
SENTENCES = (
    "A gripping, beautifully acted film.",
    "No.",
    "It was neither good nor bad, though the second half dragged on for far longer than the thin story could carry it.",
    "Größe ≠ quality; 12 % of the plot made sense?!",
)


def text_probe(tokenizer: Any, config: Any, *, num_texts: int = 1) -> Batch:
    """Tokenise :data:`SENTENCES`, or pairs of them, with padding, (4, L)."""
    texts = [list(SENTENCES), list(reversed(SENTENCES))][:num_texts]
    limit = resolve_max_length(None, tokenizer, config)
    return dict(tokenizer(*texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"))


def noise_images(num_channels: int) -> list[Any]:
    """Return two square images of seeded noise, RGB or grayscale."""
    from PIL import Image  # noqa: PLC0415

    random = np.random.default_rng(0)
    shape = (64, 64, 3) if num_channels == 3 else (64, 64)
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(2)]


def noise_audio(reader: AudioReader) -> Batch:
    """Return model inputs made from 0.5 s and 1 s of seeded noise."""
    random = np.random.default_rng(0)
    return reader.features([random.normal(0, 0.1, n).astype(np.float32) for n in (reader.rate // 2, reader.rate)])


def probes(task: Any, processors: Sequence[Any], source: ModelSource, auto_class: str) -> Batch | Iterator[Batch]:
    """Return the task's probe, or, without a task or processor, candidates drawn from the model's configuration."""
    if task is not None and processors:
        found: Batch = task.probe(processors[0], source.config)
        return found
    found_class = _class_of(source, auto_class)
    return iter(()) if found_class is None else drawn_inputs(found_class, source.config)


def _class_of(source: ModelSource, auto_class: str) -> Any:
    """Return the class of a model; None if neither transformers nor trusted remote code has one."""
    found = model_class(auto_class, source.config)
    return type(empty_model(source, auto_class, {})) if found is None and source.trust_remote_code else found


def find_processors(task: Any, source: ModelSource, auto_class: str) -> tuple[list[Any], list[str]]:
    """Load the processors of a model that are stored with its weights.

    Args:
        task: task of the adapter; None for an adapter that was saved without a task.
        source: source of the base model.
        auto_class: name of an Auto class or of a model class.

    Returns:
        The processors found, and the names of the missing ones. With a task, this is its processor; without one, those
        of tokenizer, image processor and feature extractor that the model's inputs need.
    """
    if task is not None:
        try:
            return [task.load_processor(source)], []
        except NoProcessorError as error:
            return [], [error.problem.removeprefix("it has no ").removesuffix(" files")]
    found_class = _class_of(source, auto_class)
    taken = {"input_ids"} if found_class is None else input_names(found_class)
    # An audio model may also generate text, which its inputs do not show.
    kinds: tuple[tuple[str, Callable[[ModelSource], Any], set[str], set[str]], ...] = (
        ("tokenizer", load_tokenizer, {"input_ids", "decoder_input_ids"}, {"input_values", "input_features"}),
        ("image processor", load_image_processor, {"pixel_values", "pixel_values_videos"}, set()),
        ("feature extractor", load_feature_extractor, {"input_values", "input_features"}, set()),
    )
    found, missing = [], []
    for name, load, inputs, possible in kinds:
        if not taken & (inputs | possible):
            continue
        try:
            found.append(load(source))
        except NoProcessorError:
            missing += [name] if taken & inputs else []
    return found, missing
