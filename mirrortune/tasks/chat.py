# SPDX-License-Identifier: Apache-2.0
"""Tokenise conversations, prompts and plain texts, and determine which tokens are learned as answers.

The tokenizer's chat template formats a conversation. The assistant's answers are found by the ``{% generation %}``
marks of the template, if it has them, and otherwise by prefix: both the text of the turns before an answer, with the
generation prompt, and the text of the turns including the answer are prefixes of the complete text; the answer lies
between their ends. If the conversation begins with the assistant, there is no prompt; the first answer then begins
where the text changes if its content is replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from mirrortune.data.files.arrow import Columns
from mirrortune.errors import DataError, first_line
from mirrortune.tasks.conversations import (
    Conversation,
    Message,
    count_unread,
    is_empty,
    meaning_of,
    row_conversation,
    with_known_reasoning,
)  # fmt: skip

Encoding = tuple[list[int], list[bool]]
"""Token ids of a row, and whether each token is learned."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Contents with different first and last characters, so that the common parts of the formatted texts belong to the
# template.
_PROBES = ("0", "1")
# Limits of a conversation whose answers are found by prefix, which takes quadratic time in its length.
_MOST_TURNS = 1000
_MOST_CHARACTERS = 10**9


class LostAnswerError(DataError):
    """An answer has nothing to learn.

    Attributes:
        kind: ``"calls"`` if the template omits its tool calls; ``"empty"`` if only its end token would be learned.
    """

    def __init__(self, where: str, kind: Literal["calls", "empty"]) -> None:
        self.kind = kind
        problem = {"calls": "the model's chat template does not write tool calls",
                   "empty": "an answer is empty, so that only its end would be learned"}[kind]  # fmt: skip
        super().__init__(where, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReader:
    """A tokenizer, and further arguments of the model's ``forward``.

    Attributes:
        tokenizer: a transformers tokenizer.
        is_chat: whether the tokenizer's chat template formats rows.
        switches: additional arguments of the model's ``forward``.
        takes_positions: whether ``forward`` accepts ``position_ids``, so that rows can be packed.
    """

    tokenizer: Any
    is_chat: bool
    switches: dict[str, bool] = field(default_factory=dict)
    takes_positions: bool

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer and the tokens that end generation, which include the learned end of a turn."""
        self.tokenizer.save_pretrained(folder)
        if self.is_chat:
            save_turn_ends(self.tokenizer, Path(folder))


def encode_conversation(
    tokenizer: Any, conversation: Conversation, where: str, *, learn_all: bool = False, may_be_empty: bool = False,
    counts: Counter[str] | None = None,
) -> Encoding:  # fmt: skip
    """Tokenise a conversation with the tokenizer's chat template; the assistant's turns are learned.

    Args:
        tokenizer: tokenizer with a chat template.
        conversation: turns, and further arguments of the template.
        where: place of the row, for messages.
        learn_all: whether all tokens are learned.
        may_be_empty: whether empty answers are allowed, as in evaluation.
        counts: counts of rows, to which those of :func:`count_unread` are added.

    Raises:
        LostAnswerError: only the end of an answer would be learned, or the template omits its tool calls.
        DataError: the template refuses the turns, or it has no marks and its turns are not prefixes.
    """
    talk, whole = _written(tokenizer, conversation, where)
    if counts is not None:
        count_unread(counts, talk.messages, whole, partial(_text_of, tokenizer, talk=talk), learn_all=learn_all)
    if learn_all:
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids), [True] * len(ids)
    if _MARKS.search(_template(tokenizer)) and not talk.given:
        made = _apply(tokenizer, talk.messages, talk, where, tokenize=True, return_dict=True,
                      return_assistant_tokens_mask=True)  # fmt: skip
        if not may_be_empty and any(m["role"] == "assistant" and is_empty(m) for m in talk.messages):
            raise LostAnswerError(where, "empty")
        is_last = talk.messages[-1]["role"] == "assistant"
        learned = [bool(m) for m in made["assistant_masks"]]
        return _with_ends(tokenizer, list(made["input_ids"]), learned, is_last=is_last)
    special = special_tokens(tokenizer)
    spans = dict(_answer_spans(tokenizer, talk, whole, where))
    for turn, (low, high) in spans.items():
        says_nothing = is_empty(talk.messages[turn]) or not _without(special, whole[low:high]).strip()
        if says_nothing and not may_be_empty:
            raise LostAnswerError(where, "empty")
    ids, learned = encode_spans(tokenizer, whole, list(spans.values()), add_special_tokens=False)
    last = spans.get(len(talk.messages) - 1)
    if last and not whole[: last[1]].endswith(special) and not any(token in whole[last[1] :] for token in special):
        return [*ids, tokenizer.eos_token_id], [*learned, True]  # the template does not end the answer
    return ids, learned


def _with_ends(tokenizer: Any, ids: list[int], learned: list[bool], *, is_last: bool) -> Encoding:
    """Learn the end of every answer too, which the marks of some templates leave out.

    Args:
        tokenizer: tokenizer of the ids.
        ids: ids of a conversation.
        learned: whether each token lies between the marks.
        is_last: whether an answer ends the conversation; without an end of its own, it gets the end token.
    """
    added = tokenizer.added_tokens_decoder
    ends = [i for i, flag in enumerate(learned, start=1) if flag and not any(learned[i : i + 1])]
    for end in ends:
        last, behind = end - 1, end
        while last and learned[last - 1] and not tokenizer.decode(ids[last]).strip():
            last -= 1
        if ids[last] == tokenizer.eos_token_id or ids[last] in (known := turn_end_ids(tokenizer)):
            continue
        while behind < len(ids) and ids[behind] not in known and not tokenizer.decode(ids[behind]).strip():
            behind += 1
        if behind < len(ids) and ids[behind] in known:
            learned[end : behind + 1] = [True] * (behind + 1 - end)
        elif is_last and end == ends[-1] and not any(i in added for i in ids[end:]):
            if ids[last] in added and added[ids[last]].special:
                continue  # another end, as after a call of a tool
            return [*ids, tokenizer.eos_token_id], [*learned[:end], *[True] * (len(ids) + 1 - end)]
    return ids, learned


def num_tools_lost(
    columns: Columns, names: Sequence[str], reader: TextReader, layout: str, system: str, source: str
) -> int:
    """Return 1 if the chat template omits the tools of the first row that has tools, else 0.

    Args:
        columns: cells of the rows by column; the last columns are those of ``names``.
        names: names of the columns that add to conversations.
        reader: reader with the tokenizer.
        layout: layout of the rows.
        system: system turn for conversations without one.
        source: source of the rows, for messages.
    """
    with_tools = [name for name in names if meaning_of(name) == "tools"]
    count = len(columns) - len(names)
    for row in zip(*columns, strict=True) if with_tools else ():
        added = dict(zip(names, row[count:], strict=True))
        if any(added[name] for name in with_tools):
            if not reader.is_chat:
                return 1
            talk = row_conversation(layout, row[:count], added, source, system)
            if talk.options.get("tools"):
                return int(not writes_tools(reader.tokenizer, talk))
    return 0


def template_notes(
    rows: Iterable[Sequence[Any]], names: Sequence[str], reader: TextReader, layout: str, system: str, source: str
) -> tuple[str, ...]:  # fmt: skip
    """Return notes on what the chat template does to the questions and the last learned answers of rows.

    Some templates open the turn to be generated with more than they write before an answer, such as ``<think>``. Some
    leave out the reasoning in an answer, or all turns of a role that they do not know.

    Args:
        rows: cells of rows; the last of each are those of ``names``.
        names: names of the columns that add to conversations.
        reader: reader with the tokenizer.
        layout: layout of the rows.
        system: system turn for conversations without one.
        source: source of the rows, for messages.

    Returns:
        A note on the first generation prompt that the trained text lacks, and on the first turn of each kind.
    """
    found: dict[str, str] = {}
    for row in rows if reader.is_chat else ():
        own = row[: len(row) - len(names)]
        added = dict(zip(names, row[len(own) :], strict=True))
        talk, whole = _written(reader.tokenizer, row_conversation(layout, own, added, source, system), source)
        answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant" and i not in talk.given]
        if not answers:
            continue
        if lacking := _lacking_prompt(reader.tokenizer, talk, answers[-1], whole):
            found.setdefault("prompt", f"trained and asked differently: the chat template's generation prompt is "
                             f"{lacking[:80]!r}, which these answers do not follow in training. Begin them so, or "
                             "correct the template")  # fmt: skip
        written = "".join(whole.split())
        asked = [m for m in talk.messages if m["role"] not in ("assistant", "tool")]  # those are often rewritten
        for message in (*asked, talk.messages[answers[-1]]):
            said, role = str(message["content"] or ""), message["role"]
            if "".join(said.split()) not in written:
                what = "answers" if role == "assistant" else f"turns of '{role}'"
                found.setdefault(what, f"the chat template leaves out or changes parts of {what}, as of {said[:80]!r}")
    return tuple(found.values())


def _lacking_prompt(tokenizer: Any, talk: Conversation, turn: int, whole: str) -> str:
    """Return the generation prompt of a turn if the text of the conversation does not begin with its prompt, or ""."""
    before = talk.messages[:turn]
    prompt = _text_of(tokenizer, before, talk, add_generation_prompt=True) if before else None
    if prompt is None or whole.startswith(prompt):
        return ""
    plain = _text_of(tokenizer, before, talk)
    return prompt[_in_common(prompt, whole if plain is None else plain) :]


def encode_continuation(tokenizer: Any, prompt: str, completion: str, before: Sequence[Message] = ()) -> Encoding:
    """Tokenise a prompt, its completion and the end token; the completion and the end token are learned.

    The texts are concatenated, with a line break between them if neither has white space there. Earlier turns come
    first, each followed by an empty line except for questions; their answers are learned unless their weight is 0.
    """
    text, spans = "", []
    turns = [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    for turn in turns:
        said = turn["content"] or ""
        if turn["role"] == "assistant":
            if text and said and not text[-1].isspace() and not said[0].isspace():
                text += "\n"
            spans += [(len(text), len(text) + len(said))] if turn.get("weight", 1.0) else []
        text += said if turn["role"] == "user" or turn is turns[-1] else f"{said}\n\n"
    ids, learned = encode_spans(tokenizer, text, spans)
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add the end token
        ids, learned = ids[:-1], learned[:-1]
    return [*ids, tokenizer.eos_token_id], [*learned, True]


def encode_spans(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, add_special_tokens: bool = True
) -> Encoding:
    """Tokenise ``text``; the tokens that overlap one of ``spans`` (begin and end in characters) are learned."""
    made = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    learned = [any(start < high and end > low for low, high in spans) for start, end in made["offset_mapping"]]
    return list(made["input_ids"]), learned


def encode_prompt(tokenizer: Any, conversation: Conversation, where: str) -> list[int]:
    """Tokenise the turns before an answer with the tokenizer's chat template, including its generation prompt.

    Raises:
        DataError: the template refuses the turns, or omits their tool calls.
    """
    _, text = _written(tokenizer, conversation, where, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def writes_system(tokenizer: Any, system: str) -> bool:
    """Return whether the template writes a system turn; some templates refuse it, and some omit it."""
    messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    text = _text_of(tokenizer, messages, Conversation(messages=messages))
    return text is not None and system.strip() in text


def writes_tools(tokenizer: Any, talk: Conversation) -> bool:
    """Return whether the template writes the tools of a conversation; True for a conversation that it refuses."""
    whole = _text_of(tokenizer, talk.messages, talk)
    options = {key: value for key, value in talk.options.items() if key != "tools"}
    return whole is None or _text_of(tokenizer, talk.messages, replace(talk, options=options)) != whole


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the end token, and the added token that the template writes after answers."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys((*found, *_written_end(tokenizer, _template(tokenizer)))))


@lru_cache(maxsize=1)
def _written_end(tokenizer: Any, template: str) -> tuple[int, ...]:
    """Return the id of the added token that the template writes after answers, if it writes one."""
    written = []
    for probe in _PROBES:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
        written.append(_apply(tokenizer, messages, Conversation(messages=messages), "chat template", tokenize=False))
    if written[0] == written[1]:
        return ()
    behind = written[0][len(written[0]) - _in_common(written[0][::-1], written[1][::-1]) :]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return tuple(i for i in ids[:2] if i in tokenizer.added_tokens_decoder)[:1]


def save_turn_ends(tokenizer: Any, folder: Path) -> None:
    """Add the tokens that end a turn to the end tokens in ``generation_config.json`` of a model folder."""
    path = folder / "generation_config.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = data.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    ends = [*known, *(i for i in turn_end_ids(tokenizer) if i not in known)]
    data["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of all special tokens, including those without a role such as ``eos_token``."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*tokenizer.all_special_tokens, *added)))


def has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template that writes anything."""
    template = tokenizer.chat_template
    return bool(template.strip() if isinstance(template, str) else template)


def _template(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template())


def _apply(tokenizer: Any, messages: list[Message], talk: Conversation, where: str, **options: Any) -> Any:
    """Apply the template to ``messages`` with the other arguments of ``talk``."""
    import jinja2  # noqa: PLC0415

    try:
        return tokenizer.apply_chat_template(messages, **{**talk.options, **options})
    except jinja2.TemplateSyntaxError as error:
        problem = f"the model's chat template does not parse (line {error.lineno}: {first_line(error, 200)})"
        fix = "Correct chat_template.jinja, or chat_template in tokenizer_config.json, in the model's folder"
        raise DataError(where, problem, fix=fix) from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        roles = ", ".join(str(m["role"]) for m in messages[:8])
        reason = first_line(error, 200)
        raise DataError(
            where, f"the model's chat template refuses a conversation of {roles} ({reason})",
            fix="Correct the order of turns, or fold the system turn into the first user turn",
        ) from error  # fmt: skip


def _text_of(tokenizer: Any, messages: list[Message], talk: Conversation, **options: Any) -> str | None:
    """Return the text that the template writes, or None if it refuses the messages."""
    try:
        return str(_apply(tokenizer, messages, talk, "", tokenize=False, **options))
    except DataError:
        return None


def _written(tokenizer: Any, talk: Conversation, where: str, **options: Any) -> tuple[Conversation, str]:
    """Return a conversation with its tool calls in a form that the template supports, and the formatted text.

    Raises:
        LostAnswerError: the template omits tool calls.
        DataError: the template refuses the conversation.
    """
    talk = replace(talk, messages=with_known_reasoning(talk.messages, _template(tokenizer)))
    if not any("tool_calls" in message for message in talk.messages):
        return talk, _apply(tokenizer, talk.messages, talk, where, tokenize=False, **options)
    forms = [replace(talk, messages=messages) for messages in _forms(talk.messages)]
    texts = [_text_of(tokenizer, form.messages, form, **options) for form in forms]
    written = [(form, text) for form, text in zip(forms, texts, strict=True) if text is not None]
    if not written:
        _apply(tokenizer, forms[0].messages, forms[0], where, tokenize=False)  # raises the error
    with_calls = [(form, text) for form, text in written if _writes_calls(tokenizer, form, text, **options)]
    if not with_calls:
        raise LostAnswerError(where, "calls")
    return next((pair for pair in with_calls if _is_understood(tokenizer, *pair, **options)), with_calls[-1])


def _writes_calls(tokenizer: Any, talk: Conversation, text: str, **options: Any) -> bool:
    """Return whether the text that a template writes depends on the tool calls."""
    bare = [{**m, "content": m["content"] or ""} for m in talk.messages]
    bare = [{key: value for key, value in m.items() if key != "tool_calls"} for m in bare]
    return _text_of(tokenizer, bare, talk, **options) != text


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the forms in which templates expect tool calls, that of transformers first.

    Arguments are a mapping, or JSON text as in OpenAI's format; content is null or empty; ids are unchanged, or nine
    letters as Mistral's templates require.
    """
    for short_ids in (False, True):
        for as_text in (False, True):
            for content in (None, ""):
                yield [_formed(m, as_text=as_text, content=content, short_ids=short_ids) for m in messages]


def _formed(message: Message, *, as_text: bool, content: str | None, short_ids: bool) -> Message:
    made = dict(message)
    if short_ids and "tool_call_id" in made:
        made["tool_call_id"] = _short_id(made["tool_call_id"])
    if "tool_calls" not in made:
        return made
    if made["content"] is None:
        made["content"] = content
    calls = []
    for number, given in enumerate(made["tool_calls"]):
        call = dict(given) if isinstance(given, dict) else {}
        inner = call["function"] = dict(call.get("function") or {})
        inner["arguments"] = _arguments(inner.get("arguments"), as_text=as_text)
        if short_ids:
            call["id"] = _short_id(call.get("id", number))
        calls.append(call)
    return {**made, "tool_calls": calls}


def _arguments(value: Any, *, as_text: bool) -> Any:
    if as_text:
        return value if isinstance(value, str) else json.dumps({} if value is None else value, ensure_ascii=False)
    try:
        return json.loads(value) if isinstance(value, str) else {} if value is None else value
    except (ValueError, RecursionError):
        return value


def _short_id(value: Any) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()[:9]


def _is_understood(tokenizer: Any, talk: Conversation, text: str, **options: Any) -> bool:
    """Return whether a template wrote values correctly: no null as ``None``, and no mapping in Python's notation."""
    calls = [call for m in talk.messages for call in m.get("tool_calls", ())]
    mappings = [call["function"]["arguments"] for call in calls if call["function"]["arguments"]]
    if any(isinstance(value, dict) and str(value) in text for value in mappings):
        return False
    if all(m["content"] is not None for m in talk.messages):
        return True
    named = [{**m, "content": "None" if m["content"] is None else m["content"]} for m in talk.messages]
    return _text_of(tokenizer, named, talk, **options) != text


def _answer_spans(tokenizer: Any, talk: Conversation, whole: str, where: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the learned turns of the assistant, and their spans in the text of the complete conversation."""
    special, messages = special_tokens(tokenizer), talk.messages
    if len(messages) > _MOST_TURNS or len(messages) * len(whole) > _MOST_CHARACTERS:
        raise DataError(
            where, f"a conversation of {len(messages):,} turns and {len(whole):,} characters: all turns before an"
            " answer are formatted again to find it",
            allowed=f"{_MOST_TURNS:,} turns, and {_MOST_CHARACTERS:,} as turns times characters",
            fix="Split it, use a template with {% generation %} marks, or task.loss_on=all",
        )  # fmt: skip
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i in talk.given:
            continue
        is_last = i == len(messages) - 1
        answered = whole if is_last else _apply(tokenizer, messages[: i + 1], talk, where, tokenize=False)
        begin = _begin(tokenizer, talk, i, answered)
        if not whole.startswith(answered) or begin is None:
            raise DataError(
                where, f"the model's chat template writes turn {i + 1} differently when others follow, so that its"
                " answer cannot be found",
                allowed="a template whose turns stay as they are, or one with {% generation %} marks",
                fix="Use conversations of one answer, or task.loss_on=all",
            )  # fmt: skip
        end = len(answered.rstrip())
        # White space after the token that ends a turn belongs to the template, not to the answer.
        yield i, (begin, end if answered[:end].endswith(special) else len(answered))


def _begin(tokenizer: Any, talk: Conversation, turn: int, answered: str) -> int | None:
    """Return where an answer begins in the text that ends with it; None if the text of the turns before it differs."""
    before = talk.messages[:turn]
    if before:
        prompt = _text_of(tokenizer, before, talk, add_generation_prompt=True)
        if prompt is not None and answered.startswith(prompt):
            return len(prompt)
        plain = _text_of(tokenizer, before, talk)
        if plain is not None and not answered.startswith(plain):
            return None
    # Without a prompt, the answer begins where the text would change with another answer.
    said = str(talk.messages[turn]["content"] or "").lstrip()
    probe = next(text for text in _PROBES if not said.startswith(text))
    other = _text_of(tokenizer, [*before, {"role": "assistant", "content": probe}], talk)
    return None if other is None else _in_common(answered, other)


def _without(tokens: Sequence[str], text: str) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


def _in_common(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
