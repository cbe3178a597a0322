# SPDX-License-Identifier: Apache-2.0
"""Few rows, one of each class, and rows of a megabyte: trained, scored and counted like any others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune

LONG = "the film was good " * 60_000  # 1 MB


@pytest.mark.parametrize(
    ("texts", "labels", "rows", "cut"),
    [
        ([f"film {i}" for i in range(8)], list("abababab"), (6, 2), 0),
        ([f"film {i}" for i in range(4)], list("abcd"), (3, 1), 0),
        ([LONG, "bad", LONG + "x", "dull", LONG, "bad"], list("abbaab"), (4, 2), None),
    ],
    ids=["eight rows", "one row of each class", "rows of a megabyte"],
)
def test_classes(
    desk: Path, tiny_model_dir: Path, texts: list[str], labels: list[str], rows: tuple[int, int], cut: int | None
) -> None:
    table = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
    flags = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "rows.jsonl", "--max-length", 16]

    prepared = mirrortune("prepare", *flags, "--dry-run", "--json").data
    trained = mirrortune("train", *flags, "-o", "run", "--max-steps", 2, "--json").data
    scored = mirrortune("eval", "run", "--json").data

    assert tuple(prepared["rows"].values()) == rows
    counted = sum(prepared["truncated_rows"].values())
    assert counted == (sum(text.startswith(LONG) for text in texts) if cut is None else cut)
    assert scored["rows"] == rows[1]
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    classes = json.loads(Path("run/adapter/adapter.json").read_text(encoding="utf-8"))["task"]["labels"]
    assert classes == sorted(set(labels)), "those of the validation rows too"
