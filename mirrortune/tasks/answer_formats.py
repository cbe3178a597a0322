# SPDX-License-Identifier: Apache-2.0
"""Extract the final answer from reference and generated texts, in a normal form in which answers are compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import regex

from mirrortune.errors import ConfigError, unknown_name

_SECONDS = 1.0  # time limit of a search with a user's pattern
_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+"
_NUMBERS = re.compile(rf"(?:{_NUMBER})(?:\s*/\s*\d[\d,]*)?(?:\s+\d+\s*/\s*\d+)?")
_MINUS = str.maketrans("\u2212\u2013\u2010\u2011", "----")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:)\s*:?", re.IGNORECASE)
_OPTIONS = re.compile(r"\b(?:(answer|option|solution|ending|choice)\s*(\d+)|true|false|yes|no)\b", re.IGNORECASE)
_UNITS = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]*\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How the final answer is written in a text.

    Attributes:
        expected: reference text -> its answer in normal form; None if there is none.
        given: generated text -> its answer in normal form; None if there is none.
    """

    expected: Callable[[str], str | None]
    given: Callable[[str], str | None]


def answer_format(name: str) -> AnswerFormat:
    """Return the format of a name in :data:`FORMATS`, or of a ``regex:PATTERN``.

    The answer is the pattern's first group, or the complete match if it has no group. If there are several matches,
    the last one counts. A reference text without a match is itself the answer.

    Raises:
        ConfigError: the name is unknown or the pattern is invalid.
    """
    kind, colon, pattern = name.partition(":")
    if kind.strip() == "regex" and colon:
        return _pattern_format(pattern.strip())
    if name not in FORMATS:
        raise unknown_name("task.answer", "format of answers", name, [*FORMATS, "regex:PATTERN"])
    return FORMATS[name]


def _pattern_format(pattern: str) -> AnswerFormat:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigError("task.answer", f"'{pattern}' is not a regular expression: {error}") from error

    def last(text: str) -> str | None:
        try:
            found = [match.group(1 if compiled.groups else 0) for match in compiled.finditer(text, timeout=_SECONDS)]
        except TimeoutError as error:
            raise ConfigError(
                "task.answer", f"'{pattern}' takes over {_SECONDS:g} s on a text of {len(text):,} characters",
                fix="Write it without nested repetitions",
            ) from error  # fmt: skip
        return _plain(found[-1]) if found and found[-1] is not None else None

    return AnswerFormat(expected=lambda text: last(text) or _plain(text), given=last)


def _plain(text: str) -> str | None:
    """Collapse white space to single spaces; return None if the text is blank."""
    return " ".join(text.split()) or None


def _number(text: str) -> Fraction | None:
    """Return the first number in a text as an exact fraction; reads integers, decimals, fractions and mixed numbers."""
    found = _NUMBERS.search(text.translate(_MINUS).replace("- ", "-"))
    if found is None:
        return None
    whole, _, part = found[0].replace(",", "").partition("/")
    mixed = re.fullmatch(r"([-+]?\d+)\s+(\d+)", whole.strip())
    try:
        if mixed and part:  # 1 1/2
            fraction = Fraction(int(mixed[2]), int(part))
            return int(mixed[1]) + (-fraction if whole.strip().startswith("-") else fraction)
        if part and " " in part.strip():  # 3/4 1/2: two numbers, of which the first counts
            part = part.split()[0]
        return Fraction(whole.strip()) / (Fraction(part.strip()) if part.strip() else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _as_number(text: str) -> str | None:
    number = _number(text.replace("$", "").replace("{,}", ",").replace("\\", ""))
    return None if number is None else str(number)


def _last_number(text: str) -> str | None:
    cleaned = text.translate(_MINUS).replace("$", "").replace("{,}", ",")
    found = [match[0] for match in _NUMBERS.finditer(cleaned)]
    return _as_number(found[-1]) if found else None


def _gsm8k(text: str) -> str | None:
    """Return the number after ``####``, else after the last "the answer is", else the last number in the text."""
    if "####" in text and (found := _as_number(text.partition("####")[2])) is not None:
        return found
    if (behind := _behind_answer_is(text)) is not None and (found := _as_number(behind)) is not None:
        return found
    return _last_number(text)


def _behind_answer_is(text: str) -> str | None:
    places = [match.end() for match in _ANSWER_IS.finditer(text)]
    return text[places[-1] :] if places else None


def _last_box(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, with balanced braces; None if there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not rest.startswith("{"):
        return rest.strip().split("$")[0].split()[0] if rest.strip().split("$")[0].split() else None
    depth = 0
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:place]
    return None


def _boxed_given(text: str) -> str | None:
    box = _last_box(text)
    if box is None and (behind := _behind_answer_is(text)) is not None:
        box = behind.strip().splitlines()[0] if behind.strip() else None
    return _mathematical(box) if box is not None else None


def _mathematical(text: str) -> str | None:
    r"""Normalise a formula: drop spaces, units, degree signs and delimiter sizes; write ``a/b`` as ``\frac{a}{b}``.

    As in the evaluation of MATH (Hendrycks et al. 2021), formulas are compared as text, not by their mathematical
    meaning. Plain numbers are compared by value.
    """
    text = text.strip().strip("$").strip().rstrip(".").translate(_MINUS).replace("{,}", ",")
    for word in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\$", "\\%", "%", "$", "^\\circ", "^{\\circ}"):
        text = text.replace(word, "")
    text = re.sub(r"\\\s", "", text)
    named = re.fullmatch(r"\s*\\(?:text|mbox|textrm|mathrm|textbf)\s*\{([^{}]*)\}\s*", text)
    text = named[1] if named else _UNITS.sub("", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"[-+]?[\d,]+(\.\d+)?", text.strip()) else text
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^[a-zA-Z]=", "", text)
    text = re.sub(r"^([-+]?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^\\frac\{-(\d+)\}", r"-\\frac{\1}", text)
    return _canonical_number(text) or text or None


def _canonical_number(text: str) -> str | None:
    fraction = re.fullmatch(r"([-+]?)\\frac\{(\d+)\}\{(\d+)\}", text)
    try:
        if fraction:
            return str(Fraction(int(fraction[1] + fraction[2]), int(fraction[3])))
        return str(Fraction(text)) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) else None
    except ZeroDivisionError:
        return None


def _letter(text: str) -> str | None:
    """Return the letter of a choice, A to Z: after "the answer is", at the start, in brackets, or the last alone."""
    for wanted in (_behind_answer_is(text), text):
        # "A film" begins with an article, not with a choice
        if wanted is not None and (found := re.match(r"[\s*\"'(\[]*(?![AI]\s+[a-z])([A-Z])(?![A-Za-z'])", wanted)):
            return found[1]
    bracketed = re.findall(r"[(\[]([A-Z])[)\]]", text)
    alone = re.findall(r"(?<![A-Za-z'])([B-HJ-Z])(?![A-Za-z'])|(?<![A-Za-z'])([AI])(?=[).:,\]]|\s*$)", text)
    last = [*bracketed[-1:], *("".join(pair) for pair in alone[-1:])]
    return last[0] if last else None


def _option(text: str) -> str | None:
    """Return ``answer2``, ``option1``, ``true`` and the like: after "correct answer is", else the first in the text."""
    behind = text.lower().rpartition("correct answer is")
    for part in (behind[2] if behind[1] else "", text):
        if found := _OPTIONS.search(part):
            return "".join(found[0].lower().split())
    return None


FORMATS: dict[str, AnswerFormat] = {
    "gsm8k": AnswerFormat(expected=_gsm8k, given=_gsm8k),
    "boxed": AnswerFormat(
        expected=lambda text: _boxed_given(text) or _mathematical(text), given=_boxed_given
    ),
    "letter": AnswerFormat(expected=_letter, given=_letter),
    "option": AnswerFormat(expected=_option, given=_option),
    "exact": AnswerFormat(expected=_plain, given=_plain),
}  # fmt: skip
"""Formats by name. ``gsm8k``: a number after ``####``. ``boxed``: a formula in LaTeX's ``\\boxed``, as in MATH.
``letter``: the letter of a choice. ``option``: ``answer2``, ``true`` and the like, as in Commonsense-170k. ``exact``:
the complete text, up to white space."""
