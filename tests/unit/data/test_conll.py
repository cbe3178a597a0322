# SPDX-License-Identifier: Apache-2.0
"""Files of tagged words: separators, comments, marks of documents, and lines that do not fit."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from mirrortune.data.dataset import load_data
from mirrortune.data.files.readers import read_rows, read_table
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace
from mirrortune.tasks.base import task_class
from tests.cli.console import mirrortune
from tests.tiny_models import write_tiny_model

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
"""


def test_the_columns_of_conll_2003_are_words_and_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL_2003)
    (tmp_path / "b.conll.gz").write_bytes(gzip.compress(CONLL_2003.replace("\n", " \r\n").encode()))

    table, places = read_rows(tmp_path / "a.conll")

    assert table.to_pydict() == {
        "tokens": [["EU", "rejects"], ["Peter"]], "column 2": [["NNP", "VBZ"], ["NNP"]],
        "column 3": [["B-NP", "B-VP"], ["B-NP"]], "tags": [["B-ORG", "O"], ["B-PER"]],
    }  # fmt: skip
    assert [places.where(row) for row in (0, 1)] == [f"{tmp_path}/a.conll:3", f"{tmp_path}/a.conll:8"]
    assert read_table(tmp_path / "b.conll.gz").equals(table)
    task, _ = task_class("token-classification").from_rows(table, "a.conll")
    assert (task.text_columns, task.label_column, task.labels) == (("tokens",), "tags", ("B-ORG", "B-PER", "O"))


@pytest.mark.parametrize("name", ["a.bio", "a.iob", "a.IOB2"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("New York\tB-LOC\nis\tO\n\t\nbig\tO", [["New York", "is"], ["big"]]),
        ("# id 7 domain=en\nEU _ _ B-ORG\n# _ _ O\n\n\n# id 8 domain=en\n#tag _ _ O\n", [["EU", "#"], ["#tag"]]),
        ("# a comment\nEU B-ORG\n\n# O\nis O\n", [["EU"], ["#", "is"]]),
        ("\ufeffone\ntwo\n\nthree", [["one", "two"], ["three"]]),
        ("-DOCSTART- (1 EU)\n\nEU B-ORG\n", [["EU"]]),
        ("-DOCSTART-\n\n# newdoc id = a b\n\nEU\tB-ORG\n", [["EU"]]),
        ("10\u00a0000 O\n\u3000 O\n", [["10\u00a0000", "\u3000"]]),
        ("EU\tB-ORG\n\u00a0\tO\n", [["EU", "\u00a0"]]),
        ("#text O\nis O\n", [["#text", "is"]]),
    ],
)
def test_separators_and_comments(tmp_path: Path, name: str, text: str, words: list[list[str]]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_table(tmp_path / name)
    assert table["tokens"].to_pylist() == words
    assert ("tags" in table.column_names) is (text[0] != "\ufeff")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("EU B-ORG\n\nis O\nbig\n", r"a.conll:4: 1 cell in place of 2 in a line of tagged words: 'big'"),
        ("EU\tB-ORG\nis\t\n", r"a.conll:2: an empty cell in a line of tagged words"),
        ("-DOCSTART- O\n\n", "the file has no rows"),
        ("\n\n", "the file has no rows"),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.conll").write_text(text)
    with pytest.raises(DataError, match=says):
        read_table(tmp_path / "a.conll")


def test_a_folder_of_conll_files_trains_and_is_answered(tmp_path: Path) -> None:
    (tmp_path / "ner").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "ner" / f"{name}.conll").write_text(CONLL_2003 * 4)
    base = write_tiny_model(tmp_path / "base")
    words = ("-m", base, "-t", "token-classification", "-d", tmp_path / "ner", "--max-steps", 1)
    trained = mirrortune("train", *words, "-o", tmp_path / "run")
    chunks = mirrortune("prepare", *words, "--label-column", "column 3", "--dry-run")
    (tmp_path / "new.conll").write_text("the\nfilm\n\na\nplot\n")
    done = mirrortune("predict", tmp_path / "run", "-d", tmp_path / "new.conll", "-o", tmp_path / "out.jsonl")
    assert trained.exit_code == 0, trained.stderr
    assert "columns not used: column 2, column 3" in trained.said
    assert "validation: 8 rows" in trained.said
    assert chunks.exit_code == 0, chunks.stderr
    assert done.exit_code == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


TREES = """# newdoc id = d1
# sent_id = 1
# text = Vámonos al mar.
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\tCase=Acc\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
5\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\tSpaceAfter=No
5.1\tvamos\tir\tVERB\t_\t_\t_\t_\t1:conj\t_
6\t.\t.\tPUNCT\t_\t_\t1\tpunct\t_\t_

# sent_id = 2
1\t10 000\t_\tNUM\tCD\t_\t0\troot\t_\t_
2\t_\t_\tSYM\t_\t_\t1\tdep\t_\t_
"""


def test_the_columns_of_universal_dependencies_are_those_of_their_data_sets(tmp_path: Path) -> None:
    (tmp_path / "a.conllu").write_text(TREES, encoding="utf-8")
    (tmp_path / "b.CONLLU.gz").write_bytes(gzip.compress(TREES.replace("\n", "\r\n").encode()))

    table, places = read_rows(tmp_path / "a.conllu")

    found = table.to_pydict()
    assert found["tokens"] == [["Vamos", "nos", "a", "el", "mar", "."], ["10 000", "_"]]
    assert found["upos"] == [["VERB", "PRON", "ADP", "DET", "NOUN", "PUNCT"], ["NUM", "SYM"]]
    assert (found["xpos"], found["lemmas"][1]) == ([["_"] * 6, ["CD", "_"]], ["_", "_"])
    assert list(found) == ["tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel"]
    assert [places.where(row) for row in (0, 1)] == [f"{tmp_path}/a.conllu:5", f"{tmp_path}/a.conllu:15"]
    assert read_table(tmp_path / "b.CONLLU.gz").equals(table)
    task, _ = task_class("token-classification").from_rows(table, "a.conllu")
    assert (task.text_columns, task.label_column, task.metric_names) == (("tokens",), "upos", ("tag_accuracy",))
    other, _ = task_class("token-classification").from_rows(table, "a.conllu", label_column="xpos")
    assert other.labels == ("CD", "_")


def test_the_folder_of_a_treebank_is_read_by_split(tmp_path: Path) -> None:
    for name in ("es_gsd-ud-train", "es_gsd-ud-dev", "es_gsd-ud-test"):
        (tmp_path / f"{name}.conllu").write_text(TREES, encoding="utf-8")
        (tmp_path / f"{name}.txt").write_text("Vámonos al mar.\n", encoding="utf-8")
    data = load_data(DataPlace.parse(str(tmp_path)))
    assert {name: split.table.num_rows for name, split in data.splits.items()} == {
        "train": 2, "validation": 2, "test": 2,
    }  # fmt: skip


def test_columns_that_a_treebank_does_not_annotate_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.conllu").write_text("1\tgood" + "\t_" * 8 + "\n")
    assert read_table(tmp_path / "a.conllu").to_pydict() == {"tokens": [["good"]]}
    (tmp_path / "a.conllu").write_text("1\tgood" + "\t_" * 8 + "\n\n1\tbad\t_\tADJ" + "\t_" * 6)
    assert read_table(tmp_path / "a.conllu").to_pydict() == {"tokens": [["good"], ["bad"]], "upos": [None, ["ADJ"]]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TREES.replace("\t", " "), r"a.conllu:4: it is not a line of CoNLL-U: '1-2 V.*10 cells separated by tabs"),
        ("1\tgood\tADJ\n", r"a.conllu:1: it is not a line of CoNLL-U: .*name a file of other columns \.conll"),
        ("good" + "\t_" * 9, r"a.conllu:1: it is not a line of CoNLL-U"),
        ("1\t" + "\t_" * 8, r"a.conllu:1: it is not a line of CoNLL-U"),
        ("1" + "\t_" * 9, r"its words are left out \('_' in the column FORM\)"),
        ("# sent_id = 1\n\n", "the file has no rows"),
    ],
)
def test_what_is_no_treebank_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.conllu").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        read_table(tmp_path / "a.conllu")


def test_a_file_with_tags_before_words_is_refused(tmp_path: Path) -> None:
    """As those of MIT's movie and restaurant corpora; the words would be the classes."""
    (tmp_path / "a.bio").write_text("O\twho\nB-ACTOR\tEva\nI-ACTOR\tGreen\n\nO\tis\n")
    with pytest.raises(DataError, match="tags are before the words") as refused:
        read_table(tmp_path / "a.bio")
    command = str(refused.value).split("columns: ")[1].strip().removesuffix(".")
    swapped = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "b.bio").write_bytes(swapped.stdout)
    assert read_table(tmp_path / "b.bio")["tokens"].to_pylist() == [["who", "Eva", "Green"], ["is"]]
