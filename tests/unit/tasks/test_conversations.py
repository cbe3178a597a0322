# SPDX-License-Identifier: Apache-2.0
"""Rows of many formats as conversations, and how templates of real shapes write them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from mirrortune.errors import DataError
from mirrortune.tasks.chat import (
    LostAnswerError,
    encode_continuation,
    encode_conversation,
    turn_end_ids,
    writes_tools,
)  # fmt: skip
from mirrortune.tasks.conversations import (
    Conversation,
    as_history,
    as_messages,
    conversation,
    count_unread,
    row_weight,
)  # fmt: skip
from mirrortune.tasks.prompts import alpaca_prompt, asked_text
from tests.tiny_models import CHATML, MARKED, TOOL_CHATML, tiny_chat_tokenizer

# The shapes of well-known templates, as far as they differ.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set start = 1 %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% else %}{% set start = 0 %}{% set system = '' %}{% endif %}{% for m in messages[start:] %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}{% if 'tool_calls' in m %}"
    '{% set f = m.tool_calls[0].function %}{{ \'{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson }}{{ '}' }}{% else %}{{ m['content'] | trim }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS]{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 letters') }}{% endif %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{{ c.id }}{% endfor %}{{ '<|im_end|>' }}{% elif m['role'] == 'tool' %}"
    "{{ '[RESULTS]' + m['tool_call_id'] + m['content'] }}{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
# DeepSeek's wants OpenAI's text of arguments, which others would write with its quotes.
DEEPSEEK = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + '\n' + c.function.arguments + '<|im_end|>' }}{% endfor %}{% else %}"
    "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = {"role": "user", "content": "paris?"}


def call(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    """A turn that calls a tool."""
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function, **more}]}


def learned(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text that is learned of a conversation, through everything that a row goes through."""
    tokenizer = tiny_chat_tokenizer(template)
    talk = conversation(as_messages(messages, "row 1"), options, "row 1")
    ids, mask = encode_conversation(tokenizer, talk, "row 1")
    return str(tokenizer.decode([i for i, use in zip(ids, mask, strict=True) if use]))


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA2, LLAMA3, GEMMA, ZEPHYR, MISTRAL, DEFAULT_SYSTEM])
def test_answers_are_learned_in_templates_of_every_shape(template: str) -> None:
    turns = [ASKED, {"role": "assistant", "content": "Sunny."}, ASKED, {"role": "assistant", "content": "Still."}]
    parts = learned(template, turns).split("<|im_end|>")
    assert [part.split("\n")[-1].strip() for part in parts] == ["Sunny.", "Still.", ""]
    assert turn_end_ids(tiny_chat_tokenizer(template, eos="<|end|>")) == [256, 258]


@pytest.mark.parametrize("arguments", [{"city": "paris"}, '{"city": "paris"}'])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOL_CHATML, '<call>{"name": "weather", "arguments": {"city": "paris"}}</call><|im_end|>'),
        (LLAMA3, '{"name": "weather", "parameters": {"city": "paris"}}<|im_end|>'),
        (DEEPSEEK, '<call>weather\n{"city": "paris"}<|im_end|>'),
        (MISTRAL, '[TOOL_CALLS]weather{"city": "paris"}'),
    ],
)
def test_calls_in_openais_form_reach_every_template(template: str, expected: str, arguments: Any) -> None:
    text = learned(template, [ASKED, call(arguments, id="call_abc123")])
    assert text.startswith(expected)
    assert "None" not in text


def test_the_ids_of_calls_and_of_their_answers_stay_the_same() -> None:
    tokenizer = tiny_chat_tokenizer(MISTRAL)
    turns = [ASKED, call({}, id="call_abc123"), {"role": "tool", "tool_call_id": "call_abc123", "content": "sunny"}]
    talk = conversation(as_messages([*turns, {"role": "assistant", "content": "ok"}], "row 1"), {}, "row 1")
    text = tokenizer.decode(encode_conversation(tokenizer, talk, "row 1")[0])
    answered = text.partition("weather{}")[2][:9]
    assert f"[RESULTS]{answered}sunny" in text


@pytest.mark.parametrize("content", [None, "", "Let me see."])
@pytest.mark.parametrize("template", [CHATML, GEMMA, ZEPHYR])
def test_calls_that_the_template_leaves_out_are_refused(template: str, content: str | None) -> None:
    """Whether nothing or only the words beside the call would be learned."""
    with pytest.raises(LostAnswerError) as caught:
        learned(template, [ASKED, call({"city": "paris"}, content)])
    assert caught.value.kind == "calls"


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA3])
def test_an_answer_of_nothing_but_its_end_is_refused(template: str) -> None:
    with pytest.raises(LostAnswerError) as caught:
        learned(template, [ASKED, {"role": "assistant", "content": " "}])
    assert caught.value.kind == "empty"


def test_older_forms_of_calls_become_todays() -> None:
    openai = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    sharegpt = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    for turn in (openai, sharegpt):
        (made,) = as_messages([turn], "row 1")
        assert made["role"] == "assistant"
        assert made["content"] is None
        assert made["tool_calls"][0]["function"]["name"] == "f"
    assert as_messages([{"from": "observation", "value": "3"}], "row 1") == [{"role": "tool", "content": "3"}]


@pytest.mark.parametrize("first", ["hello", "0 apples", "1 apple", "  spaced", "<|im_start|>odd"])
def test_an_answer_begins_where_its_content_begins(first: str) -> None:
    turns = [{"role": "assistant", "content": first}, ASKED, {"role": "assistant", "content": "ok"}]
    assert learned(DEFAULT_SYSTEM, turns) == f"{first}<|im_end|>ok<|im_end|>"


@pytest.mark.parametrize("name", ["User", "USER", " user ", "human", "Human", "prompter"])
def test_roles_are_taken_in_any_case_and_under_their_usual_names(name: str) -> None:
    assert as_messages([{"role": name, "content": "a"}], "row 1") == [{"role": "user", "content": "a"}]


def test_roles_that_nobody_knows_are_left_to_the_template() -> None:
    assert as_messages([{"role": "Critic", "content": "a"}], "row 1")[0]["role"] == "Critic"


def test_what_a_message_lacks_is_not_null() -> None:
    found = as_messages(
        [{"role": "user", "content": "a", "tool_calls": None, "name": None, "function_call": None}], "r"
    )
    assert found == [{"role": "user", "content": "a"}]


def test_parts_of_text_are_one_text_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert as_messages([{"role": "user", "content": parts}], "row 1")[0]["content"] == "ab"
    with pytest.raises(DataError, match="a turn of the conversation is"):
        as_messages([{"role": "user", "content": [{"type": "image_url"}]}], "row 1")


def test_columns_of_a_row_reach_the_template() -> None:
    tools = [{"name": "f", "description": "x", "parameters": {"type": "object", "properties": {"b": None}}}]
    added = {"system": "Be brief.", "functions": tools, "history": [["a", "b"]], "weight": 0.5, "documents": None}
    talk = conversation([dict(ASKED)], added, "row 1")
    assert [m["content"] for m in talk.messages] == ["Be brief.", "a", "b", "paris?"]
    assert talk.options == {"tools": [{"type": "function", "function": tools[0]}]}
    assert row_weight(added, "row 1") == 0.5
    assert conversation([dict(ASKED)], {"tools": '[{"a": 1}]'}, "row 1").options == {"tools": [{"a": 1}]}
    own = conversation([{"role": "system", "content": "own"}, ASKED], {"system": "column"}, "row 1")
    assert [m["content"] for m in own.messages] == ["own", "paris?"], "a conversation's own system turn comes first"


@pytest.mark.parametrize("weight", [2000.5, 3000, -1, "x", math.nan])
def test_weights_of_rows_that_cannot_be_held_are_refused(weight: Any) -> None:
    allowed = r"Allowed: a number from 0 \(not learned\) to 2000"
    with pytest.raises(DataError, match=f"row 1, column 'weight': got weight .*{allowed}"):
        row_weight({"weight": weight}, "row 1")
    assert row_weight({"weight": 2000}, "row 1") == 2000


@pytest.mark.parametrize(
    "added", [{"tools": "not json"}, {"tools": [1]}, {"history": ["a"]}, {"documents": "3"}]
)  # fmt: skip
def test_columns_that_hold_something_else_are_refused(added: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^row 4, column '"):
        conversation([dict(ASKED)], added, "row 4")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_of_weight_zero_are_not_learned(template: str) -> None:
    first = {"role": "assistant", "content": "first", "weight": 0}
    assert learned(template, [ASKED, first, ASKED, {"role": "assistant", "content": "second"}]) == "second<|im_end|>"
    with pytest.raises(DataError, match=r"a turn has weight 0\.5\. Allowed: 0 \(not learned\) or 1"):
        learned(template, [ASKED, {**first, "weight": 0.5}])


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("flag", ["train", "training", "loss"])
def test_turns_that_other_tools_leave_out_are_not_learned(template: str, flag: str) -> None:
    first, second = ({"role": "assistant", "content": text} for text in ("first", "second"))
    for no, yes in ((False, True), (0, 1)):
        assert learned(template, [ASKED, {**first, flag: no}, ASKED, {**second, flag: yes}]) == "second<|im_end|>"
    assert learned(template, [ASKED, {**first, flag: True, "weight": 0}, ASKED, second]) == "second<|im_end|>"
    value = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "first", flag: False}]
    assert conversation(as_messages(value, "row 1"), {}, "row 1").given == (1,)


def test_a_number_that_is_no_flag_stays_a_field_of_its_turn() -> None:
    turn = {"role": "assistant", "content": "a", "loss": 0.0, "train": "yes"}
    assert as_messages([turn], "row 1") == [turn]


def test_earlier_turns_that_are_not_learned_are_marked_without_a_template_too() -> None:
    history = [ASKED, {"role": "assistant", "content": "old", "train": False}, *as_history([["c", "new"]], "row 1")]
    prompt, before = asked_text("prompt", ["d"], {"history": history}, "row 1")
    tokenizer = tiny_chat_tokenizer(None)
    ids, mask = encode_continuation(tokenizer, prompt, "e", before)
    assert tokenizer.decode([i for i, use in zip(ids, mask, strict=True) if use]) == "newe<|im_end|>"


def test_fields_of_turns_without_influence_on_the_text_are_counted() -> None:
    tokenizer = tiny_chat_tokenizer(CHATML.replace("{{ m['content'] }}", "{{ m.content }}{{ m.a or m.b or '' }}"))
    answer = {"role": "assistant", "content": "b", "weight": 1, "empty": "", "none": None}
    counts = Counter[str]()
    for more in ({"a": "x", "b": "x"}, {"name": "n", "id": 0}, {"b": "x", "id": 7}, {}):
        talk = conversation(as_messages([ASKED, {**answer, **more}], "row 1"), {}, "row 1")
        encode_conversation(tokenizer, talk, "row 1", counts=counts)
    assert counts == {"unread a": 1, "unread id": 2, "unread name": 1}  # without a, b is written in its place


@pytest.mark.parametrize("read", ["m.reasoning_content", "m['reasoning']", "m.get('thinking')"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_written_by_templates_that_call_it_otherwise(read: str, given: str) -> None:
    template = CHATML.replace("{{ m['content'] }}", "{% if " + read + " %}<think>{{ " + read + " }}</think>{% endif %}"
                              "{{ m['content'] }}")  # fmt: skip
    answer = {"role": "assistant", "content": "b", given: "since"}
    assert learned(template, [ASKED, answer, ASKED, {"role": "assistant", "content": "c"}]) == (
        "<think>since</think>b<|im_end|>c<|im_end|>"
    )


def test_whether_a_template_writes_tools_is_known() -> None:
    talk = Conversation(messages=[ASKED], options={"tools": [{"name": "f"}]})
    assert writes_tools(tiny_chat_tokenizer(TOOL_CHATML), talk)
    assert not writes_tools(tiny_chat_tokenizer(CHATML), talk)


def test_the_end_of_a_turn_is_found_whatever_its_letters() -> None:
    """``</bot>`` and ``</a1>`` hold the letters that a probe could be made of."""
    for mark in ("</bot>", "<0>", "<1>"):
        template = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}" + (
            "{{ '" + mark + "' if m['role'] == 'assistant' else '|' }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        tokenizer = tiny_chat_tokenizer(template, eos="<|end|>")
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
        assert turn_end_ids(tokenizer) == [256, tokenizer.convert_tokens_to_ids(mark)]
        talk = Conversation(messages=[ASKED, {"role": "assistant", "content": "bot 01"}])
        ids, mask = encode_conversation(tokenizer, talk, "row 1")
        assert tokenizer.decode([i for i, use in zip(ids, mask, strict=True) if use]) == f"bot 01{mark}"


def test_when_all_is_learned_templates_may_rewrite_earlier_turns() -> None:
    tokenizer = tiny_chat_tokenizer(CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '-' }}"))
    answer = {"role": "assistant", "content": "b"}
    talk = Conversation(messages=[ASKED, answer, ASKED, answer])
    with pytest.raises(DataError, match=r"task\.loss_on=all"):
        encode_conversation(tokenizer, talk, "row 1")
    assert all(encode_conversation(tokenizer, talk, "row 1", learn_all=True)[1])


def test_alpaca_prompts_are_stanfords() -> None:
    assert alpaca_prompt("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n"
    )
    assert "### Input" not in alpaca_prompt("Add.", " ")


@pytest.mark.parametrize(
    ("fields", "unread", "times"),
    [({}, set(), 0), ({"id": 1}, {"id"}, 1), ({"name": "a"}, set(), 1), ({"id": 1, "time": 2}, {"id", "time"}, 1),
     ({"id": 1, "name": "a"}, {"id"}, 3)],
)  # fmt: skip
def test_a_conversation_is_written_again_no_more_than_needed(
    fields: dict[str, Any], unread: set[str], times: int
) -> None:
    written: list[str] = []

    def write(messages: list[dict[str, Any]]) -> str:
        written.append("".join(f"{m.get('name')}: {m['content']}" for m in messages))
        return written[-1]

    messages = [{"role": "user", "content": "a", **fields}]
    whole, counts = write(messages), Counter[str]()
    count_unread(counts, messages, whole, write)

    assert {name.removeprefix("unread ") for name in counts} == unread
    assert len(written) - 1 == times
