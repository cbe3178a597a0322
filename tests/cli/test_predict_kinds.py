# SPDX-License-Identifier: Apache-2.0
"""predict, for every kind of task: the answers of a trained run in several formats are those that eval writes."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from tests.cli.console import mirrortune
from tests.cli.test_predict import fail_at
from tests.tiny_models import WORDS, write_tiny_audio, write_tiny_causal, write_tiny_seq2seq, write_tiny_vision

Rows = list[dict[str, Any]]
_DRAW = random.Random(0)
TEXTS = [" ".join(_DRAW.choice(WORDS) for _ in range(_DRAW.randrange(3, 7))) for _ in range(16)]


@dataclass(frozen=True)
class Case:
    """Rows of a kind of task, the column of what it learns, and what training needs besides."""

    kind: str
    rows: Rows
    target: str
    words: tuple[object, ...] = ()
    formats: tuple[str, ...] = ("csv", "jsonl", "parquet")
    predicting: tuple[object, ...] = field(default=())


def _rows(**columns: list[Any]) -> Rows:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


CASES = {
    "text-classification": Case(
        "text-classification", _rows(text=TEXTS, label=["bad", "good", "fair", "good"] * 4), "label",
    ),
    "several labels": Case(
        "text-classification", _rows(text=TEXTS, label=[["a"], ["a", "b"], ["c"], ["b"]] * 4), "label",
    ),
    "regression": Case("regression", _rows(text=TEXTS, score=[0.5, 1.5, 2.5, 4.0] * 4), "score",
                       ("--label-column", "score")),
    "token-classification": Case(
        "token-classification",
        _rows(tokens=[t.split() for t in TEXTS], tags=[["B-X", *["O"] * (len(t.split()) - 1)] for t in TEXTS]), "tags",
        formats=("jsonl", "parquet"),
    ),
    "question-answering": Case(
        "question-answering",
        _rows(question=["was it ?"] * 16, context=TEXTS,
              answers=[t.split()[1] if i % 3 else "" for i, t in enumerate(TEXTS)]), "answers",
    ),
    "multiple-choice": Case(
        "multiple-choice",
        _rows(sent1=TEXTS, sent2=["it was"] * 16, ending0=["good"] * 16, ending1=["dull"] * 16, ending2=["so fun"] * 16,
              label=[0, 1, 2, 1] * 4), "label",
    ),
    "seq2seq": Case("seq2seq", _rows(document=TEXTS, summary=[t.split()[0] for t in TEXTS]), "summary",
                    ("data.max_target_length=6", "task.metrics=[rouge1]")),
    "causal-lm": Case("causal-lm", _rows(prompt=TEXTS, completion=[t.split()[0] for t in TEXTS]), "completion",
                      predicting=("--max-new-tokens", 5)),
}  # fmt: skip


def write(path: Path, rows: Rows) -> Path:
    """Rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def train(model: Path, kind: str, data: Path, *words: object) -> None:
    """A run of one epoch."""
    flags = ["-m", model, "-t", kind, "-d", data, "-o", "run", "--epochs", 1, "--batch-size", 8, "-q"]
    trained = mirrortune("train", *flags, *words)
    assert trained.exit_code == 0, trained.stderr


def told(*words: object) -> Rows:
    """The rows that predict writes to standard output."""
    outcome = mirrortune("predict", "run", "--format", "jsonl", "-q", *words)
    assert outcome.exit_code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def evaluated(data: Path) -> list[str]:
    """The answers that eval writes."""
    written = mirrortune("eval", "run", "-d", data, "--predictions", "eval.tsv", "-q", "eval.prediction_labels=names")
    assert written.exit_code == 0, written.stderr
    return [line.partition("\t")[2] for line in Path("eval.tsv").read_text(encoding="utf-8").splitlines()[1:]]


def as_written(name: str, row: dict[str, Any]) -> str:
    """An answer as eval writes it."""
    if name == "several labels":
        return ",".join(row["prediction"])
    if name == "regression":
        return f"{row['prediction']:.3f}"
    if name == "token-classification":
        return " ".join(row["tags"])
    text = "".join(letter if letter.isprintable() else " " for letter in str(row["prediction"]))
    return " ".join(text.split())


_QUICK = ("several labels", "token-classification")  # the law of tests/unit/tasks/test_predicting.py holds for all


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in CASES])
def test_answers_are_those_of_eval_in_every_format(name: str, desk: Path, tiny_model_dir: Path) -> None:
    case = CASES[name]
    model = {"seq2seq": write_tiny_seq2seq, "causal-lm": lambda at: write_tiny_causal(at, template=None)}.get(name)
    path = tiny_model_dir if model is None else model(desk / "model")
    learned = write(desk / "train.jsonl", case.rows)
    train(path, case.kind, learned, *case.words)
    rows = case.rows[::-1]
    unlabelled = [{key: value for key, value in row.items() if key != case.target} for row in rows]
    found = [told("-d", write(desk / f"rows.{kind}", unlabelled), *case.predicting) for kind in case.formats]
    labelled = told("-d", write(desk / "labelled.jsonl", rows), *case.predicting)
    for own in found:
        assert [{key: row[key] for key in found[0][0]} for row in own] == found[0]
        assert [row["prediction"] for row in own] == [row["prediction"] for row in labelled]
    inputs = [{key: row[key] for key in unlabelled[0]} for row in found[-1]]
    assert inputs == unlabelled, "the rows' own cells"
    if name != "causal-lm":  # eval scores its tokens
        assert [as_written(name, row) for row in found[-1]] == evaluated(desk / "labelled.jsonl")


def _photos(folder: Path) -> None:
    random_ = np.random.default_rng(0)
    for label, least in (("dark", 0), ("light", 160)):
        (folder / label).mkdir(parents=True)
        for number in range(8):
            pixels = random_.integers(least, least + 90, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def _sounds(folder: Path) -> None:
    random_ = np.random.default_rng(0)
    for label, every in (("loud", 1), ("soft", 2)):
        (folder / label).mkdir(parents=True)
        for number in range(8):
            wave = random_.normal(0, 0.1, 1600) * (np.arange(1600) % 3 < every)
            soundfile.write(folder / label / f"{number}.wav", wave, 16000)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_files_are_answered_as_by_eval_with_their_folders_and_without(
    kind: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, model, words = {
        "image": (_photos, write_tiny_vision, ()), "audio": (_sounds, write_tiny_audio, ("data.max_seconds=0.2",)),
    }[kind]  # fmt: skip
    make(desk / "files")
    train(model(desk / "model"), f"{kind}-classification", desk / "files", *words)
    found = told("-d", "files", "--top", 2)
    shutil.copytree("files", "others")  # of the run's own folder, eval answers the validation rows
    assert [row["prediction"] for row in found] == evaluated(desk / "others")
    assert all(row["score"] + row["score_2"] == pytest.approx(1, abs=1e-5) for row in found)
    loose = told("-d", sorted((desk / "files").iterdir())[0], "--top", 2)
    assert [row["prediction"] for row in loose] == [row["prediction"] for row in found[:8]]

    files = sorted(path for path in Path("files").rglob("*") if path.is_file())
    write(desk / "rows.jsonl", [{kind: str(file)} for file in (*files, *files * 4)])  # two blocks
    words = ("predict", "run", "-d", "rows.jsonl", "-o", "answers.csv")
    with monkeypatch.context() as broken:
        fail_at(2, broken, KeyboardInterrupt())
        assert mirrortune(*words).exit_code == 130
    content = files[0].read_bytes()
    files[0].write_bytes(content + b"\0")
    changed = mirrortune(*words, "--resume")
    assert (changed.exit_code, "files of rows: train has changed" in changed.said) == (2, True), changed.said
    files[0].write_bytes(content)
    assert mirrortune(*words, "--resume").exit_code == 0
