# SPDX-License-Identifier: Apache-2.0
"""Conversations, prompts and plain texts -> token ids, and which of them are the model's own words.

A conversation is written by the tokenizer's own template. What the assistant says is known from the template's
``{% generation %}`` marks where it has them, and otherwise by prefix: the text up to a turn, with the prompt for an
answer, is a prefix of the whole, and so is the text with the answer; what lies between is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirrortune.errors import DataError

Message = dict[str, Any]
Encoding = tuple[list[int], list[bool]]
"""Token ids of a row, and whether each is to be learned as an answer."""
# Names that data sets give the speakers.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stanford Alpaca's wording, which models without a chat template are commonly tuned on.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)


def as_messages(value: Any, where: str) -> list[Message]:
    """One cell of a column of conversations as messages with ``role`` and ``content``; ``from`` and ``value`` are taken
    too.

    Raises:
        DataError: anything else.
    """
    messages = []
    for given in value if isinstance(value, (list, tuple)) else [None]:
        turn: dict[str, Any] = given if isinstance(given, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(where, f"a turn of the conversation is {str(given)[:120]!r}",
                            allowed="role (system, user, assistant, ...) and content, both text")  # fmt: skip
        kept = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value")}
        messages.append({"role": _ROLES.get(role, role), "content": content, **kept})
    if not messages:
        raise DataError(where, "the conversation has no turns", fix="Remove the row")
    return messages


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of one row of instruction and input, in Stanford Alpaca's words."""
    if not context.strip():
        return f"{_ALPACA.format('')}### Instruction:\n{instruction}\n\n### Response:\n"
    more = ", paired with an input that provides further context"
    return f"{_ALPACA.format(more)}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def encode_conversation(tokenizer: Any, messages: list[Message], where: str) -> Encoding:
    """Tokens of a conversation in the tokenizer's own template; the assistant's turns are the answers.

    Raises:
        DataError: turns that the template refuses, or a template without marks whose turns are no prefixes.
    """
    if _MARKS.search(_template(tokenizer)):
        made = _apply(tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(flag) for flag in made["assistant_masks"]]
    whole = _apply(tokenizer, messages, where, tokenize=False)
    spans = list(_answer_spans(tokenizer, messages, whole, where))
    ids, learned = encode_spans(tokenizer, whole, spans, add_special_tokens=False)
    special = tuple(tokenizer.all_special_tokens)
    if (
        spans
        and messages[-1]["role"] == "assistant"
        and not (whole[: spans[-1][1]].endswith(special) or any(token in whole[spans[-1][1] :] for token in special))
    ):
        return [*ids, tokenizer.eos_token_id], [*learned, True]  # nothing of the template's ends the answer
    return ids, learned


def encode_continuation(tokenizer: Any, prompt: str, completion: str) -> Encoding:
    """Tokens of a prompt and its completion (which is the answer), and the end token.

    They are joined as they stand; a line break is put between them where neither brings white space.
    """
    if prompt and completion and not prompt[-1].isspace() and not completion[0].isspace():
        prompt += "\n"
    ids, learned = encode_spans(tokenizer, prompt + completion, [(len(prompt), len(prompt) + len(completion))])
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


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the end token, and the special token that the template puts behind an answer."""
    found = [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = _apply(tokenizer, messages, "chat template", tokenize=False)
    behind = whole[whole.rindex("b") + 1 :]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    found += [i for i in ids[:2] if i in _special_ids(tokenizer)][:1]
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


def _template(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template())


def _special_ids(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _apply(tokenizer: Any, messages: list[Message], where: str, **options: Any) -> Any:
    import jinja2  # noqa: PLC0415

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(m["role"] for m in messages[:8])
        raise DataError(
            where, f"the model's chat template refuses a conversation of {roles} ({str(error).splitlines()[0][:200]})",
            fix="Correct the order of turns, or fold the system turn into the first user turn",
        ) from error  # fmt: skip


def _answer_spans(tokenizer: Any, messages: list[Message], whole: str, where: str) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns stand in the text of the whole conversation."""
    special = tuple(tokenizer.all_special_tokens)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:i], where, tokenize=False, add_generation_prompt=True) if i else ""
        answered = _apply(tokenizer, messages[: i + 1], where, tokenize=False)
        if not whole.startswith(answered) or not answered.startswith(prompt):
            raise DataError(
                where, f"the model's chat template writes turn {i + 1} differently when others follow, so that its"
                " answer cannot be told from the rest",
                allowed="a template whose turns stay as they are, or one with {% generation %} marks",
                fix="Use conversations of one answer, or task.loss_on=all",
            )  # fmt: skip
        end = len(answered.rstrip())
        # White space behind the token that ends a turn belongs to the template, not to the answer.
        yield len(prompt), end if answered[:end].endswith(special) else len(answered)
