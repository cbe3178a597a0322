# SPDX-License-Identifier: Apache-2.0
"""Convert rows of chat data to the arguments of chat templates: messages, tools, documents.

The supported formats are those of OpenAI (``messages``, ``tool_calls``, ``functions``, a ``weight`` of 0 or 1),
ShareGPT (``conversations`` of ``from`` and ``value``), and LLaMA-Factory (columns ``system``, ``tools`` and
``history``). Axolotl's ``train`` and ms-swift's ``loss`` of a turn, true or false, are equivalent to ``weight``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.columns import check_named, detected, refuse_preferences, refuse_written_lists
from mirrortune.data.files.arrow import cells, is_json, is_list, is_string, refuse_unreadable
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.labels import refuse_missing
from mirrortune.errors import DataError, counted, first_of

Message = dict[str, Any]
# Names of roles in data sets, in lower case. Other roles are passed to the template unchanged.
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "chatgpt": "assistant", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_ALLOWED = "role (system, user, assistant, tool, ...) and content, both text"
_LARGEST_WEIGHT = 2000  # weights are stored in millionths, as 32-bit integers
_OWN_KEYS = ("role", "content", "from", "value", "weight", "function_call")
_FLAGS = ("train", "training", "loss")
"""Fields that say whether a turn is learned, beside ``weight``."""
_ALWAYS_READ = ("role", "content", "tool_calls", "tool_call_id", "weight")
_UNREAD, _UNLEARNED, _MOST_NAMED = "unread ", "unlearned ", 8
_ROLE, _CONTENT = {"role", "from"}, {"content", "value", "tool_calls", "function_call"}
_CUT_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value|weight)["']""")  # or in Python's notation
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field for the reasoning before an answer, in templates and data sets."""
# Column name in data sets -> the part that the column adds to the conversation of a row.
_ADDITIONS = {
    "system": "system", "system_prompt": "system", "system_message": "system", "tools": "tools",
    "functions": "tools", "documents": "documents", "history": "history", "chat_template_kwargs": "options",
    "weight": "weight",
}  # fmt: skip
_OF_TURNS = {*_ADDITIONS.values()}
_OF_LAYOUT = {**dict.fromkeys(("messages", "turns", "prompt", "alpaca"), _OF_TURNS), "text": {"weight"}}
SILENT, CALLS, EMPTY = 1, 2, 3
"""What is wrong with a row: no answer, tool calls that are not written, an empty answer."""
_MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue")
_PROMPTS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("question", "answer"))
_ALPACA_NAMES = (("instruction",), ("input", "context"), ("output", "response"))
_TEXTS = ("text", "content", "document")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The arguments of a chat template.

    Attributes:
        messages: turns with ``role``, ``content`` (None if there are only tool calls) and other keys of the row.
        options: further arguments of the template: ``tools``, ``documents`` and others that it defines.
        given: indices of the assistant's turns that are not learned.
    """

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)
    given: tuple[int, ...] = ()


def additions(table: pa.Table, layout: str, used: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of ``table`` that add to conversations of ``layout``, except those in ``used``."""
    return tuple(
        name
        for name in table.column_names
        if name not in used and meaning_of(name) in _OF_LAYOUT[layout] and _fits(table, name)
    )


def meaning_of(column: str) -> str:
    """Return the part that a column adds to a conversation: ``system``, ``tools``, ...; "" for none."""
    return _ADDITIONS.get(column.lower(), "")


def choose_layout(
    table: pa.Table, text: tuple[str, ...] | None, label: str | None, source: str
) -> tuple[str, tuple[str, ...], str | None, list[str]]:
    """Choose the columns and the layout of data for a language model.

    Args:
        table: the rows.
        text: columns of texts, or None to detect all columns.
        label: column of answers, or None.
        source: name of the rows, for messages.

    Returns:
        The layout, the text columns, the column of answers, and notes on what was detected.

    Raises:
        DataError: no column looks like text to learn.
    """
    check_named(table, source, {"--text-column": text, "--label-column": label})
    if text and len(text) > 2:
        raise DataError(source, f"{len(text)} text columns, got {', '.join(text)}", allowed="one or two")
    if text:
        is_chat = [_holds_turns(table, name) for name in (*text, label) if name is not None]
        layout = "text" if label is None else "prompt" if len(text) == 1 else "alpaca"
        if any(is_chat) and len(text) == 1:
            layout = "messages" if label is None else "turns"
        return layout, text, label, []
    refuse_preferences(table, source)
    lowered = {name.lower(): name for name in table.column_names}
    for name in _MESSAGES:  # a list of anything else is refused with its row, and no other column taken for the text
        if name in lowered and (_holds_turns(table, lowered[name]) or isinstance(_first(table, lowered[name]), list)):
            return "messages", (lowered[name],), None, [detected("text", lowered[name])]
        refuse_written_lists(table, lowered.get(name, ""), source)
    texts = {n for n in lowered if n != "context" or not isinstance(_first(table, lowered[n]), (list, dict))}
    asked, context, answer = (next((lowered[n] for n in names if n in texts), None) for names in _ALPACA_NAMES)
    if asked and answer and (context or "output" in lowered):
        named = (asked, context) if context else (asked,)
        return "alpaca", named, answer, [f"columns {', '.join((*named, answer))} (detected)"]
    for first, second in _PROMPTS:
        if first in lowered and second in lowered:
            notes = [detected("text", lowered[first]), detected("label", lowered[second])]
            layout = "turns" if any(_holds_turns(table, lowered[n]) for n in (first, second)) else "prompt"
            return layout, (lowered[first],), lowered[second], notes
    strings = [name for name in table.column_names if is_string(table.schema.field(name).type)]
    for name in (*(lowered[n] for n in _TEXTS if n in lowered), *(strings if len(strings) == 1 else ())):
        return "text", (name,), None, [detected("text", name)]
    refuse_unreadable(table, table.column_names)
    raise DataError(
        source,
        "no column looks like text to learn",
        allowed="messages; prompt and completion; instruction, input and output; or text",
        fix=f"Name one of {first_of(table.column_names)} with --text-column, and the answers with --label-column",
    )


def _first(table: pa.Table, column: str) -> Any:
    """Return the first cell of a column that is not empty, or None."""
    return next((v for v in cells(table, column) if (v.strip() if isinstance(v, str) else v)), None)


def _holds_turns(table: pa.Table, column: str) -> bool:
    """Return whether a column holds lists of messages, or their JSON text, as in csv files."""
    first = _first(table, column)
    if not isinstance(first, str):
        return isinstance(first, list) and bool(first) and isinstance(first[0], dict)
    with contextlib.suppress(ValueError, RecursionError):  # an answer may be the JSON text of other objects
        keys = _keys(json.loads(first))
        return not keys.isdisjoint(_ROLE) and not keys.isdisjoint(_CONTENT)
    return False


def _keys(value: Any) -> set[str]:
    """Return the keys of the first object in a list of objects; none for other values."""
    return {*value[0]} if isinstance(value, list) and value and isinstance(value[0], dict) else set()


def begins_with_space(table: pa.Table, column: str) -> bool:
    """Return whether the first text of a column begins with white space."""
    return next((str(value)[0].isspace() for value in cells(table, column) if value not in (None, "")), False)


def conversation(messages: list[Message], added: dict[str, Any], where: str, default: str = "") -> Conversation:
    """Return the conversation of a row.

    Args:
        messages: turns, as returned by :func:`as_messages`.
        added: cells of the columns of :func:`additions`, by name.
        where: place of the row, for messages.
        default: system turn for a conversation without one; "" for none.

    Raises:
        DataError: the content of a cell does not match the name of its column.
    """
    options: dict[str, Any] = {}
    before: list[Message] = []
    system = default
    for name, value in added.items():
        meaning = meaning_of(name)
        if value is None or value == "" or meaning == "weight":
            continue
        if meaning == "system":
            system = str(value)
        elif meaning == "history":
            before = as_history(value, f"{where}, column '{name}'")
        elif meaning == "options":
            options |= _as_objects(value, f"{where}, column '{name}'")[0]
        elif listed := _as_objects(value, f"{where}, column '{name}'"):
            options[meaning] = [_as_tool(tool) for tool in listed] if name.lower() == "functions" else listed
    at = 1 if messages[0]["role"] == "system" else 0
    messages = [*messages[:at], *before, *messages[at:]]
    if system and not at:
        messages = [{"role": "system", "content": system}, *messages]
    given = tuple(turn for turn, message in enumerate(messages) if message.get("weight", 1.0) == 0.0)
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(messages=messages, options=options, given=given)


def row_conversation(layout: str, row: Sequence[Any], added: dict[str, Any], where: str, default: str) -> Conversation:
    """Return the conversation in the cells of a row; see :func:`conversation`."""
    if layout == "messages":
        return conversation(as_messages(row[0], where), added, where, default)
    if layout == "turns":
        asked = [{**message, "weight": 0.0} for message in _as_turns(row[0], "user", where)]
        return conversation([*asked, *_as_turns(row[1], "assistant", where)], added, where, default)
    *texts, completion = [as_text(value, where) for value in row]
    prompt = "\n\n".join(text for text in texts if text.strip())
    turns: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return conversation(turns, added, where, default)


def asked_conversation(
    layout: str, row: Sequence[Any], added: dict[str, Any], where: str, default: str
) -> Conversation:  # fmt: skip
    """Return the conversation in the cells of a row without its last answer; a plain text becomes a user turn."""
    if layout not in ("messages", "turns"):
        talk = row_conversation(layout, [*row, None], added, where, default)
        return replace(talk, messages=talk.messages[:-1])
    messages = _as_turns(row[0], "user", where)
    while layout == "messages" and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError(where, "the conversation has no turn to answer", fix="Add what the user says")
    return conversation(messages, added, where, default)


def row_weight(added: dict[str, Any], where: str) -> float:
    """Return the weight of a row in the loss, from the cells of the columns of :func:`additions`.

    Raises:
        DataError: the weight is not a number from 0 to 2000.
    """
    for name, value in added.items():
        if meaning_of(name) == "weight" and value is not None and value != "":
            return _as_weight(value, f"{where}, column '{name}'")
    return 1.0


def refuse_faults(faults: npt.NDArray[np.integer[Any]], places: RowPlaces, column: str) -> None:
    """Raise a DataError if rows have no valid answer to learn.

    Args:
        faults: code of each row, shape (N,): 0, :data:`SILENT`, :data:`CALLS` or :data:`EMPTY`.
        places: places of the rows.
        column: column of the answers, for messages.
    """
    refuse_missing(faults == SILENT, places, column, "answer to learn")
    reasons = {
        CALLS: ("tool calls, which the model's chat template does not write",
                "Use a model whose chat template writes tool calls, or write the calls into the content"),
        EMPTY: ("an empty answer, of which only its end would be learned", "Fill or remove these answers"),
    }  # fmt: skip
    for code, (what, fix) in reasons.items():
        if count := int((faults == code).sum()):
            rows = places.listed(np.flatnonzero(faults == code))
            raise DataError(places.source, f"{count} of {len(faults)} rows have {what} ({rows})", fix=fix)


def count_unread(
    counts: Counter[str], messages: Sequence[Message], whole: str, write: Callable[[list[Message]], str | None], *,
    learn_all: bool = False,
) -> None:  # fmt: skip
    """Count the row in ``counts`` for each field of its turns that has no influence on its text, and for each role that
    only its template may know, whose turns are not learned.

    Args:
        counts: counts of :func:`encoding_notes`.
        messages: turns of the row.
        whole: text of the row.
        write: returns the text of other turns, or None if they are refused.
        learn_all: whether all tokens are learned.
    """
    roles = set() if learn_all else {str(m["role"]) for m in messages}.difference(_KNOWN_ROLES)
    counts.update(f"{_UNLEARNED}{ascii(role)[1:-1][:60]}" for role in roles)
    given = {key for m in messages for key, value in m.items() if value not in (None, "", [], {})}
    names = sorted(given.difference(_ALWAYS_READ))
    unread = names if names and write(_without_fields(messages, names)) == whole else []
    for name in () if unread or len(names) == 1 else names:  # of one field it is known by now
        if write(_without_fields(messages, [*unread, name])) == whole:
            unread = [*unread, name]
    counts.update(f"{_UNREAD}{ascii(name)[1:-1][:60]}" for name in unread)


def with_known_reasoning(messages: list[Message], template: str) -> list[Message]:
    """Return the messages with their reasoning under the name that ``template`` reads, if it reads another one."""
    found = [name for name in _REASONING if any(m.get(name) for m in messages)]
    known = [name for name in _REASONING if found and re.search(rf"[.'\"]{name}\b", template)]
    if not known or not set(found).difference(known):
        return messages

    def renamed(message: Message) -> Message:
        text = next((message[name] for name in (*known, *found) if message.get(name)), None)
        rest = {key: value for key, value in message.items() if key not in _REASONING}
        return rest if text is None else {**rest, known[0]: text}

    return [renamed(message) for message in messages]


def is_empty(message: Message) -> bool:
    """Return whether a turn has no content, tool calls or reasoning."""
    said = [value for key, value in message.items() if key not in ("role", "name", "weight")]
    return not any(value.strip() if isinstance(value, str) else value for value in said)


def _without_fields(messages: Sequence[Message], names: Sequence[str]) -> list[Message]:
    return [{key: value for key, value in m.items() if key not in names} for m in messages]


def encoding_notes(counts: dict[str, int], num_tokens: int, max_length: int) -> tuple[str, ...]:
    """Return notes on encoded rows: how many tokens are learned, and how many rows are left out and why."""
    notes = [f"{counts['num_learned']:,} of {num_tokens:,} tokens learned"]
    if counts["num_weightless"]:
        notes.append(f"{counts['num_weightless']} left out: their weight is 0")
    if counts["num_tools_lost"]:
        notes.append("the tools are not shown to the model: its chat template does not write them")
    unread = sorted(name.removeprefix(_UNREAD) for name in counts if name.startswith(_UNREAD))
    for name in [name for name in unread if name in _REASONING]:
        unread.remove(name)
        notes.append(f"the reasoning of answers ('{name}' in {counted(counts[_UNREAD + name], 'row')}) is left out: the"
                     " chat template does not write it. Write it into the content, or use another model")  # fmt: skip
    if unread:
        notes.append(f"field{'s' * (len(unread) > 1)} of turns not used: {first_of(unread, _MOST_NAMED)}")
    for name in sorted(name for name in counts if name.startswith(_UNLEARNED)):
        notes.append(f"turns of '{name.removeprefix(_UNLEARNED)}' ({counted(counts[name], 'row')}) are not learned:"
                     " answers have the role assistant")  # fmt: skip
    if counts["num_answers_cut"]:
        notes.append(f"{counts['num_answers_cut']} left out: their answers begin after {max_length} tokens")
    return tuple(notes)


def as_messages(value: Any, where: str) -> list[Message]:
    """Convert a cell of a column of conversations to messages with ``role`` and ``content``.

    Turns may also have ``from`` and ``value``. The content of a turn with tool calls may be None.

    Raises:
        DataError: the cell does not hold messages.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a csv file is JSON text
        value = _parsed(value, where)
    messages = [_as_message(given, where) for given in (value if isinstance(value, (list, tuple)) else [value])]
    if not messages:
        raise DataError(where, "the conversation has no turns", fix="Remove the row")
    return messages


def as_text(value: Any, where: str) -> str:
    """Return the text of a cell, "" for a missing one; raise a DataError for a list or an object."""
    if isinstance(value, (list, tuple, dict)):
        raise DataError(where, f"got {str(value)[:120]!r}", allowed="a text", fix="Write a text, or name other columns")
    return "" if value is None else str(value)


def _as_turns(value: Any, role: str, where: str) -> list[Message]:
    """Convert a cell to messages; a text that is not the JSON text of messages is a single turn of ``role``."""
    is_turn = isinstance(value, str) and not _is_written(value)
    return [{"role": role, "content": value}] if is_turn else as_messages(value, where)


def _is_written(text: str) -> bool:
    """Return whether a text is the JSON text of messages, even if it is cut short."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return _CUT_TURNS.match(text) is not None
    return found == [] or not _keys(found).isdisjoint(_ROLE)


def last_answer(value: Any, *, learned: bool) -> str:
    """Return the content of the assistant's last turn in a cell, or of the last one that is learned; "" for none."""
    said = [m for m in _as_turns(value, "assistant", "task.answer") if m["role"] == "assistant"]
    texts = [m["content"] or "" for m in said if not learned or m.get("weight", 1.0)]
    return str(texts[-1]) if texts else ""


def as_history(value: Any, where: str) -> list[Message]:
    """Convert earlier turns to messages; ``value`` holds messages, or pairs of a user's and an assistant's text."""
    turns: list[Message] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list) and len(part) == 2 and all(isinstance(text, str) for text in part):
            turns += [{"role": "user", "content": part[0]}, {"role": "assistant", "content": part[1]}]
        elif isinstance(part, dict):
            turns.append(_as_message(part, where))
        else:
            raise DataError(where, f"an earlier turn is {str(part)[:120]!r}",
                            allowed="pairs of texts (user, assistant), or messages with role and content")  # fmt: skip
    return turns


def _fits(table: pa.Table, column: str) -> bool:
    """Return whether the content of a column matches its name."""
    kind, meaning = table.schema.field(column).type, meaning_of(column)
    if meaning == "weight":
        return _are_numbers(table, column)
    is_nested = is_json(kind) or is_list(kind) or bool(pa.types.is_struct(kind))
    return (is_nested and meaning != "system") or (is_string(kind) and meaning != "history")


def _as_message(given: Any, where: str) -> Message:
    turn: dict[str, Any] = given if isinstance(given, dict) else {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    kept = {key: value for key, value in turn.items() if value is not None and key not in _OWN_KEYS}
    name = role.strip().lower() if isinstance(role, str) else ""
    weights = [float(kept.pop(flag)) for flag in _FLAGS if isinstance(kept.get(flag), int) and kept[flag] in (0, 1)]
    if turn.get("weight") is not None:
        weights.append(_as_weight(turn["weight"], where))
        if weights[-1] not in (0.0, 1.0):
            raise DataError(where, f"a turn has weight {turn['weight']!r}", allowed="0 (not learned) or 1",
                            fix="Put other weights into a column 'weight' of the row")  # fmt: skip
    if weights:
        kept["weight"] = min(weights)
    if name == "function_call" and isinstance(content, str):  # a tool call in ShareGPT's format
        kept["tool_calls"] = _as_calls(_parsed(content, where))
        name, content = "assistant", None
    elif turn.get("function_call") is not None:  # OpenAI's format before it allowed several calls
        kept["tool_calls"] = _as_calls(turn["function_call"])
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    is_call = bool(kept.get("tool_calls"))
    if not name or not (isinstance(content, str) or (content is None and is_call)):
        raise DataError(where, f"a turn of the conversation is {str(given)[:120]!r}",
                        allowed=f"{_ALLOWED}; content may be null beside tool_calls")  # fmt: skip
    if not is_call:
        kept.pop("tool_calls", None)
    elif not isinstance(kept["tool_calls"], list):
        raise DataError(where, f"tool_calls are {str(kept['tool_calls'])[:120]!r}", allowed="a list of calls")
    # Unknown roles are unchanged, because the template may support them.
    known = _ROLES.get(name, name if name in _KNOWN_ROLES else role)
    return {"role": known, "content": content, **kept}


def _as_weight(value: Any, where: str) -> float:
    """Convert a cell to a loss weight; raise a DataError if it is not a number from 0 to the largest weight."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 <= number <= _LARGEST_WEIGHT:
        raise DataError(where, f"got weight {value!r}", allowed=f"a number from 0 (not learned) to {_LARGEST_WEIGHT}")
    return number


def _as_calls(value: Any) -> list[Any]:
    calls = value if isinstance(value, list) else [value]
    return [call if "function" in call else {"type": "function", "function": call}
            for call in calls if isinstance(call, dict)]  # fmt: skip


def _as_tool(tool: Any) -> Any:
    """Convert a tool to the form that chat templates expect; OpenAI's older ``functions`` lack the outer object."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _as_objects(value: Any, where: str) -> list[Any]:
    """Convert a list of objects, a single object, or the JSON text of either to a list."""
    value = _parsed(value, where) if isinstance(value, str) else value
    listed = value if isinstance(value, list) else [] if value is None else [value]
    listed = [_parsed(part, where) if isinstance(part, str) else part for part in listed]
    if not all(isinstance(part, dict) for part in listed):
        raise DataError(where, f"got {str(value)[:120]!r}", allowed="a list of objects, or its JSON text")
    return listed


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"not valid JSON: {text[:120]!r} ({error})", fix="Correct the row") from error


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _are_numbers(table: pa.Table, column: str) -> bool:
    kind = table.schema.field(column).type
    if not is_string(kind):
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    try:
        return all(float(value) >= 0 for value in cells(table, column) if value is not None)
    except ValueError:
        return False
