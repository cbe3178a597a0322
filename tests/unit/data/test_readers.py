# SPDX-License-Identifier: Apache-2.0
"""Tables from files: what is read, the line of what cannot be, and no exception but DataError for any bytes."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirrortune.data.columns import choose_columns
from mirrortune.data.dataset import Split
from mirrortune.data.files.arrow import refuse_unreadable
from mirrortune.data.files.readers import READERS, read_rows, read_table
from mirrortune.errors import DataError
from mirrortune.tasks.base import task_class

ROWS = {"text": ["good film", "bad, sad"], "label": ["a", "b"]}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\ngood film,a\n"bad, sad",b\n'),
        ("a.csv", 'text,label\r\ngood film,a\r\n"bad, sad",b\r\n'),
        ("a.csv", 'text,label\rgood film,a\r"bad, sad",b'),
        ("a.csv", '\ufefftext , label\ngood film,a\n\n"bad, sad",b\n\n'),
        ("a.csv", "text;label\ngood film;a\nbad, sad;b\n"),
        ("a.csv", "text\tlabel\ngood film\ta\nbad, sad\tb\n"),
        ("a.TSV", "text\tlabel\ngood film\ta\nbad, sad\tb\n"),
        ("a.csv", "sep=;\ntext;label\ngood film;a\nbad, sad;b\n"),
        ("a.csv", '"sep=|"\r\n\r\ntext|label\r\ngood film|a\r\nbad, sad|b\r\n'),
        ("a.csv", "sep=\t\ntext\tlabel\ngood film\ta\nbad, sad\tb\n"),
        ("a.csv", "text;label;;\ngood film;a;;\nbad, sad;b\n;;;\n;;;\n".replace("sad;b\n", "sad;b;;\n")),
        ("a.csv", 'text,label\ngood film,a,,\n"bad, sad",b,\n'),
        ("a.jsonl", '{"text": "good film", "label": "a"}\n\n{"label": "b", "text": "bad, sad"}'),
        ("a.json", '[{"text": "good film", "label": "a"},\n {"text": "bad, sad", "label": "b"}]'),
        ("a.json", '{"text": "good film", "label": "a"}\n{"text": "bad, sad", "label": "b"}\n'),
    ],
)
def test_all_text_formats_give_the_same_table(tmp_path: Path, name: str, content: str) -> None:
    assert read_table(write(tmp_path, name, content)).to_pydict() == ROWS


def test_parquet_keeps_its_types_and_metadata(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "label": pa.array([1], pa.int8())}).replace_schema_metadata({"k": "v"})
    pq.write_table(table, tmp_path / "a.parquet")

    found = read_table(tmp_path / "a.parquet")

    assert found.equals(table)
    assert (found.schema.metadata or {}).get(b"k") == b"v"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_categories_of_pandas_are_plain_columns(tmp_path: Path, suffix: str) -> None:
    plain = pa.table({"text": ["a", "b", "a"], "n": [1, 2, 1]})
    table = pa.table({name: plain.column(name).dictionary_encode() for name in plain.column_names})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    assert read_table(tmp_path / f"a.{suffix}").equals(plain)


@pytest.mark.parametrize(
    "frame",
    [
        {"text": {"0": "a", "7": "b"}, "label": {"0": 1, "7": 0}},  # as to_json writes by default
        {"0": {"text": "a", "label": 1}, "7": {"text": "b", "label": 0}},
        {"columns": ["text", "label"], "index": [0, 7], "data": [["a", 1], ["b", 0]]},
    ],
)
def test_an_object_that_holds_all_rows_is_no_row(tmp_path: Path, frame: dict[str, object]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(frame), encoding="utf-8")

    with pytest.raises(DataError, match=r"one object for all rows.*orient='records', lines=True"):
        read_table(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a", "b", None], "label": [1, 0, 1]},
        {"text": ["a", "b"]},
        {"tokens": [["a", "b"], ["c"]], "ner_tags": [["O", "O"], ["O"]]},
    ],
)
def test_an_object_of_columns_is_a_table(tmp_path: Path, columns: dict[str, list[object]], indent: int | None) -> None:
    path = write(tmp_path, "a.json", json.dumps(columns, indent=indent) + "\n")
    table, places = read_rows(path)
    assert table.to_pydict() == columns
    assert places.where(1) == f"{path} row 2"


@pytest.mark.parametrize("indent", [None, 1])
def test_columns_of_different_lengths_are_counted(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path, "a.json", json.dumps({"text": ["a", "b", "c"], "label": [1, 0]}, indent=indent))
    with pytest.raises(DataError, match=r"columns that have different numbers of cells: 'text' 3, 'label' 2\."):
        read_table(path)


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["a", "b"], "ner_tags": ["O", "O"]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a", "labels": ["x", "y"]},
    ],
)
def test_an_object_of_lists_may_be_a_row(tmp_path: Path, row: dict[str, object]) -> None:
    assert read_table(write(tmp_path, "a.json", json.dumps(row))).num_rows == 1
    assert read_table(write(tmp_path, "a.jsonl", json.dumps({"text": ["a", "b"]}))).num_rows == 1


def test_cells_stay_text_and_empty_ones_are_null(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "text,label\n2024-01-01,1\nNA,\n007,1.0\n"))

    assert table.to_pydict() == {"text": ["2024-01-01", "NA", "007"], "label": ["1", None, "1.0"]}


@pytest.mark.parametrize("cell", ["a\nb", "if x:\n\ty", "a\tb", "a\tb\n\n", "a\n"])
def test_a_quoted_cell_may_have_tabs_and_lines(tmp_path: Path, cell: str) -> None:
    table = read_table(write(tmp_path, "a.tsv", f'text\tlabel\n"{cell}"\tx\n'))
    assert table.to_pydict() == {"text": [cell], "label": ["x"]}
    table = read_table(write(tmp_path, "b.tsv", f'label\ttext\nx\t"{cell}"\n'))
    assert table.to_pydict() == {"label": ["x"], "text": [cell]}


def test_a_quoted_cell_may_hold_a_table_and_quotation_marks(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.tsv", 'label\ttext\nx\t"So ""called"" sweets:\nsugar\t5 g\nmilk\t1 l"\n'))
    assert table.to_pydict() == {"label": ["x"], "text": ['So "called" sweets:\nsugar\t5 g\nmilk\t1 l']}


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x00", '""', "\\", "é", "😀"])
def test_a_cell_may_hold_any_character(tmp_path: Path, inside: str) -> None:
    """Some of these end a line for str.splitlines, and all of them occur in scraped text."""
    cell = f"one{inside}two".replace('""', '"')
    for name, content in {
        "a.csv": f'text,label\n{json.dumps(cell)[0]}one{inside}two",a\nx,b\n',
        "b.csv": f"text,label\none{inside.replace(chr(34), '-')}two,a\nx,b\n",
    }.items():
        table = read_table(write(tmp_path, name, content))
        assert table.num_rows == 2
        assert table.column("text")[0].as_py() == (cell if name == "a.csv" else cell.replace('"', "--"))
    lines = json.dumps({"text": cell}, ensure_ascii=False)
    assert read_table(write(tmp_path, "a.jsonl", lines)).to_pydict() == {"text": [cell]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "train"])
def test_rows_inside_of_one_object_are_refused_with_a_command(tmp_path: Path, key: str, indent: int | None) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    path = write(tmp_path, "a.json", json.dumps({"version": "v2.0", key: rows}, indent=indent))  # as SQuAD's
    with pytest.raises(DataError, match=rf"rows in '{key}'.*: jq -c '\.{key}\[\]' a\.json > rows\."):
        read_table(path)


def test_a_single_line_with_a_list_beside_a_text_is_a_row(tmp_path: Path) -> None:
    row = {"text": "a", "items": [{"name": "b"}]}
    assert read_table(write(tmp_path, "a.jsonl", json.dumps(row))).num_rows == 1
    with pytest.raises(DataError, match="one object with all rows in 'items'"):
        read_table(write(tmp_path, "b.jsonl", json.dumps({"items": row["items"]})))


def test_splits_inside_of_one_object_become_files(tmp_path: Path) -> None:
    content = json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]})
    (path := tmp_path / "a.json.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(DataError, match=r"mkdir rows; gzip -dc a.json.gz . jq -c '.train..' > rows/train.jsonl; gzip"):
        read_table(path)


@pytest.mark.parametrize(
    "rows",
    [[{"messages": [{"role": "user", "content": "a"}]}], [{"data": ["a", "b"], "text": "c"}],
     [{"data": [{"a": 1}], "text": "b"}, {"data": [{"a": 2}], "text": "c"}]],
)  # fmt: skip
def test_an_object_that_is_a_row_is_one(tmp_path: Path, rows: list[Any]) -> None:
    path = write(tmp_path, "a.json", "\n".join(map(json.dumps, rows)))
    assert read_table(path).num_rows == len(rows)


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\ncafé,a\n".encode("latin-1"))

    assert read_table(path, "latin-1").column("text").to_pylist() == ["café"]
    with pytest.raises(
        DataError,
        match=r"a\.csv:2: byte 0xe9 at offset 14 is not utf-8.*should read 'café,a', set data\.encoding=cp1252",
    ):
        read_table(path)


def test_a_long_document_is_one_cell(tmp_path: Path) -> None:
    document = "word " * 100_000

    table = read_table(write(tmp_path, "a.csv", f'text,label\n"{document}",a\n'))

    assert table.column("text")[0].as_py() == document


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", "a.csv: the file is empty. Give it a header and rows"),
        ("a.csv", "text,label\n", "a.csv: the file has no rows"),
        ("a.csv", "text,label\na,b\nc\n", "a.csv:3: 1 cell in a row of a table with 2 columns. Quote cells"),
        ("a.csv", 'text,label\n"a\nb",c\nd,e,f\n', "a.csv:4: 3 cells"),
        (
            "a.csv",
            'text,label\na,b\n"c,d\ne,f\ng,h\n',
            "a.csv:3: malformed row (unexpected end of data)",
        ),
        ("a.csv", 'text,label\n"a"b,c\n', "a.csv:2: malformed row"),
        (
            "a.tsv",
            'text\tlabel\n"a\tb\nc\td\ne"\tf\n',
            "a.tsv:2: the quotation mark at the start of cell 1 is closed 2",
        ),
        ("a.tsv", 'id\tlabel\ttext\n1\ta\t"b c\n2\ta\td"\n', "a.tsv:2: the quotation mark at the start of cell 3"),
        ("a.csv", b"text,label\na,b\n\xff,c\n", "a.csv:3: byte 0xff at offset 15 is not utf-8"),
        ("a.csv", gzip.compress(b"text,label\na,b\n"), "a.csv: its content is not text but gzip. Add .gz to its name"),
        (
            "a.csv.gz",
            gzip.compress(b"PK\x03\x04\x14"),
            "a.csv.gz: its content is not text but a zip archive or an Excel",
        ),
        ("a.jsonl", b"PAR1\x15\x04", "a.jsonl: its content is not text but parquet. Name it .parquet"),
        ("a.csv", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', "a.csv: its lines are JSON objects, not"),
        ("a.jsonl", "text,label\na,b\n", "Allowed: one JSON object a line. If it is a table of cells, name it .csv"),
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.json", '[{"a": 1},\n{"a": }]', "a.json:2: not valid JSON (Expecting value)"),
        ("a.json", '{\n"a": 1}', "a.json:1: not valid JSON"),
        ("a.json", "[1]", "a.json row 1: got int. Allowed: JSON objects"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON (maximum recursion"),
        ("a.json", "[" + "1" * 5000 + "]", "a.json: not valid JSON (Exceeds the limit"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1\n', "a.jsonl:3: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: got list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "a.jsonl:1: not valid JSON"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a whole parquet file"),
        (
            "a.docx",
            "text",
            "a.docx: unknown file type '.docx'. Allowed: .csv, .tsv, .json, .jsonl, .parquet, .arrow, .txt",
        ),
        ("a", "text", "a: unknown file type ''"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = write(tmp_path, name, content)

    with pytest.raises(DataError) as caught:
        read_table(path)

    assert str(caught.value).startswith(str(tmp_path))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,a,a\nx,y,z\n", "a.csv:1: column name 'a' appears twice in the header. Rename one"),
        (
            "a.jsonl",
            '{"text": "x", "a": 1}\n\n{"text": "x", "a": "x"}\n',
            "a.jsonl:3: column 'a' mixes types (text here, a number in rows before)",
        ),
        ("a.jsonl", '{"text": "x", "a": "\\ud800"}\n', "a.jsonl:1: column 'a' holds half a character"),
        (
            "a.json",
            '[{"text": "x"}, {"a": 1' + "0" * 30 + "}]",
            "a.json row 2: column 'a' holds a whole number of more",
        ),
    ],
)
def test_a_column_that_cannot_be_read_is_refused_where_it_is_used(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    table = read_table(write(tmp_path, name, content))

    refuse_unreadable(table, ["text"])
    with pytest.raises(DataError) as caught:
        refuse_unreadable(table, ["a"])
    with pytest.raises(DataError, match=r"column (name )?'a'"):
        choose_columns(table, ["text"], "a", name)

    assert str(caught.value).startswith(f"{tmp_path}/{says}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_an_array_is_read_whatever_its_bytes(tmp_path: Path, encoding: str, is_packed: bool) -> None:
    text = '\r\n [\r\n {"text": "café", "n": NaN},{"text": null, "n": 1e999}\n]\n'
    data = text.encode(encoding)
    path = write(tmp_path, "a.json.gz" if is_packed else "a.json", gzip.compress(data) if is_packed else data)

    rows = read_table(path, encoding.removesuffix("-sig")).to_pylist()

    assert [row["text"] for row in rows] == ["café", None]
    assert str([row["n"] for row in rows]) == "[nan, inf]"


def test_a_missing_file_lists_what_is_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", "a\n")

    with pytest.raises(DataError, match=r"row\.csv: no such file. Allowed: files beside it: rows\.csv"):
        read_table(tmp_path / "row.csv")
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "nowhere" / "rows.csv")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\na,b\n".encode("utf-16"), "set data.encoding=utf-16."),
        ("text,label\na,b\n".encode("utf-16-le"), "set data.encoding=utf-16-le."),
        ("text,label\na,b\n".encode("utf-16-be"), "set data.encoding=utf-16-be."),
        ("text,label\na,b\n".encode("utf-32"), "set data.encoding=utf-32."),
        (b"text,label\na \x93great\x94 film,b\n", "should read 'a “great” film,b', set data.encoding=cp1252"),
        (b"text,label\na \x81 film,b\n", "name its own encoding with data.encoding, such as cp1251"),
        ("text,label\né,é\né,é\n".encode() + b"caf\xe9,b\n", "Most of the file is UTF-8: correct this line"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_advice_on_an_encoding_never_corrupts(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_table(write(tmp_path, name, content))

    assert says in str(caught.value)
    assert "latin-1" not in str(caught.value)


def test_latin_1_does_not_turn_quotation_marks_into_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"text,label\na \x93great\x94 film,b\n")

    says = r"a\.csv:2: byte 0x93 is a control character in latin-1\. Set data\.encoding=cp1252"
    with pytest.raises(DataError, match=says):
        read_table(path, "latin-1")
    with pytest.raises(DataError, match=r"a\.json:2: byte 0x85 is a control character"):
        read_table(write(tmp_path, "a.json", b'[\n{"text": "so \x85"}]'), "iso-8859-1")
    assert read_table(path, "cp1252").column("text").to_pylist() == ["a “great” film"]


def test_columns_without_a_name_are_called_by_their_place(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", ",text,label\n0,x,a\n1,y,b\n"))

    assert table.column_names == ["column 1", "text", "label"]
    assert choose_columns(table, None, None, "a.csv")[:2] == (("text",), "label")


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.encoding: unknown encoding 'utf-99'"):
        read_table(write(tmp_path, "a.csv", "a\nb\n"), "utf-99")


def must_name(error: DataError, path: Path) -> None:
    """An error says first where it is."""
    assert error.where.startswith(str(path)), str(error)
    assert error.problem


def assert_usable_or_refused(path: Path) -> None:
    """Everything that happens to a file's rows before a model is needed, for both kinds of task: it ends with a table
    and tasks that hold for every row, or with an error of ours that begins with the file.
    """
    try:
        table = read_table(path)
        text, label, _ = choose_columns(table, None, None, str(path))
    except DataError as error:
        must_name(error, path)
        return
    assert table.num_rows > 0
    assert {*text, label} <= set(table.column_names)
    for kind in ("text-classification", "regression"):
        try:
            task, _ = task_class(kind).from_rows(table, str(path), text_columns=text, label_column=label)
            groups = task.strata(Split(table=table, source=str(path)))
        except DataError as error:
            must_name(error, path)
        else:
            assert groups is None or len(groups) == table.num_rows


NUMBERS = ["0", "1", "1.5", "", "nan", "x", "-1", "1_0", "1e39", "inf", "٣"]
CSV_BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(alphabet=[*'abc1.,;\t|"\n\r -', "\x00", "\u2028"], max_size=80).map(lambda t: f"text,label\n{t}".encode()),
    st.lists(
        st.tuples(st.text(max_size=8), st.sampled_from(["0", "1", "1.5", "", "nan", "x", "-1", "1_0", "1e39", "٣"]))
    )
    .map(lambda rows: "text,label\n" + "".join(f'"{t.replace(chr(34), "")}",{n}\n' for t, n in rows))
    .map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@settings(max_examples=400)
@given(CSV_BYTES)
@example(b"\xef\xbb\xbf\n")
@example(b'"')
@example(b"text,label\n\x00,\x00\n")
@example(b"\n\ntext,label\na,1\nb,2\n")
@example(b",\na,1\nb,2\n")
def test_no_bytes_of_a_csv_raise_anything_but_a_data_error(tmp_path: Path, content: bytes) -> None:
    assert_usable_or_refused(write(tmp_path, "fuzz.csv", content))


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.lists(JSON | st.fixed_dictionaries({"text": JSON, "label": JSON}), max_size=4),
    st.sampled_from([".json", ".jsonl"]),
)
def test_no_json_raises_anything_but_a_data_error(tmp_path: Path, rows: list[Any], suffix: str) -> None:
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    assert_usable_or_refused(write(tmp_path, f"fuzz{suffix}", text))


@settings(max_examples=150)
@given(st.data())
def test_no_damage_to_a_parquet_file_raises_anything_but_a_data_error(tmp_path: Path, data: st.DataObject) -> None:
    pq.write_table(pa.table({"text": ["a", "b"] * 20, "label": [0, 1] * 20}), tmp_path / "whole.parquet")
    content = bytearray((tmp_path / "whole.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(content), len(content) // 2]))
    assert_usable_or_refused(write(tmp_path, "fuzz.parquet", bytes(content[:cut])))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_whose_name_is_no_text_is_refused(tmp_path: Path, suffix: str) -> None:
    table, path = pa.table({"text": ["a"], "label": [1]}), tmp_path / f"whole.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    damaged = write(tmp_path, f"a.{suffix}", path.read_bytes().replace(b"label", b"\x80abel"))

    with pytest.raises(DataError, match=f"not a whole {suffix} file"):
        read_table(damaged)


def test_every_suffix_has_a_reader() -> None:
    tagged = {".conll", ".bio", ".iob", ".iob2"}
    assert set(READERS) == {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", *tagged, ".conllu"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["text\tlabel", '"a ""great"" film\nof 1999"\tup', "an awful plot\tdown"], "2 cells separated by tabs.* .tsv"),
        (["ham\tSee you at 8", "spam\tFree entry"] * 80, "2 cells separated by tabs, as in 'ham"),
        (["id;Text;n", "1;a;2", "2;b;3"], "3 cells separated by semicolons.*Name it .csv.*semicolons go into jsonl"),
        (["review,n"] + ['"good, really",1'] * 120, "2 cells separated by commas.*Name it .csv"),
    ],
)  # fmt: skip
def test_a_table_that_is_called_txt_is_not_read_as_lines(tmp_path: Path, lines: list[str], says: str) -> None:
    path = write(tmp_path, "a.txt", "\r\n".join(lines).encode("utf-16"))
    with pytest.raises(DataError, match=says):
        read_table(path, "utf-16")


@pytest.mark.parametrize(
    "lines",
    [
        ["Hello, world", "one, two", "three, four"],
        ["a text, with a comma", "another, too", "and another", "one more, and, more"],
        ["\tindented"] * 3,
        ["1\tone", "2\ttwo"],
        ["1\tone", "2\ttwo", "three"],
        ['"never closed\tx', "b\tc", "d\te"],
    ],
)
def test_lines_with_signs_of_tables_are_texts(tmp_path: Path, lines: list[str]) -> None:
    assert read_table(write(tmp_path, "a.txt", "\n".join(lines)))["text"].to_pylist() == lines


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("value", [{"choices": ["up"]}, {"start": 0, "end": 4, "text": "Anna", "labels": ["PER"]}])
def test_a_full_export_of_label_studio_gets_advice(tmp_path: Path, name: str, value: dict[str, Any]) -> None:
    row = {"id": 1, "annotations": [{"id": 7, "result": [{"value": value}]}], "data": {"text": "Anna likes it"}}
    rows = [row | {"annotations": []}, row]
    text = json.dumps(rows, indent=1) if name == "a.json" else "\n".join(map(json.dumps, rows))

    with pytest.raises(DataError, match=rf"{name}( row |:)2: it is from Label Studio's full .*Export JSON-MIN or CSV"):
        read_table(write(tmp_path, name, text))
    read_table(write(tmp_path, name, json.dumps([row | {"data": "x"}]) if name == "a.json" else json.dumps(rows[0])))


def test_the_name_of_a_column_holds_whole_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"te\\ud800xt": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: the name of column 'te.ud800xt' holds half a character"):
        read_table(tmp_path / "a.jsonl")


def test_a_folder_with_the_name_of_a_table_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    with pytest.raises(DataError, match=r"train\.csv: it is a folder"):
        read_table(tmp_path / "train.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.jsonl", "a.txt", "a.parquet", "a.arrow"])
def test_a_file_that_may_not_be_read_need_not_be_copied(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", name)

    path = write(tmp_path, name, "a")
    monkeypatch.setattr(Path, "open", refused)  # root may read every file
    monkeypatch.setattr(gzip, "open", refused)
    monkeypatch.setattr(pa, "memory_map", refused)
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path}: it may not be read (permission denied). Permit it: chmod u+r {path}."


@pytest.mark.parametrize("value", ['[{"content": "hi \\ud83d"}]', '["hi \\ud83d"]', '{"a": ["\\ud83d"]}'])
def test_half_a_character_inside_of_a_value_makes_its_column_unreadable(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": ["ok"]}\n{"x": ' + value + "}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'x' holds half a character"):
        refuse_unreadable(read_table(path), ["x"])


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_with_one_name_are_refused_where_they_are_used(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "x", "x"])
    if ending == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    found = read_table(path)
    assert found.column_names == ["text", "x"]
    assert found.column("text").to_pylist() == ["a"]
    with pytest.raises(DataError, match="column name 'x' appears twice"):
        refuse_unreadable(found, ["x"])
