# SPDX-License-Identifier: Apache-2.0
"""Conversations: what the model is sent, how answers stream and stop, and the rows that they are saved as."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mirrortune.data.dataset import load_data
from mirrortune.errors import ConfigError, DataError, ResourceError
from mirrortune.inference.chat import Chat, Form, Speaker
from mirrortune.system.atomic import MARKER
from mirrortune.system.outputs import RUN, Input, Marker, write_marker
from mirrortune.system.paths import DataPlace
from mirrortune.tasks.chat import encode_continuation
from mirrortune.tasks.predicting import PredictOptions
from mirrortune.tasks.prompts import alpaca_prompt
from tests.tiny_models import CHATML, tiny_causal, tiny_chat_tokenizer

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SILENT = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@functools.cache
def model() -> Any:
    """A tiny Llama of 256 positions."""
    return tiny_causal()


def speaker(form: Form = "chat", template: str | None = CHATML) -> Speaker:
    """A tiny Llama whose tokens are bytes."""
    tokenizer = tiny_chat_tokenizer(template)
    tokenizer.pad_token = "<|end|>"
    return Speaker(model=model(), tokenizer=tokenizer, form=form)


def chat(form: Form = "chat", template: str | None = CHATML, *, system: str = "", **options: Any) -> Chat:
    """A conversation with a tiny Llama, whose answers have 12 tokens at most."""
    return Chat(
        speaker=speaker(form, template), options=PredictOptions(**{"max_new_tokens": 12, **options}), system=system
    )


def sent(talk: Chat, text: str) -> str:
    """The text that the model would be sent."""
    found = talk.speaker.encode(talk.system, talk.turns, text)
    return str(talk.speaker.tokenizer.decode(found))


def test_an_answer_streams_and_is_what_the_model_writes_greedily() -> None:
    talk, pieces = chat(), []
    answer = talk.answer("hello", pieces.append)
    ids = torch.tensor([talk.speaker.encode("", [], "hello")])
    written = model().generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=258, pad_token_id=256)

    assert len(pieces) > 1
    assert "".join(pieces) == answer.text
    assert answer.text == talk.speaker.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert (answer.num_tokens, answer.ended, answer.num_left_out) == (12, "length", 0)
    assert talk.turns == [("hello", answer.text)]


def test_a_turn_is_sent_after_those_before_it() -> None:
    talk = chat(system="Be kind.")
    talk.turns.append(("one", "two"))

    assert sent(talk, "three") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    assert talk.undo() == ("one", "two")
    assert talk.undo() is None
    assert "two" not in sent(talk, "three")


@pytest.mark.parametrize("template", [STRICT, SILENT])
def test_a_system_prompt_goes_into_the_first_message_where_the_template_has_no_place_for_it(template: str) -> None:
    talk = chat(template=template, system="Be kind.")
    talk.turns.append(("one", "two"))

    assert sent(talk, "three").startswith("<|im_start|>user\nBe kind.\n\none<|im_end|>\n<|im_start|>assistant\ntwo")
    assert talk.messages()[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("form", ["prompt", "alpaca"])
def test_turns_without_a_template_are_sent_as_training_wrote_them(form: Form) -> None:
    talk = chat(form, None)
    talk.turns.append(("one", "two"))
    ask = (lambda text: alpaca_prompt(text, "")) if form == "alpaca" else str
    before = [{"role": "user", "content": ask("one")}, {"role": "assistant", "content": "two"}]
    trained, learned = encode_continuation(talk.speaker.tokenizer, ask("three"), "four", before)

    found = talk.speaker.encode("", talk.turns, "three")
    assert found == trained[: len(found)]
    assert trained[len(found) :] == [*talk.speaker.tokenizer("four")["input_ids"], 258]
    assert all(learned[len(found) :])


def test_a_plain_model_continues_the_text() -> None:
    talk = chat("text", None, system="A tale.")
    talk.turns.append(("Once", "upon"))

    assert sent(talk, "a time") == "A tale.\nOnce\nupon\na time"


def test_an_answer_can_be_stopped_and_keeps_what_is_there() -> None:
    talk, pieces = chat(max_new_tokens=100), []
    answer = talk.answer("hello", pieces.append, lambda: len(pieces) >= 3)

    assert (answer.ended, answer.num_tokens < 100) == ("stopped", True)
    assert answer.text
    assert talk.turns == [("hello", answer.text)]


def test_an_empty_answer_is_no_turn() -> None:
    talk = chat()
    tokenizer = talk.speaker.tokenizer
    first = model().generate(input_ids=torch.tensor([talk.speaker.encode("", [], "hello")]), max_new_tokens=1,
                             do_sample=False, pad_token_id=256)[0, -1]  # fmt: skip
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(first))

    answer = talk.answer("hello", lambda _: pytest.fail("nothing was written"))
    assert (answer.text, answer.ended, answer.num_tokens) == ("", "end", 1)
    assert talk.turns == []


def test_the_oldest_turns_are_left_out_once_the_model_has_no_room() -> None:
    talk = chat(system="Be kind.")
    talk.turns += [(f"question {number} {'x' * 20}", "y" * 20) for number in range(6)]
    answer = talk.answer("the last", lambda _: None)

    assert 0 < answer.num_left_out < 6
    assert len(talk.turns) == 7, "nothing is forgotten"
    shown = talk.speaker.encode("Be kind.", talk.turns[answer.num_left_out : 6], "the last")
    more = talk.speaker.encode("Be kind.", talk.turns[answer.num_left_out - 1 : 6], "the last")
    assert len(shown) + 12 <= 256 < len(more) + 12


def test_a_message_that_does_not_fit_is_refused_and_an_answer_is_as_long_as_fits() -> None:
    talk = chat(max_new_tokens=200)
    with pytest.raises(DataError, match=r"it has 1,0\d\d tokens, and the model takes 256, the answer included"):
        talk.answer("x" * 1000, lambda _: None)
    assert talk.turns == []

    assert talk.answer("x" * 200, lambda _: None).num_tokens <= 256 - 200


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_an_answer_ends_where_the_models_context_ends(family: str) -> None:
    talk = chat(max_new_tokens=1000)
    talk.speaker = replace(talk.speaker, model=tiny_causal(family))
    limit = talk.speaker.positions()
    assert limit is not None

    answer = talk.answer("hello", lambda _: None)

    assert answer.num_tokens <= limit - len(talk.speaker.encode("", [], "hello"))


def test_samples_depend_on_the_seed_and_on_the_number_of_the_answer() -> None:
    def three(seed: int) -> list[str]:
        talk = chat(temperature=5.0, seed=seed)
        found = []
        for _ in range(3):
            found.append(talk.answer("hello", lambda _: None).text)
            talk.undo()
        return found

    assert three(1) == three(1)
    assert len({*three(1), *three(2)}) == 6


def test_a_saved_conversation_is_a_row_to_train_on(tmp_path: Path) -> None:
    talk, file = chat(system="Be kind."), tmp_path / "new" / "talks.jsonl"
    with pytest.raises(ConfigError, match="the conversation has no answer yet"):
        talk.save(file)
    talk.turns.append(("één \x1b[2J\x9b2J\u202e", "two"))
    talk.save(file)
    talk.turns.append(("three", "four"))
    talk.save(file)
    talk.reset()
    talk.turns.append(("five", "six"))
    talk.save(file)

    rows = load_data(DataPlace.parse(str(file))).splits["train"].table.to_pylist()
    assert [[m["content"] for m in json.loads(row["messages"])] for row in rows] == [
        ["Be kind.", "één \x1b[2J\x9b2J\u202e", "two", "three", "four"], ["Be kind.", "five", "six"],
    ]  # fmt: skip
    assert not {"\x1b", "\x9b", "\u202e"} & set(file.read_text(encoding="utf-8"))
    assert "één" in file.read_text(encoding="utf-8")


def test_saving_replaces_no_row_of_another(tmp_path: Path) -> None:
    file, row = tmp_path / "talks.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}], "id": 3})
    file.write_text(row, encoding="utf-8")  # without a line break at its end
    talk = chat()
    talk.turns.append(("one", "two"))
    talk.save(file)
    first, second = file.read_text(encoding="utf-8").splitlines()
    assert (first, len(json.loads(second)["messages"])) == (row, 2)

    file.write_text(file.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")  # someone else writes on
    talk.save(file)
    assert file.read_text(encoding="utf-8").splitlines() == [row, second, row, second]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.txt", None, "Allowed: a file that ends in .jsonl"),
        ("rows.jsonl", '{"text": "mine"}\n', "is there, and holds no rows of messages"),
        ("rows.jsonl", '[{"messages": []}]\n', "is there, and holds no rows of messages"),
        ("rows.jsonl", b"\xff\xfe\x00", "is there, and holds no rows of messages"),
        ("read.jsonl", '{"messages": []}\n', "is read"),
    ],
)  # fmt: skip
def test_saving_leaves_other_files_alone(tmp_path: Path, name: str, content: str | bytes | None, says: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    talk = chat()
    talk.turns.append(("one", "two"))

    with pytest.raises(ConfigError, match=says):
        talk.save(file, [Input("data", tmp_path / "read.jsonl")])
    assert (file.read_bytes() if file.exists() else None) == (content.encode() if isinstance(content, str) else content)


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    talk = chat()
    talk.turns.append(("one", "two"))

    with pytest.raises((ConfigError, ResourceError), match="file"):
        talk.save(tmp_path / "file" / "talks.jsonl")


@pytest.mark.parametrize("below", ["talks.jsonl", "deep/er/talks.jsonl"])
def test_nothing_is_saved_in_a_run(tmp_path: Path, below: str) -> None:
    """Also in a run that the command does not read."""
    write_marker(tmp_path / "run", Marker(RUN.name, frozenset()))
    talk = chat()
    talk.turns.append(("one", "two"))

    with pytest.raises(ConfigError, match=r"/save: .*talks\.jsonl lies in the run .*run\. Give a name elsewhere"):
        talk.save(tmp_path / "run" / below)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MARKER]
