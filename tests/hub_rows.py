# SPDX-License-Identifier: Apache-2.0
"""Made-up rows with the columns, class names and splits of the recipes' data sets, as `hub_data.yaml` has them."""

from __future__ import annotations

import io
import json
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from mirrortune.data.dataset import DataSet, Split

_WORDS = ["the", "film", "was", "good", "and", "the", "plot", "is", "dull"]


@cache
def described() -> dict[str, dict[str, Any]]:
    """Repository -> configuration -> columns and splits."""
    found = yaml.safe_load((Path(__file__).parent / "hub_data.yaml").read_text(encoding="utf-8"))
    return dict(found)


def data_set(repository: str, config: str | None, rows: int = 24) -> DataSet:
    """A data set of ``rows`` rows a split; test labels are as hidden as GLUE's."""
    configs = described()[repository]
    assert config is not None or len(configs) == 1, f"{repository} has several configurations, the recipe names none"
    spec = configs[config or next(iter(configs))]
    splits = {}
    for name in spec["splits"]:
        hidden = repository in ("nyu-mll/glue", "aps/super_glue") and name.startswith("test")
        splits[name] = Split(table=table(spec["columns"], rows, hidden=hidden), source=f"{repository} {name}")
    return DataSet(splits=splits, origin={"repository": repository, "config": config, "commit": None})


def table(columns: dict[str, Any], rows: int, *, hidden: bool = False) -> pa.Table:
    """Rows with these columns, the class names in the schema as the datasets library stores them."""
    made = {name: column(name, kind, rows, hidden=hidden) for name, kind in columns.items()}
    features = {name: feature for name, (_, feature) in made.items() if feature is not None}
    flat = {}
    for name, (values, _) in made.items():
        if isinstance(values, dict):  # a struct of texts, which our reader would have made columns of
            flat |= {f"{name}.{part}": pa.array(texts) for part, texts in values.items()}
        else:
            flat[name] = values if isinstance(values, pa.Array) else pa.array(values)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(flat).replace_schema_metadata(metadata)


def column(name: str, kind: Any, rows: int, *, hidden: bool) -> tuple[Any, dict[str, Any] | None]:
    """Values of a column, and its feature if it holds classes."""
    if isinstance(kind, dict) and "struct" in kind:
        return {part: texts(f"{name} {part}", rows) for part in kind["struct"]}, None
    if isinstance(kind, dict):
        names = kind["list"] if isinstance(kind["list"], list) else [f"class {i}" for i in range(kind["list"])]
        return [[i % len(names) for i in range(len(_WORDS))]] * rows, {
            "feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}  # fmt: skip
    if isinstance(kind, list | int):
        names = kind if isinstance(kind, list) else [f"class {i}" for i in range(kind)]
        values = [-1] * rows if hidden else [i % len(names) for i in range(rows)]
        return pa.array(values, pa.int64()), {"names": names, "_type": "ClassLabel"}
    makers: dict[str, Any] = {
        "text": lambda: [f"{name} {i % 4}" for i in range(rows)] if name.startswith("label") else texts(name, rows),
        "int": lambda: [i % 4 for i in range(rows)],
        "float": lambda: pa.array([-1.0 if hidden else i % 11 / 2 for i in range(rows)], pa.float32()),
        "image": lambda: [{"bytes": image(i), "path": None} for i in range(rows)],
        "audio": lambda: [{"bytes": recording(i), "path": None} for i in range(rows)],
        "answers": lambda: [{"text": ["film"], "answer_start": [4]}] * rows,
        "messages": lambda: (
            [[{"content": "the plot", "role": "user"}, {"content": "dull", "role": "assistant"}]] * rows
        ),
        "option": lambda: [f"the correct answer is answer{i % 4 + 1}" for i in range(rows)],
        "texts": lambda: [_WORDS] * rows,
    }
    return makers[kind](), None


def texts(name: str, rows: int) -> list[str]:
    """Sentences; contexts hold the answer that questions want."""
    return [" ".join([*_WORDS, *name.split(), str(i)]) for i in range(rows)]


def image(seed: int) -> bytes:
    """A small PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def recording(seed: int) -> bytes:
    """A tenth of a second as WAV."""
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.random.default_rng(seed).integers(-999, 999, 1600, np.int16).tobytes())
    return written.getvalue()
