# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation, a prompt or a text are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mirrortune.errors import DataError
from mirrortune.tasks.chat import (
    TextReader,
    encode_continuation,
    encode_conversation,
    save_turn_ends,
    template_notes,
    turn_end_ids,
)
from mirrortune.tasks.conversations import Conversation, as_messages
from tests.tiny_models import CHATML, MARKED, tiny_chat_tokenizer

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "42 – ja"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes "},
]


def learned(tokenizer: Any, encoding: tuple[list[int], list[bool]]) -> str:
    """The text of the tokens that are learned."""
    return str(tokenizer.decode([i for i, use in zip(*encoding, strict=True) if use]))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_is_learned_with_its_end_and_nothing_else(template: str) -> None:
    tokenizer = tiny_chat_tokenizer(template)
    ids, mask = encode_conversation(tokenizer, Conversation(messages=TALK), "row 1")
    assert learned(tokenizer, (ids, mask)) == "42 – ja<|im_end|>Yes <|im_end|>"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_marks_and_prefixes_agree() -> None:
    talk = Conversation(messages=TALK)
    by_prefix, by_marks = (encode_conversation(tiny_chat_tokenizer(t), talk, "row 1") for t in (CHATML, MARKED))
    assert by_prefix == by_marks


def test_a_template_that_ends_no_turn_gets_the_end_token() -> None:
    tokenizer = tiny_chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoding = encode_conversation(tokenizer, Conversation(messages=TALK[1:3]), "row 1")
    assert learned(tokenizer, encoding) == "42 – ja\n<|im_end|>"


@pytest.mark.parametrize(
    ("behind", "expected"),
    [("<|im_end|>\n", "42 – ja<|im_end|>Yes <|im_end|>"), (" \n<|im_end|>", "42 – ja \n<|im_end|>Yes  \n<|im_end|>"),
     ("\n", "42 – jaYes \n<|im_end|>")],
)  # fmt: skip
def test_the_end_of_an_answer_is_learned_even_if_the_marks_leave_it_out(behind: str, expected: str) -> None:
    tokenizer = tiny_chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '"
        + behind.replace("\n", "\\n")
        + "' }}{% endfor %}"
    )
    assert learned(tokenizer, encode_conversation(tokenizer, Conversation(messages=TALK), "row 1")) == expected


def test_an_end_and_a_line_break_inside_the_marks_are_not_learned_twice() -> None:
    tokenizer = tiny_chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    ids, mask = encode_conversation(tokenizer, Conversation(messages=TALK), "row 1")
    assert learned(tokenizer, (ids, mask)) == "42 – ja<|im_end|>\nYes <|im_end|>\n"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("behind", ["<|end|>", "<|im_end|>", ""])
def test_a_token_that_ends_no_turn_leaves_the_answer_open(behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}" + behind + "{% endfor %}"
    )
    tokenizer.add_tokens("</tool_call>")
    talk = Conversation(messages=[TALK[1], {"role": "assistant", "content": "now()</tool_call>"}])
    rendered: list[str] = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **options: rendered.append("") or render(*args, **options)
    )
    counts = []
    for _ in range(3):
        encoding = encode_conversation(tokenizer, talk, "row 1")
        assert learned(tokenizer, encoding) == f"now()</tool_call>{behind or '<|im_end|>'}"
        counts.append(len(rendered))
    assert counts[0] - 2 == counts[1] - counts[0] == counts[2] - counts[1]  # the end of turns is looked up once


def test_a_template_that_does_not_parse_is_not_blamed_on_the_rows() -> None:
    tokenizer = tiny_chat_tokenizer("{% for m in messages %}\n{{ m['content'] }")
    words = r"row 1: the model's chat template does not parse \(line 2: .*Correct chat_template\.jinja"
    with pytest.raises(DataError, match=words):
        encode_conversation(tokenizer, Conversation(messages=TALK), "row 1")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """Like those that drop the reasoning of all answers but the last."""
    tokenizer = tiny_chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if loop.last else 'gone' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"row 7: .*writes turn 3 differently when others follow.*task\.loss_on=all"):
        encode_conversation(tokenizer, Conversation(messages=TALK), "row 7")


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    tokenizer = tiny_chat_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"row 7: .*refuses a conversation of system, user.*System role not supported"):
        encode_conversation(tokenizer, Conversation(messages=TALK), "row 7")


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("Q: 1+1\nA:", " 2", " 2<|im_end|>"), ("Why?", "So.", "So.<|im_end|>"), ("", "A story", "A story<|im_end|>"),
     ("Why?", "", "<|im_end|>")],
)  # fmt: skip
def test_a_completion_is_learned_with_the_end_token(prompt: str, completion: str, text: str) -> None:
    tokenizer = tiny_chat_tokenizer(None)
    assert learned(tokenizer, encode_continuation(tokenizer, prompt, completion)) == text


def test_a_line_break_parts_what_brings_no_space() -> None:
    tokenizer = tiny_chat_tokenizer(None)
    assert tokenizer.decode(encode_continuation(tokenizer, "Why?", "So.")[0]) == "Why?\nSo.<|im_end|>"
    assert tokenizer.decode(encode_continuation(tokenizer, "A:", " 2")[0]) == "A: 2<|im_end|>"


def test_speakers_have_many_names() -> None:
    found = as_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "row 1")
    assert found == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("value", [None, "text", [], ["a"], [{"role": "user"}], [{"role": 1, "content": "a"}]])
def test_what_is_no_conversation_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^row 3: "):
        as_messages(value, "row 3")


@pytest.mark.parametrize(("known", "ends"), [(None, [256, 258]), (256, [256, 258]), ([256, 5], [256, 5, 258])])
def test_generation_stops_where_the_template_ends_a_turn(known: Any, ends: list[int], tmp_path: Path) -> None:
    tokenizer = tiny_chat_tokenizer(eos="<|end|>")
    assert turn_end_ids(tokenizer) == [256, 258]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": known, "top_p": 0.5}))
    save_turn_ends(tokenizer, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": ends, "top_p": 0.5}


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_fails_is_said(template: str) -> None:
    with pytest.raises(DataError, match="row 1: the model's chat template refuses"):
        encode_conversation(tiny_chat_tokenizer(template), Conversation(messages=TALK), "row 1")


@pytest.mark.parametrize(("limit", "value"), [("_MOST_TURNS", 4), ("_MOST_CHARACTERS", 100)])
def test_a_conversation_of_very_many_turns_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(f"mirrortune.tasks.chat.{limit}", value)
    talk = Conversation(messages=TALK)
    with pytest.raises(DataError, match=r"row 1: a conversation of 5 turns and .* Split it"):
        encode_conversation(tiny_chat_tokenizer(CHATML), talk, "row 1")
    encode_conversation(tiny_chat_tokenizer(MARKED), talk, "row 1")  # formatted once
    encode_conversation(tiny_chat_tokenizer(CHATML), talk, "row 1", learn_all=True)


def notes_on(template: str, *talks: list[dict[str, Any]], system: str = "") -> tuple[str, ...]:
    """The notes on conversations."""
    reader = TextReader(tokenizer=tiny_chat_tokenizer(template), is_chat=True, takes_positions=True)
    return template_notes([(talk,) for talk in talks], (), reader, "messages", system, "rows")


def answered(text: str) -> list[dict[str, Any]]:
    """A conversation of one answer."""
    return [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("block", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_a_prompt_that_training_does_not_contain_is_reported(template: str, block: str) -> None:
    opening = "<|im_start|>assistant\n"
    template = template.replace(f"%}}{opening}{{% endif", f"%}}{opening}{block}{{% endif")
    note = f"the chat template's generation prompt is {opening + block!r}, which"
    for text in ("4", f"{block.strip()}4"):
        (found,) = notes_on(template, answered(f"{block}4"), answered(text), answered(text))
        assert note in found
    assert notes_on(template, answered(f"{block}4")) == ()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_that_the_template_does_not_write_is_reported(template: str) -> None:
    """As templates of reasoning models do."""
    template = template.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | trim }}")
    (found,) = notes_on(template, answered("4 "), answered("<think>\nhm</think>\n4"), answered("<think>\n</think>4"))
    assert found == r"the chat template leaves out or changes parts of answers, as of '<think>\nhm</think>\n4'"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_common_templates_need_no_note(template: str) -> None:
    unanswered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    assert notes_on(template, TALK, TALK[:2], TALK[2:], TALK[2:3], unanswered, system="Be kind.") == ()


def test_turns_that_the_template_leaves_out_are_reported() -> None:
    """As Qwen's does with the role that OpenAI's newer files have in place of the system."""
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    talk: list[dict[str, Any]] = [{"role": "developer", "content": "Be brief."}, *TALK]
    (found,) = notes_on(template, talk)
    assert found == "the chat template leaves out or changes parts of turns of 'developer', as of 'Be brief.'"
