# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table hold the text and the label, and a sentence that says why."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from mirrortune.data.column_contents import Contents, contents, finest, holds_lists_as_text, longest
from mirrortune.data.files.column_problems import refuse_unreadable
from mirrortune.errors import DataError, counted, did_you_mean

# Names that users and the Hub's datasets give their columns, the most specific first.
_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "comment", "message", "tweet")
# A title is the text only where there is no other.
_WEAK_TEXT_NAMES = ("title",)
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "y")


_FIRST = 100  # rows that show how a column is written
_PATH_NAMES = ("path", "file_name", "filename", "file")


def choose_columns(
    table: pa.Table, text: Sequence[str] | None, label: str | None, source: str, *, numbers: bool = False
) -> tuple[tuple[str, ...], str, list[str]]:
    """The text columns (one or two) and the label column of ``table``, by their names, else by what they hold.

    Args:
        table: the training rows.
        text: columns the user named, or None to detect.
        label: the label column the user named, or None to detect.
        source: the table's file or dataset, for messages.
        numbers: whether labels are numbers to predict rather than classes.

    Returns:
        Text columns, label column, and one note for each that was detected rather than given.

    Raises:
        DataError: if a named column does not exist or cannot be read, or if nothing or more than one reading fits;
            lists the columns that do.
    """
    check_named(table, [*((c, "--text-column") for c in text or ()), (label, "--label-column")], source)
    notes = []
    if label is None:
        label, note = _detect_label(table, text, source, numbers=numbers)
        notes.append(note)
    if not text:
        text, note = _detect_text(table, label, source)
        notes.append(note)
    if len(text) > 2:
        raise DataError(source, f"{len(text)} text columns, got {', '.join(text)}", allowed="one or two")
    if label in text:
        raise DataError(source, f"column '{label}' is both text and label", fix="Give --label-column another column")
    refuse_unreadable(table, (*text, label))
    for column in text:
        check_is_text(table, column, source)
    return tuple(text), label, notes


def choose_image_column(
    table: pa.Table, image: str | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    """The column of images (encoded, or paths) and the label column; like :func:`choose_columns`."""
    return _choose_media("image", ("image", "img", "picture", "photo"), table, image, label, source)


def choose_audio_column(
    table: pa.Table, audio: str | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    """The column of recordings (encoded, or paths) and the label column; like :func:`choose_columns`."""
    return _choose_media("audio", ("audio", "speech", "recording", "sound"), table, audio, label, source)


def _choose_media(
    role: str, names: Sequence[str], table: pa.Table, column: str | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    check_named(table, [(column, f"--{role}-column"), (label, "--label-column")], source)
    notes = []
    if column is None:
        fitting = {n.lower(): n for n in table.column_names if n != label and _is_media(table.schema.field(n).type)}
        encoded = [n for n in fitting.values() if not is_string(table.schema.field(n).type)]
        known = (*names, *(f"{name}_{end}" for name in names for end in ("path", "file")), *_PATH_NAMES)
        column = next(iter([*encoded[: len(encoded) == 1], *(fitting[n] for n in known if n in fitting)]), None)
        if column is None:
            raise DataError(
                source,
                f"no column looks like {role}s" if role == "image" else "no column looks like recordings",
                allowed=f"one of the columns {', '.join(table.column_names)}, with paths or encoded files",
                fix=f"Name it with --{role}-column",
            )
        notes.append(detected(role, column))
    elif not _is_media(table.schema.field(column).type):
        raise DataError(
            source, f"{role} column '{column}' holds {table.schema.field(column).type}",
            allowed="paths, or encoded files (bytes, or the datasets library's structs of bytes and path)",
        )  # fmt: skip
    if label is None:
        label, note = _detect_label(table, (column,), source)
        notes.append(note)
    if label == column:
        raise DataError(source, f"column '{label}' is both {role} and label", fix="Give --label-column another column")
    refuse_unreadable(table, (column, label))
    return column, label, notes


def check_named(table: pa.Table, named: Sequence[tuple[str | None, str]], source: str) -> None:
    """Refuse a table without columns, and columns that were named by a flag and do not exist or cannot be read."""
    if not table.column_names:
        raise DataError(source, "it has no columns", fix="Give the file a header line")
    for column, flag in named:
        if column is not None and column not in table.column_names:
            raise DataError(
                source,
                f"{flag} '{column}' is not a column.{did_you_mean(column, table.column_names)}",
                allowed=", ".join(table.column_names),
            )
    refuse_unreadable(table, [column for column, _ in named if column is not None])


def detected(role: str, column: str, why: str = "") -> str:
    """The note on a column that was not named; ``why`` it was taken, where its name does not say so."""
    return f"{role} column '{column}' (detected{f': {why}' if why else ''}; --{role}-column to change)"


def _is_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) or is_string(kind)


def _detect_label(
    table: pa.Table, text: Sequence[str] | None, source: str, *, numbers: bool = False
) -> tuple[str, str]:
    """The label column, and the note on it."""
    names = [n for n in table.column_names if n not in (text or ())]
    texts = [n for n in names if n.lower() in (*_TEXT_NAMES, *_WEAK_TEXT_NAMES)]
    paired = {name for pair in _PAIR_NAMES for name in pair}
    known = {n: c for n, c in contents(table).items() if n in names and n not in texts and n.lower() not in paired}
    fitting = [c for c in known.values() if (c.may_be_target if numbers else c.may_be_label)]
    by_name = [n for wanted in _LABEL_NAMES for n in names if n.lower() == wanted]
    # A name is doubted only where its column holds something else, and another one holds labels.
    trusted = [n for n in by_name if n not in known or not _is_no_label(known[n], numbers=numbers)]
    if trusted or (by_name and not fitting):
        name = (trusted or by_name)[0]
        return name, detected("label", name)
    if text and len(names) == 1:
        return names[0], detected("label", names[0])
    if len(names) == 2 and len(texts) == 1:
        name = next(n for n in names if n not in texts)
        return name, detected("label", name)
    refuse_preferences(table, source)
    hinted = [column for column in fitting if column.has_hint] or fitting
    if numbers and len(hinted) > 1:
        hinted = [column for column in hinted if not column.is_whole] or hinted
    found = finest(hinted) if hinted and not numbers else hinted[0] if len(hinted) == 1 else None
    if found is not None:
        return found.name, detected("label", found.name, found.why_label())
    refuse_unreadable(table, table.column_names)  # what could not be read may be what is missing
    several = ", ".join(f"'{c.name}' ({c.why_label()})" for c in hinted)
    raise DataError(
        source,
        f"several columns could be the label: {several}" if several else "no column looks like a label",
        allowed=f"one of the columns {', '.join(table.column_names)}",
        fix="Name it with --label-column",
    )


def _is_no_label(column: Contents, *, numbers: bool) -> bool:
    """Whether a column that is called like a label holds something else."""
    if numbers:
        return column.share_of_numbers < 0.5
    is_measure = column.is_number and not column.is_whole and column.distinct > column.rows / 10
    return column.may_be_text or is_measure


def _detect_text(table: pa.Table, label: str, source: str) -> tuple[tuple[str, ...], str]:
    """The text columns, and the note on them."""
    lowered = {n.lower(): n for n in table.column_names if n != label}
    for first, second in _PAIR_NAMES:
        if first in lowered and second in lowered:
            pair = lowered[first], lowered[second]
            return pair, f"text columns '{pair[0]}', '{pair[1]}' (detected; --text-column to change)"
    for wanted in _TEXT_NAMES:
        if wanted in lowered:
            return (lowered[wanted],), detected("text", lowered[wanted])
    strings = [n for n in lowered.values() if is_string(table.schema.field(n).type)]
    if len(strings) == 1:
        return (strings[0],), detected("text", strings[0])
    known = contents(table)
    fitting = [known[n] for n in strings if n in known and known[n].may_be_text]
    found = longest(fitting)
    if found is not None:
        return (found.name,), detected("text", found.name, found.why_text())
    for wanted in _WEAK_TEXT_NAMES:
        if wanted in lowered:
            return (lowered[wanted],), detected("text", lowered[wanted])
    refuse_unreadable(table, table.column_names)
    raise DataError(
        source,
        f"{'several columns' if strings else 'no column'} could be the text",
        allowed=f"one or two of the columns {', '.join(c.name for c in fitting) or ', '.join(table.column_names)}",
        fix="Name it with --text-column",
    )


def refuse_written_lists(table: pa.Table, column: str, source: str) -> None:
    """Refuse a column of lists or objects that were written as text, which only look like what a task needs."""
    if column in table.column_names and is_string(table.schema.field(column).type):
        sample = table.column(column).slice(0, _FIRST).to_pylist()
        if holds_lists_as_text(sample):
            shown = next(cell for cell in sample if cell)
            raise DataError(
                source, f"column '{column}' holds lists or objects written as text, such as {shown[:80]!r}",
                allowed="lists and objects of json, jsonl or parquet files; csv has none",
                fix="Write the rows as jsonl",
            )  # fmt: skip


def refuse_preferences(table: pa.Table, source: str) -> None:
    """Refuse rows that say which of two answers is the better one, or whether an answer is good: an answer that a
    person rejected must not be learned because its column looks like text.

    Raises:
        DataError: for columns chosen and rejected, or prompt, completion and a label of true and false.
    """
    lowered = {name.lower(): table.schema.field(name).type for name in table.column_names}
    if {"chosen", "rejected"} <= lowered.keys():
        what = "columns chosen and rejected"
    elif {"prompt", "completion"} <= lowered.keys() and pa.types.is_boolean(lowered.get("label", pa.null())):
        what = "columns prompt, completion and a label of true and false"
    else:
        return
    raise DataError(
        source, f"it holds preferences ({what}), for methods such as DPO, ORPO and KTO, which mirrortune does not have",
        fix="Train on them with TRL around a model that mirrortune.attach() has adapted, "
        "or give rows with one right answer each",
    )  # fmt: skip


def check_is_text(table: pa.Table, column: str, source: str) -> None:
    """Refuse a column that holds no text, or nothing at all."""
    kind = table.schema.field(column).type
    if not (is_string(kind) or pa.types.is_null(kind)):
        raise DataError(
            source, f"text column '{column}' holds {kind}, not text", allowed="a column of strings",
            fix="Name another with --text-column",
        )  # fmt: skip
    if table.num_rows and table.column(column).null_count == table.num_rows:
        raise DataError(
            source, f"text column '{column}' is empty in all {counted(table.num_rows, 'row')}",
            allowed=", ".join(table.column_names), fix="Name another with --text-column",
        )  # fmt: skip


def is_string(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
