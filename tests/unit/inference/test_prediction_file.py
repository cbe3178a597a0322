# SPDX-License-Identifier: Apache-2.0
"""Tables of predictions: their formats and columns."""

from __future__ import annotations

import csv
import datetime
import io
import json
from decimal import Decimal

import pyarrow as pa
import pytest

from mirrortune.data.files.arrow import json_array
from mirrortune.inference.prediction_file import (
    TableWriter,
    append_columns,
    new_names,
    storable,
)

CELLS = [
    "plain",
    'a "quoted", cell',
    "two\nlines",
    "car\rriage",
    "both\r\nof them",
    "semi;colon\ttab",
    "",
    None,
    "\u2028 é 🙂",
]


def written(kind: str, table: pa.Table) -> str:
    found: list[bytes] = []
    writer = TableWriter(found.append, kind, table.column_names)
    for start in range(0, table.num_rows, 3):
        writer.write(table.slice(start, 3))
    return b"".join(found).decode()


@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_any_text_can_be_read_back_from_a_table(kind: str, delimiter: str) -> None:
    text = written(kind, pa.table({"text": CELLS, "n": list(range(len(CELLS)))}))
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    assert rows == [["text", "n"], *([cell or "", str(n)] for n, cell in enumerate(CELLS))]


def test_values_are_written_as_json_has_them() -> None:
    table = pa.table({
        "flag": [True], "number": [0.1], "nan": [float("nan")], "day": [datetime.date(2026, 11, 29)],
        "price": [Decimal("1.50")], "tags": [["a", "é"]], "none": pa.nulls(1), "big": [2**60],
    })  # fmt: skip
    table = table.append_column("more", json_array([{"k": [1, None]}]))
    assert json.loads(written("jsonl", table)) == {
        "flag": True, "number": 0.1, "nan": None, "day": "2026-11-29", "price": "1.50", "tags": ["a", "é"],
        "none": None, "big": 2**60, "more": {"k": [1, None]},
    }  # fmt: skip
    cells = written("csv", table).splitlines()[1]
    assert cells == 'true,0.1,nan,2026-11-29,1.50,"[""a"", ""é""]",,1152921504606846976,"{""k"": [1, null]}"'


def test_new_columns_beside_own_ones() -> None:
    assert new_names(["prediction", "score"], ["text", "prediction", "new_prediction"]) == {
        "prediction": "new_new_prediction", "score": "score",
    }  # fmt: skip
    table = append_columns(pa.table({"a": [1, 2]}), {"b": [None, "x"], "c": [[{"k": 1}], []], "d": [None, None]})
    assert table.to_pylist() == [
        {"a": 1, "b": None, "c": [{"k": 1}], "d": None},
        {"a": 2, "b": "x", "c": [], "d": None},
    ]
    schema = pa.schema([("a", pa.binary()), ("b", pa.struct([("bytes", pa.binary())])), ("c", pa.list_(pa.string()))])
    assert storable(schema, "csv") == ["c"]
    assert storable(schema, "parquet") == ["a", "b", "c"]
