# SPDX-License-Identifier: Apache-2.0
"""Which columns are taken for text and label, and what is said when none can be."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mirrortune.data.columns import choose_columns
from mirrortune.errors import DataError


def table(*names: str, **columns: list[object]) -> pa.Table:
    """Two rows: text in the columns ``names``, and the given ``columns``."""
    return pa.table({**{name: ["x", "y"] for name in names}, **columns})


@pytest.mark.parametrize(
    ("names", "text", "label"),
    [
        ("text label", "text", "label"),
        ("label text", "text", "label"),
        ("id sentence label idx", "sentence", "label"),
        ("Review Sentiment", "Review", "Sentiment"),
        ("idx sentence1 sentence2 label", "sentence1 sentence2", "label"),
        ("premise hypothesis label", "premise hypothesis", "label"),
        ("question1 question2 label", "question1 question2", "label"),
        ("question sentence label", "question sentence", "label"),
        ("sentence2 sentence1 text label", "sentence1 sentence2", "label"),
        ("content stars", "content", "stars"),
        ("headline category", "headline", "category"),
        ("text verdict", "text", "verdict"),
        ("score text", "text", "score"),
        ("label class text", "text", "label"),
    ],
)
def test_columns_are_found_by_the_names_people_use(names: str, text: str, label: str) -> None:
    found, target, notes = choose_columns(table(*names.split()), None, None, "d.csv")

    assert found == tuple(text.split())
    assert target == label
    assert notes[0] == f"label column '{label}' (detected; --label-column to change)"
    assert notes[1].endswith("(detected; --text-column to change)")
    assert all(f"'{name}'" in notes[1] for name in text.split())


def test_the_only_text_is_the_text() -> None:
    found, target, _ = choose_columns(table("blurb", label=[0, 1], length=[3, 4]), None, None, "d.csv")

    assert (found, target) == (("blurb",), "label")


def reviews(count: int = 60) -> dict[str, list[object]]:
    """Columns of each sort, by what they hold."""
    return {
        "subject": [f"the film number {i} was seen by many" for i in range(count)],
        "kind": [("praise", "blame", "neither")[i * i % 3] for i in range(count)],
        "place": [("north", "south")[i % 7 > 3] for i in range(count)],
        "length": [i * 37 % 11 for i in range(count)],
        "number": list(range(count)),
        "price": [round(i * 0.37 % 5, 2) for i in range(count)],
        "stamp": [f"2024-01-01 00:{i:02}" for i in range(count)],
        "constant": ["x"] * count,
    }


@pytest.mark.parametrize(
    ("names", "label", "text"),
    [
        ("subject kind", "kind", "subject"),
        ("number subject kind stamp constant", "kind", "subject"),
        ("subject kind price length", "kind", "subject"),
        ("place kind subject", "kind", "subject"),  # by the hint in its name
        ("place subject number price", "place", "subject"),
    ],
)
def test_columns_are_found_by_what_they_hold(names: str, label: str, text: str) -> None:
    rows = pa.table({name: reviews()[name] for name in names.split()})

    found, target, notes = choose_columns(rows, None, None, "d.csv")

    assert (found, target) == ((text,), label)
    assert "values in 60 rows looked at" in notes[0]


def test_a_label_that_says_more_is_taken() -> None:
    fine = [i % 6 for i in range(60)]
    rows = pa.table({"words": reviews()["subject"], "coarse_label": [i // 3 for i in fine], "fine_label": fine})

    assert choose_columns(rows, None, None, "d.csv")[1] == "fine_label"


def test_two_readings_that_are_equally_likely_are_refused() -> None:
    columns = reviews()
    rows = pa.table({"subject": columns["subject"], "place": columns["place"], "colour": columns["kind"]})

    with pytest.raises(DataError, match=r"several columns could be the label: 'place' \(2 values.*'colour' \(2 values"):
        choose_columns(rows, None, None, "d.csv")


def test_a_name_that_holds_something_else_is_doubted() -> None:
    columns = reviews()
    rows = pa.table({"score": columns["price"], "subject": columns["subject"], "kind": columns["kind"]})

    assert choose_columns(rows, None, None, "d.csv")[1] == "kind"
    assert choose_columns(rows, None, None, "d.csv", numbers=True)[1] == "score"


def test_the_only_measure_is_what_is_predicted() -> None:
    rows = pa.table({name: reviews()[name] for name in ("number", "subject", "kind", "price")})

    assert choose_columns(rows, None, None, "d.csv", numbers=True)[:2] == (("subject",), "price")


def test_rows_that_an_annotator_has_rejected_are_refused() -> None:
    rows = table("text", "label", answer=["accept", "reject"])

    with pytest.raises(DataError, match=r"column 'answer' of an annotator is 'reject' for 1 row.*jq -c"):
        choose_columns(rows, None, None, "d.csv")
    assert choose_columns(rows, None, "answer", "d.csv")[1] == "answer"
    for answers in (["reject", "ignore"], ["reject", "reject"], ["ignore", None]):
        with pytest.raises(DataError, match=rf"is '{answers[0]}' for .*\. Give rows that were accepted\."):
            choose_columns(table("text", "label", answer=answers), None, None, "d.csv")
    for answers in (["accept", "accept"], ["accept", "no"], ["accept", None], [["accept"], ["reject"]]):
        assert choose_columns(table("text", "label", answer=answers), None, None, "d.csv")[1] == "label"


def test_only_the_first_of_thousands_of_columns_are_listed() -> None:
    rows = table(*(f"c{i}" for i in range(5000)))
    for text, label in ((["c0"], None), (["no"], "c0"), (None, "c0")):
        with pytest.raises(DataError, match=r"c39 and 49\d\d more") as caught:
            choose_columns(rows, text, label, "d.csv")
        assert len(str(caught.value)) < 500


def test_what_is_named_is_taken_and_needs_no_note() -> None:
    assert choose_columns(table("a", "b", "c"), ["b", "a"], "c", "d.csv") == (("b", "a"), "c", [])
    assert choose_columns(table("a", "b"), ["a"], None, "d.csv")[1] == "b"
    assert choose_columns(table("text", "label", "title"), None, "title", "d.csv")[0] == ("text",)


@pytest.mark.parametrize(
    ("rows", "text", "label", "says"),
    [
        (
            table("text", "label"),
            ["txt"],
            None,
            "--text-column 'txt' is not a column. Did you mean 'text'? Allowed: text",
        ),
        (table("text", "label"), None, "lable", "--label-column 'lable' is not a column. Did you mean 'label'?"),
        (table("text", "label"), ["text"], "text", "column 'text' is both text and label"),
        (
            table("a", "b"),
            None,
            None,
            "no column looks like a label. Allowed: one of the columns a, b. Name it with --label",
        ),
        (
            table("a", "b", "label"),
            None,
            None,
            "several columns could be the text. Allowed: one or two of the columns a, b",
        ),
        (table("label", n=[1, 2]), None, None, "no column could be the text"),
        (table("a", "b", "c", "label"), ["a", "b", "c"], None, "3 text columns, got a, b, c. Allowed: one or two"),
        (table("label", text=[1, 2]), None, None, "text column 'text' holds int64, not text"),
        (table("label", text=[["a"], ["b"]]), None, None, "text column 'text' holds list<"),
        (
            table("label", text=[None, None]),
            None,
            None,
            "text column 'text' is empty in all 2 rows. Allowed: label, text",
        ),
        (pa.table({}), None, None, "it has no columns"),
    ],
)
def test_what_cannot_be_chosen_lists_the_columns(
    rows: pa.Table, text: list[str] | None, label: str | None, says: str
) -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(rows, text, label, "d.csv")

    assert str(caught.value).startswith("d.csv: ")
    assert says in str(caught.value)


def test_a_description_is_the_text_before_a_title() -> None:
    rows = range(40)
    news = pa.table({
        "Class Index": [str(row % 4 + 1) for row in rows],
        "Title": [f"a short headline of row {row}" for row in rows],
        "Description": [f"what happened in row {row}, in words of which there are a few more" for row in rows],
    })  # fmt: skip
    assert choose_columns(news, None, None, "news.csv")[:2] == (("Description",), "Class Index")


@pytest.mark.parametrize("others", [["author"], ["venue", "author"]])
def test_a_title_is_the_text_before_shorter_columns(others: list[str]) -> None:
    rows = range(40)
    papers = pa.table({
        "title": [f"On the rank of adapters of language models, part {row}" for row in rows],
        **{name: [f"the {name} of work {row}, B." for row in rows] for name in others},
        "label": [row % 2 for row in rows],
    })  # fmt: skip
    assert choose_columns(papers, None, None, "papers.csv")[:2] == (("title",), "label")
