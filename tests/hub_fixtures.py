# SPDX-License-Identifier: Apache-2.0
"""Repositories for `tests.hub_server.LoopbackHub`: a tiny RoBERTa and a small GLUE.

Why: tests must run from Hub id to result without huggingface.co, so these have the file layout and
metadata of the real `roberta-base` and `nyu-mll/glue` at a size which trains in seconds. Labels
follow rules which a tiny model can learn. Everything is deterministic.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

_NOUNS = ("film", "story", "actor", "scene", "plot", "song", "dog", "child", "farmer", "teacher")
_VERBS = ("is", "was", "looks", "seems", "remains")
_PLAIN = ("long", "short", "new", "old", "quiet", "loud")
_POSITIVE = ("wonderful", "brilliant", "lovely", "superb")
_NEGATIVE = ("terrible", "boring", "awful", "dreadful")

Row = tuple[tuple[str, ...], int | float]


@dataclass(frozen=True)
class _Task:
    """One configuration of GLUE.

    Attributes:
        columns: The names of the text columns.
        rule: Draws one row: its texts and its label.
        classes: The names of the labels; empty where the label is a number.
        variants: The suffixes of the validation and test splits.
    """

    columns: tuple[str, ...]
    rule: Callable[[random.Random], Row]
    classes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("",)


def client_env(endpoint: str, home: Path, *, offline: bool = False) -> dict[str, str]:
    """Returns the environment of a subprocess whose Hub is at `endpoint`.

    Args:
        endpoint: The address of the Hub.
        home: The folder of all Hugging Face caches.
        offline: Whether to set `HF_HUB_OFFLINE`.

    Returns:
        This process's environment, less its own Hugging Face settings and tokens, plus those.
    """
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return env | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "no_proxy": "127.0.0.1",
    }


def write_tiny_roberta(root: Path, model_id: str = "roberta-base") -> Path:
    """Writes a random two-layer RoBERTa with a tokenizer trained on the GLUE sentences.

    Args:
        root: The root folder of the Hub.
        model_id: The id of the model's repository.

    Returns:
        The repository's folder.
    """
    # Imported here because they are slow, and read the Hub's settings when imported.
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

    folder = root / "models" / model_id
    folder.mkdir(parents=True)
    rng = random.Random(0)
    sentences = [" ".join(texts) for task in _TASKS.values() for texts, _ in map(task.rule, [rng] * 200)]
    bpe = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(sentences, vocab_size=400, special_tokens=special_tokens)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizer.from_pretrained(folder, model_max_length=512)
    tokenizer.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def write_glue(root: Path, rows: Mapping[str, int] | None = None) -> Path:
    """Writes `nyu-mll/glue` with the configurations `mnli`, `sst2`, `stsb` and `ax`.

    Args:
        root: The root folder of the Hub.
        rows: The number of rows of the `train`, `validation` and `test` splits; 120, 40 and 20 if
            not given.

    Returns:
        The repository's folder.
    """
    rows = rows or {"train": 120, "validation": 40, "test": 20}
    folder = root / "datasets" / "nyu-mll" / "glue"
    infos: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    for name, task in (*_TASKS.items(), ("ax", _TASKS["mnli"])):
        rng = random.Random(name)
        splits = {"train": rows["train"]}
        splits |= {f"validation{variant}": rows["validation"] for variant in task.variants}
        splits |= {f"test{variant}": rows["test"] for variant in task.variants}
        if name == "ax":  # the diagnostic set has nothing to learn from
            splits = {"test": rows["test"]}
        tables = {split: _table(task, rng, split, count) for split, count in splits.items()}
        (folder / name).mkdir(parents=True)
        for split, table in tables.items():
            pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
        infos.append(_card_info(name, task, tables))
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
        configs.append({"config_name": name, "data_files": files})
    card = {"language": ["en"], "license": "other", "dataset_info": infos, "configs": configs}
    front_matter = yaml.safe_dump(card, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front_matter}---\n\n# GLUE\n", encoding="utf-8")
    return folder


def _table(task: _Task, rng: random.Random, split: str, count: int) -> pa.Table:
    """Draws the rows of one split, with the features in the schema as `datasets` writes them."""
    rows = [task.rule(rng) for _ in range(count)]
    labels = [-1 if split.startswith("test") else label for _, label in rows]
    arrays = [
        *(pa.array([texts[i] for texts, _ in rows]) for i in range(len(task.columns))),
        pa.array(labels, pa.int64() if task.classes else pa.float32()),
        pa.array(range(count), pa.int32()),
    ]
    features: dict[str, Any] = {column: {"dtype": "string", "_type": "Value"} for column in task.columns}
    features["label"] = (
        {"names": task.classes, "_type": "ClassLabel"} if task.classes else {"dtype": "float32", "_type": "Value"}
    )
    features["idx"] = {"dtype": "int32", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(arrays, names=list(features)).replace_schema_metadata(metadata)


def _card_info(name: str, task: _Task, tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Returns the `dataset_info` entry of one configuration."""
    names = {str(i): label for i, label in enumerate(task.classes)}
    label = {"class_label": {"names": names}} if task.classes else "float32"
    dtypes = dict.fromkeys(task.columns, "string") | {"label": label, "idx": "int32"}
    return {
        "config_name": name,
        "features": [{"name": column, "dtype": dtype} for column, dtype in dtypes.items()],
        "splits": [
            {"name": split, "num_bytes": table.nbytes, "num_examples": table.num_rows}
            for split, table in tables.items()
        ],
        "dataset_size": sum(table.nbytes for table in tables.values()),
    }


def _sentence(rng: random.Random) -> list[str]:
    """Draws a sentence of five words without a sentiment."""
    return ["the", rng.choice(_NOUNS), rng.choice(_VERBS), "very", rng.choice(_PLAIN)]


def _sst2(rng: random.Random) -> Row:
    """Draws a review which is positive (1) exactly if its last word is."""
    label = rng.randrange(2)
    word = rng.choice(_POSITIVE if label else _NEGATIVE)
    return (" ".join([*_sentence(rng), "and", word]),), label


def _stsb(rng: random.Random) -> Row:
    """Draws a pair whose score is 5 for a copy, and 2.5 less for each word made vague."""
    first = _sentence(rng)
    second = list(first)
    vague = [position for position in (1, 4) if rng.random() < 0.5]
    for position in vague:
        second[position] = "something"
    return (" ".join(first), " ".join(second)), 5.0 - 2.5 * len(vague)


def _mnli(rng: random.Random) -> Row:
    """Draws a premise and its copy (0), its copy about someone unknown (1) or its negation (2)."""
    label = rng.randrange(3)
    premise = _sentence(rng)
    hypothesis = list(premise)
    if label == 1:
        hypothesis[1] = "somebody"
    elif label == 2:
        hypothesis.insert(3, "not")
    return (" ".join(premise), " ".join(hypothesis)), label


_TASKS: dict[str, _Task] = {
    "mnli": _Task(
        ("premise", "hypothesis"),
        _mnli,
        ("entailment", "neutral", "contradiction"),
        ("_matched", "_mismatched"),
    ),
    "sst2": _Task(("sentence",), _sst2, ("negative", "positive")),
    "stsb": _Task(("sentence1", "sentence2"), _stsb),
}
