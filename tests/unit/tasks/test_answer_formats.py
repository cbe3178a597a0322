# SPDX-License-Identifier: Apache-2.0
"""Final answers are found in every odd form that references and models write them in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.errors import ConfigError
from mirrortune.tasks.answer_formats import FORMATS, answer_format

GIVEN = {
    "gsm8k": {
        "She has 5 - 2 = 3 left.\n#### 3": "3",
        "#### 1,234": "1234",
        "#### $1,234.50": "2469/2",
        "#### -7": "-7",
        "#### \u22127 degrees": "-7",
        "#### 0.5": "1/2",
        "#### .5": "1/2",
        "#### 3/4 of a cake": "3/4",
        "#### 1 1/2": "3/2",
        "#### -1 1/2": "-3/2",
        "#### 18\nThe answer is: 18": "18",
        "#### 18\n\nQuestion: and 5 more?\n#### 23": "18",
        "First 4, then 9. The answer is 13.": "13",
        "The answer is not 4. The answer is: $13.": "13",
        "That makes 20% of 50, or 10 apples": "10",
        "He pays $12.": "12",
        "#### 12.": "12",
        "#### 10%": "10",
        "####": None,
        "I do not know.": None,
        "": None,
        "1/0": None,
        "#### 70,000": "70000",
        "#### 70{,}000": "70000",
        "in all $70{,}000$ pears": "70000",
        "#### 5 apples and 3 pears": "5",
    },
    "boxed": {
        r"Thus $x = \boxed{42}$.": "42",
        r"\boxed{1} and then \boxed{2}": "2",
        r"\boxed{\frac{1}{2}}": "1/2",
        r"\boxed{\dfrac12}": "1/2",
        r"\boxed{-\tfrac{3}{4}}": "-3/4",
        r"\boxed{\frac{-3}{4}}": "-3/4",
        r"\boxed{0.5}": "1/2",
        r"\boxed{.5}": "1/2",
        r"\boxed{1/2}": "1/2",
        r"\boxed{1,000}": "1000",
        r"\boxed{1{,}000}": "1000",
        r"\boxed{\$1{,}234{,}567.5}": "2469135/2",
        r"\boxed{(1{,}5)}": "(1,5)",
        r"\boxed{\$1,000}": "1000",
        r"\boxed{90^\circ}": "90",
        r"\boxed{10\%}": "10",
        r"\boxed{5\text{ cm}}": "5",
        r"\boxed{\text{Monday}}": "Monday",
        r"\boxed{x = 3}": "3",
        r"\boxed{\left( 1, 2 \right)}": "(1,2)",
        r"\boxed{\sqrt2}": r"\sqrt{2}",
        r"\boxed{x^{2} + \frac{1}{x}}": r"x^{2}+\frac{1}{x}",
        r"\boxed 7": "7",
        r"The answer is: $\frac{3}{4}$.": "3/4",
        r"The answer is: 12": "12",
        r"\boxed{": None,
        "I cannot say.": None,
        "": None,
    },
    "letter": {
        "B": "B", "B.": "B", "(C)": "C", "C) a film": "C", "The answer is (D).": "D", "the answer is: b": None,
        "Answer: A": "A", "A film was seen. The answer is B": "B", "It must be (A)": "A", "I think it is C.": "C",
        "A cat sat.": None, "**D**": "D", "": None, "none of them": None, "I would say that E": "E",
    },
    "option": {
        "the correct answer is answer2": "answer2", "The correct answer is option 1.": "option1",
        "the correct answer is true": "true", "ending4": "ending4", "Solution2 is best": "solution2",
        "answer1 or answer2? the correct answer is answer2": "answer2", "no idea": "no", "": None, "perhaps": None,
    },
    "exact": {" a  b\n": "a b", "": None, "A": "A"},
    r"regex: result = (\d+)": {"result = 4, result = 5": "5", "4": None},
    r"regex: \d+": {"4 and 5": "5"},
}  # fmt: skip
CASES = [(name, text, found) for name, cases in GIVEN.items() for text, found in cases.items()]


@pytest.mark.parametrize(("name", "text", "found"), CASES)
def test_the_answer_of_a_generated_text_is_found(name: str, text: str, found: str | None) -> None:
    assert answer_format(name).given(text) == found


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("gsm8k", "2 + 2 = <<2+2=4>>4\n#### 4", "4"), ("boxed", r"so \boxed{\frac{1}{2}}", "1/2"), ("boxed", "7", "7"),
        ("boxed", "x+1", "x+1"), ("letter", "C", "C"), ("option", "the correct answer is false", "false"),
        (r"regex: (\d+)$", "no number", "no number"), ("gsm8k", "nothing", None), ("exact", " ", None),
    ],
)  # fmt: skip
def test_the_answer_of_a_reference_is_found(name: str, text: str, found: str | None) -> None:
    assert answer_format(name).expected(text) == found


@given(number=st.integers(-(10**9), 10**9), places=st.integers(0, 3))
def test_a_number_is_the_same_however_it_is_written(number: int, places: int) -> None:
    exact = FORMATS["gsm8k"].given(f"#### {number}")
    assert exact == str(number)
    zeros = "." + "0" * places if places else ""
    for text in (f"#### {number:,}{zeros}", f"The answer is {number:,}{zeros}.", f"in all {number}{zeros}"):
        assert FORMATS["gsm8k"].given(text) == exact
    assert FORMATS["boxed"].given(rf"\boxed{{{number:,}{zeros}}}") == exact


@given(text=st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    for found in FORMATS.values():
        for answer in (found.expected(text), found.given(text)):
            assert answer is None or answer.strip()


@pytest.mark.parametrize(
    ("name", "message"),
    [("gms8k", "Did you mean 'gsm8k'"), ("regex: (", "is not a regular expression"), ("regex", "task.answer")],
)
def test_what_is_no_format_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        answer_format(name)


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with pytest.raises(ConfigError, match="takes over 1 s"):
        answer_format("regex: ^(a|aa)+$").given("a" * 60 + "!")
