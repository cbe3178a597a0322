# SPDX-License-Identifier: Apache-2.0
"""Prompts of a language model: what training read before an answer, and nothing of the answer."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.tasks.kinds.causal_lm import Task, TextReader
from mirrortune.tasks.predicting import PredictOptions
from mirrortune.training.evaluate import evaluate_split, judge_split
from tests.tiny_models import CHATML, tiny_causal, tiny_chat_tokenizer
from tests.tiny_runs import make_accelerator

Row = dict[str, Any]
USER, BOT = "user", "assistant"
ASKED = ["a film", "the music was good and the cast was great fun", "plot", "a bad story", "it"]
SAID = ["so 2\n#### 2", "#### 1,000", "#### -3", "#### 4", "#### 5"]


def turns(*said: str, system: str = "") -> list[dict[str, str]]:
    """Messages of a user and an assistant, in turn."""
    made = [{"role": (USER, BOT)[number % 2], "content": text} for number, text in enumerate(said)]
    return [{"role": "system", "content": system}, *made] if system else made


PAIRS = [{"prompt": asked, "completion": said} for asked, said in zip(ASKED, SAID, strict=True)]
ALPACA = [{"instruction": a, "input": "" if i % 2 else "x", "output": s}
          for i, (a, s) in enumerate(zip(ASKED, SAID, strict=True))]  # fmt: skip
MESSAGES = [{"messages": turns(a, s, system="short" if i % 2 else "")}
            for i, (a, s) in enumerate(zip(ASKED, SAID, strict=True))]  # fmt: skip
SPACED = [{"prompt": f"Q: {asked} A:", "completion": f" {said}"} for asked, said in zip(ASKED, SAID, strict=True)]
LONGER = [{"messages": turns("so", "it was", a, s)} for a, s in zip(ASKED, SAID, strict=True)]
TURNS = [{"prompt": turns("so", "fun", a), "completion": [{"role": BOT, "content": s}]}
         for a, s in zip(ASKED, SAID, strict=True)]  # fmt: skip
HISTORY = [{**row, "system": "be short", "history": [["a", "the"]]} for row in PAIRS]


def task_of(rows: list[Row], template: str | None = CHATML, **settings: Any) -> tuple[Task, TextReader]:
    """The task of rows, and its reader."""
    task = Task.from_rows(pa.Table.from_pylist(rows), "rows", **settings)[0]
    assert isinstance(task, Task)
    is_chat = task.format == "chat" or task.layout in ("messages", "turns")
    reader = TextReader(tokenizer=tiny_chat_tokenizer(template), is_chat=is_chat, takes_positions=True)
    return task, reader


def prompts(rows: list[Row], task: Task, reader: TextReader, max_length: int = 256, **options: Any) -> Any:
    """The examples to predict."""
    split = Split(table=pa.Table.from_pylist(rows), source="rows.jsonl")
    return task.encode_to_predict(split, reader, Reading(max_length=max_length), PredictOptions(**options))


def texts(rows: list[Row], task: Task, reader: TextReader) -> list[str]:
    """The prompts as text."""
    examples = prompts(rows, task, reader)
    return [reader.tokenizer.decode(examples.input_ids(row)) for row in range(len(examples))]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (PAIRS, {}), (PAIRS, {"format": "chat"}), (ALPACA, {}), (ALPACA, {"format": "chat"}), (MESSAGES, {}),
        (LONGER, {}), (TURNS, {}), (HISTORY, {}), (HISTORY, {"format": "chat"}), (SPACED, {}),
    ],
    ids=["pairs", "pairs-chat", "alpaca", "alpaca-chat", "messages", "longer", "turns", "history", "history-chat",
         "spaced"],
)  # fmt: skip
def test_answers_are_those_that_an_evaluation_generates(rows: list[Row], settings: dict[str, Any]) -> None:
    task, reader = task_of(rows, answer="gsm8k", max_new_tokens=6, **settings)
    split, model = Split(table=pa.Table.from_pylist(rows), source="rows"), tiny_causal().eval()
    scored = task.encode(split, reader, Reading(max_length=256))
    found = evaluate_split(model, task, scored, make_accelerator(), batch_size=2, source="rows")
    examples = prompts(rows, task, reader)
    prompted = [scored.prompt(row).tolist() for row in range(5)]  # type: ignore[attr-defined]
    assert [examples.input_ids(row).tolist() for row in range(5)] == prompted
    judged = judge_split(model, task, examples, make_accelerator(), batch_size=3)
    columns = task.prediction_columns(judged, examples, split, examples.options)
    assert columns["prediction"] == [text for _, text in found.judged]
    assert len(set(columns["prediction"])) > 1


@pytest.mark.parametrize("rows", [PAIRS, ALPACA, MESSAGES, LONGER, TURNS, HISTORY])
def test_nothing_of_an_answer_is_in_its_prompt(rows: list[Row]) -> None:
    task, reader = task_of(rows)
    found = texts(rows, task, reader)
    assert not any("##" in text.replace("### ", "") for text in found)
    assert all(asked in text for asked, text in zip(ASKED, found, strict=True))
    if task.label_column is not None:
        unlabelled = [{key: value for key, value in row.items() if key != task.label_column} for row in rows]
        assert texts(unlabelled, task, reader) == found
    else:
        open_ended = [{"messages": row["messages"][:-1]} for row in rows]
        assert texts(open_ended, task, reader) == found


def test_a_text_is_what_the_user_says_where_rows_are_conversations() -> None:
    task, reader = task_of(MESSAGES)
    assert texts([{"messages": "a film"}], task, reader) == [
        "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert texts([{"messages": '[{"role": "user", "content": "a film"}]'}], task, reader) == texts(
        [{"messages": turns("a film")}], task, reader
    )


def test_a_plain_text_is_continued_as_it_stands() -> None:
    rows = [{"text": "the film was "}, {"text": "so"}]
    task, reader = task_of(rows)
    assert texts(rows, task, reader) == ["the film was ", "so"]
    long = [{"text": "the film was good"}]
    examples = prompts(long, task, reader, max_length=4)
    assert reader.tokenizer.decode(examples.input_ids(0)) == "good"
    assert examples.num_truncated == 1
    written = judge_split(tiny_causal().eval(), task, examples, make_accelerator(), batch_size=1)
    column = task.prediction_columns(written, examples, Split(table=pa.table({}), source=""), examples.options)
    assert column["prediction"] == [reader.tokenizer.decode(written[0].ids, skip_special_tokens=True)]


def test_prompts_that_are_too_long_or_empty_are_named() -> None:
    task, reader = task_of(PAIRS)
    with pytest.raises(DataError, match=r"1 of 5 prompts are too long, up to 46 tokens \(row 2\). Allowed: 40 tokens"):
        prompts(PAIRS, task, reader, max_length=40)
    with pytest.raises(DataError, match=r"1 of 2 rows have no text to answer \(row 2\)"):
        prompts([{"prompt": "a"}, {"prompt": None}], task, reader)


def test_a_conversation_of_answers_alone_has_nothing_to_answer() -> None:
    task, reader = task_of(MESSAGES)
    with pytest.raises(DataError, match="row 1: the conversation has no turn to answer"):
        prompts([{"messages": [{"role": BOT, "content": "so"}]}], task, reader)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_prompt_near_the_last_position_leaves_the_others_their_length(family: str) -> None:
    rows = [{"prompt": "the film " * 25}, {"prompt": "a film"}, {"prompt": "the plot " * 28}]
    task, reader = task_of([{**row, "completion": "so"} for row in rows])
    examples, model = prompts(rows, task, reader, max_new_tokens=40), tiny_causal(family).eval()
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    together = examples.generate(model, np.arange(3))
    assert [examples.generate(model, np.array([row]))[0] for row in range(3)] == together
    lengths = [len(written.ids) for written in together if not written.is_finished]
    assert max(lengths, default=40) == 40


def test_a_sharded_model_generates_once_for_the_prompts_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "the film " * 25}, {"prompt": "a film"}]
    task, reader = task_of([{**row, "completion": "so"} for row in rows])
    examples, model = prompts(rows, task, reader, max_new_tokens=40), tiny_causal().eval()
    model.config.max_position_embeddings = int(examples.offsets[1]) + 1
    generate = Mock(wraps=model.generate)
    monkeypatch.setattr(model, "generate", generate)
    accelerator = make_accelerator()
    judge_split(model, task, examples, accelerator, batch_size=2)
    assert [call.kwargs["max_new_tokens"] for call in generate.call_args_list] == [1, 40]
    generate.reset_mock()
    monkeypatch.setattr(Sharding, "shards_weights", True)
    judge_split(model, task, examples, accelerator, batch_size=2)
    assert [call.kwargs["max_new_tokens"] for call in generate.call_args_list] == [1]


def test_an_answer_says_whether_it_was_finished() -> None:
    task, reader = task_of(PAIRS)
    examples = prompts(PAIRS, task, reader, max_new_tokens=40, temperature=3.0)
    model = tiny_causal().eval()
    written = examples.generate(model, np.arange(5))
    ends = reader.tokenizer.eos_token_id
    assert all(ends not in text.ids for text in written)
    assert {len(text.ids) == 40 for text in written if not text.is_finished} <= {True}
    assert all(len(text.ids) < 40 for text in written if text.is_finished)
