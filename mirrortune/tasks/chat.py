# SPDX-License-Identifier: Apache-2.0
"""Conversations, prompts and plain texts -> token ids, and which of them are the model's own words.

A conversation is written by the tokenizer's own template. What the assistant says is known from the template's
``{% generation %}`` marks where it has them, and otherwise by prefix: the text up to a turn, with the prompt for an
answer, is a prefix of the whole, and so is the text with the answer; what lies between is the answer. Where there is no
such prompt (the conversation begins with the assistant), an answer begins where its content begins: where the text
changes when another content stands there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mirrortune.errors import DataError
from mirrortune.tasks.conversations import Conversation, Message

Encoding = tuple[list[int], list[bool]]
"""Token ids of a row, and whether each is to be learned as an answer."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stanford Alpaca's wording, which models without a chat template are commonly tuned on.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
# Contents that share neither their first nor their last character with each other: what they have in common when they
# are written is the template's.
_PROBES = ("0", "1")


class LostAnswerError(DataError):
    """An answer of which the model would learn no word.

    Attributes:
        kind: ``"calls"``, the template does not write its tool calls; ``"empty"``, only its end would be learned.
    """

    def __init__(self, where: str, kind: Literal["calls", "empty"]) -> None:
        self.kind = kind
        problem = {"calls": "the model's chat template does not write tool calls",
                   "empty": "an answer is empty, so that only its end would be learned"}[kind]  # fmt: skip
        super().__init__(where, problem)


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of one row of instruction and input, in Stanford Alpaca's words."""
    if not context.strip():
        return f"{_ALPACA.format('')}### Instruction:\n{instruction}\n\n### Response:\n"
    more = ", paired with an input that provides further context"
    return f"{_ALPACA.format(more)}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def encode_conversation(
    tokenizer: Any, conversation: Conversation, where: str, *, learn_all: bool = False, may_be_empty: bool = False
) -> Encoding:
    """Tokens of a conversation in the tokenizer's own template; the assistant's turns are the answers.

    Args:
        tokenizer: has a chat template.
        conversation: its turns, and the template's other arguments.
        where: the row, for messages.
        learn_all: everything is learned, so that answers need not be told from the rest.
        may_be_empty: answers may be empty (rows that are not learned from).

    Raises:
        LostAnswerError: an answer of which only the end would be learned, or whose tool calls are not written.
        DataError: turns that the template refuses, or a template without marks whose turns are no prefixes.
    """
    talk, whole = _written(tokenizer, conversation, where)
    if learn_all:
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids), [True] * len(ids)
    if _MARKS.search(_template(tokenizer)) and not talk.given:
        made = _apply(tokenizer, talk.messages, talk, where, tokenize=True, return_dict=True,
                      return_assistant_tokens_mask=True)  # fmt: skip
        if not may_be_empty and any(m["role"] == "assistant" and _is_empty(m) for m in talk.messages):
            raise LostAnswerError(where, "empty")
        return list(made["input_ids"]), [bool(flag) for flag in made["assistant_masks"]]
    special = special_tokens(tokenizer)
    spans = dict(_answer_spans(tokenizer, talk, whole, where))
    for turn, (low, high) in spans.items():
        says_nothing = _is_empty(talk.messages[turn]) or not _without(special, whole[low:high]).strip()
        if says_nothing and not may_be_empty:
            raise LostAnswerError(where, "empty")
    ids, learned = encode_spans(tokenizer, whole, list(spans.values()), add_special_tokens=False)
    last = spans.get(len(talk.messages) - 1)
    if last and not whole[: last[1]].endswith(special) and not any(token in whole[last[1] :] for token in special):
        return [*ids, tokenizer.eos_token_id], [*learned, True]  # nothing of the template's ends the answer
    return ids, learned


def encode_continuation(tokenizer: Any, prompt: str, completion: str, before: Sequence[Message] = ()) -> Encoding:
    """Tokens of a prompt and its completion (which is the answer), and the end token.

    They are joined as they stand; a line break is put between them where neither brings white space. The turns before
    stand in front of them, each with an empty line behind it but for questions; answers among them are learned.
    """
    text, spans = "", []
    turns = [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    for turn in turns:
        said = turn["content"] or ""
        if turn["role"] == "assistant":
            if text and said and not text[-1].isspace() and not said[0].isspace():
                text += "\n"
            spans.append((len(text), len(text) + len(said)))
        text += said if turn["role"] == "user" or turn is turns[-1] else f"{said}\n\n"
    ids, learned = encode_spans(tokenizer, text, spans)
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it themselves
        ids, learned = ids[:-1], learned[:-1]
    return [*ids, tokenizer.eos_token_id], [*learned, True]


def encode_spans(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, add_special_tokens: bool = True
) -> Encoding:
    """Tokens of ``text``; those that share a character with one of ``spans`` (first, behind last) are answers."""
    made = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    learned = [any(start < high and end > low for low, high in spans) for start, end in made["offset_mapping"]]
    return list(made["input_ids"]), learned


def writes_tools(tokenizer: Any, talk: Conversation) -> bool:
    """Whether the template writes the tools of a conversation that has some; a refused conversation is not asked."""
    whole = _text_of(tokenizer, talk.messages, talk)
    options = {key: value for key, value in talk.options.items() if key != "tools"}
    return whole is None or _text_of(tokenizer, talk.messages, replace(talk, options=options)) != whole


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the end token, and the added token that the template puts behind an answer."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = []
    for probe in _PROBES:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
        written.append(_apply(tokenizer, messages, Conversation(messages=messages), "chat template", tokenize=False))
    if written[0] != written[1]:
        behind = written[0][len(written[0]) - _in_common(written[0][::-1], written[1][::-1]) :]
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        found += [i for i in ids[:2] if i in tokenizer.added_tokens_decoder][:1]
    return list(dict.fromkeys(found))


def save_turn_ends(tokenizer: Any, folder: Path) -> None:
    """Make ``generation_config.json`` of a model folder stop at the end of a turn, besides where it stopped before."""
    path = folder / "generation_config.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = data.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    ends = [*known, *(i for i in turn_end_ids(tokenizer) if i not in known)]
    data["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens, those that have no name (``eos_token``, ...) among them."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*tokenizer.all_special_tokens, *added)))


def _template(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template())


def _apply(tokenizer: Any, messages: list[Message], talk: Conversation, where: str, **options: Any) -> Any:
    """What the template makes of ``messages`` with the other arguments of ``talk``."""
    import jinja2  # noqa: PLC0415

    try:
        return tokenizer.apply_chat_template(messages, **{**talk.options, **options})
    except (jinja2.TemplateError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        roles = ", ".join(str(m["role"]) for m in messages[:8])
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            where, f"the model's chat template refuses a conversation of {roles} ({reason})",
            fix="Correct the order of turns, or fold the system turn into the first user turn",
        ) from error  # fmt: skip


def _text_of(tokenizer: Any, messages: list[Message], talk: Conversation, **options: Any) -> str | None:
    """The text that the template writes, or None if it refuses."""
    try:
        return str(_apply(tokenizer, messages, talk, "", tokenize=False, **options))
    except DataError:
        return None


def _written(tokenizer: Any, talk: Conversation, where: str) -> tuple[Conversation, str]:
    """A conversation with its calls in a form that the template understands, and the text that it writes.

    Raises:
        LostAnswerError: the template leaves calls out.
        DataError: it refuses the conversation.
    """
    if not any("tool_calls" in message for message in talk.messages):
        return talk, _apply(tokenizer, talk.messages, talk, where, tokenize=False)
    forms = [replace(talk, messages=messages) for messages in _forms(talk.messages)]
    written = [(form, text) for form in forms if (text := _text_of(tokenizer, form.messages, form)) is not None]
    if not written:
        _apply(tokenizer, forms[0].messages, forms[0], where, tokenize=False)  # which refuses it
    with_calls = [(form, text) for form, text in written if _writes_calls(tokenizer, form, text)]
    if not with_calls:
        raise LostAnswerError(where, "calls")
    return next((pair for pair in with_calls if _is_understood(tokenizer, *pair)), with_calls[-1])


def _writes_calls(tokenizer: Any, talk: Conversation, text: str) -> bool:
    """Whether the text that a template writes depends on the calls."""
    bare = [{**m, "content": m["content"] or ""} for m in talk.messages]
    bare = [{key: value for key, value in m.items() if key != "tool_calls"} for m in bare]
    return _text_of(tokenizer, bare, talk) != text


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The forms in which templates expect calls, transformers' own first: a mapping of arguments, or OpenAI's text of
    it; null or an empty text as the content beside calls; ids as they are, or nine letters as Mistral's want them.
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
    except ValueError:
        return value


def _short_id(value: Any) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()[:9]


def _is_understood(tokenizer: Any, talk: Conversation, text: str) -> bool:
    """Whether a template wrote values as they are meant, and neither null as ``None`` nor a mapping as Python does."""
    calls = [call for m in talk.messages for call in m.get("tool_calls", ())]
    mappings = [call["function"]["arguments"] for call in calls if call["function"]["arguments"]]
    if any(isinstance(value, dict) and str(value) in text for value in mappings):
        return False
    if all(m["content"] is not None for m in talk.messages):
        return True
    named = [{**m, "content": "None" if m["content"] is None else m["content"]} for m in talk.messages]
    return _text_of(tokenizer, named, talk) != text


def _answer_spans(tokenizer: Any, talk: Conversation, whole: str, where: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Turns of the assistant that are learned, and where they stand in the text of the whole conversation."""
    special, messages = special_tokens(tokenizer), talk.messages
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i in talk.given:
            continue
        is_last = i == len(messages) - 1
        answered = whole if is_last else _apply(tokenizer, messages[: i + 1], talk, where, tokenize=False)
        begin = _begin(tokenizer, talk, i, answered)
        if not whole.startswith(answered) or begin is None:
            raise DataError(
                where, f"the model's chat template writes turn {i + 1} differently when others follow, so that its"
                " answer cannot be told from the rest",
                allowed="a template whose turns stay as they are, or one with {% generation %} marks",
                fix="Use conversations of one answer, or task.loss_on=all",
            )  # fmt: skip
        end = len(answered.rstrip())
        # White space behind the token that ends a turn belongs to the template, not to the answer.
        yield i, (begin, end if answered[:end].endswith(special) else len(answered))


def _begin(tokenizer: Any, talk: Conversation, turn: int, answered: str) -> int | None:
    """Where an answer begins in the text that ends with it; None if what stands before is written differently."""
    before = talk.messages[:turn]
    if before:
        prompt = _text_of(tokenizer, before, talk, add_generation_prompt=True)
        if prompt is not None and answered.startswith(prompt):
            return len(prompt)
        plain = _text_of(tokenizer, before, talk)
        if plain is not None and not answered.startswith(plain):
            return None
    # No prompt asks for this answer: it begins where another one would make a difference.
    said = str(talk.messages[turn]["content"] or "").lstrip()
    probe = next(text for text in _PROBES if not said.startswith(text))
    other = _text_of(tokenizer, [*before, {"role": "assistant", "content": probe}], talk)
    return None if other is None else _in_common(answered, other)


def _is_empty(message: Message) -> bool:
    """Whether a turn has neither content, nor calls, nor thoughts."""
    said = [value for key, value in message.items() if key not in ("role", "name", "weight")]
    return not any(value.strip() if isinstance(value, str) else value for value in said)


def _without(tokens: Sequence[str], text: str) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


def _in_common(first: str, second: str) -> int:
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
