# SPDX-License-Identifier: Apache-2.0
"""Answers that a language model generates when it is scored: batched as alone, cut at their end, compared as meant."""

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
from mirrortune.tasks.answered_rows import AnsweredExamples
from mirrortune.tasks.kinds.causal_lm import Task, TextReader
from mirrortune.training.evaluate import evaluate_split
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer
from tests.tiny_runs import make_accelerator

ROWS = [
    ("a film", "so 2\n#### 2"), ("the music was good and the cast was great fun", "#### 1,000"), ("plot", "#### -3"),
    ("a bad story from start to end", "#### 4"), ("it", "#### 5"),
]  # fmt: skip


def encoded(rows: list[tuple[str, str]], **settings: Any) -> tuple[Task, Any]:
    """A task that scores answers, and rows for scoring."""
    table = pa.table({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})
    task, _ = Task.from_rows(table, "rows", answer="gsm8k", max_new_tokens=8, **settings)
    assert isinstance(task, Task)
    reader = TextReader(tokenizer=tiny_chat_tokenizer(), is_chat=task.format == "chat", takes_positions=True)
    return task, task.encode(Split(table=table, source="rows"), reader, Reading(max_length=128))


def test_the_answer_that_is_scored_is_the_last_one_that_is_learned() -> None:
    said = (("user", "a"), ("assistant", "#### 1"), ("user", "b"), ("assistant", "#### 2"))
    turns = [{"role": role, "content": text, "train": text == "#### 1"} for role, text in said]
    table = pa.table({"messages": [turns]})
    task, _ = Task.from_rows(table, "rows", answer="gsm8k")
    reader = TextReader(tokenizer=tiny_chat_tokenizer(), is_chat=True, takes_positions=True)
    examples = task.encode(Split(table=table, source="rows"), reader, Reading(max_length=128))
    assert isinstance(examples, AnsweredExamples)
    assert examples.expected == ("1",)
    assert reader.tokenizer.decode(examples.prompt(0)) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_an_expected_answer_may_be_zero() -> None:
    rows: list[Any] = [("1 - 1?", 0), ("1 + 1?", 2)]
    assert encoded(rows)[1].expected == ("0", "2")


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT"])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_batch_gives_what_each_row_gives_alone(family: str, form: str) -> None:
    _, examples = encoded(ROWS, format=form)
    assert isinstance(examples, AnsweredExamples)
    model = tiny_causal(family).eval()
    together = examples.generate(model, np.arange(len(ROWS)))
    alone = [examples.generate(model, np.array([row]))[0] for row in range(len(ROWS))]
    assert together == alone
    assert len(set(together)) > 1, "the rows do not tell models apart"


def test_a_long_prompt_leaves_the_answers_of_others_their_length() -> None:
    model = tiny_causal("Llama").eval()
    rows = [ROWS[0], ROWS[1]]
    _, examples = encoded(rows, format="text")
    model.config.max_position_embeddings = len(examples.prompt(1)) + 1
    together = examples.generate(model, np.arange(2))
    assert together == [examples.generate(model, np.array([row]))[0] for row in range(2)]
    assert len(together[0]) > len(together[1])


def test_a_sharded_model_generates_once_for_the_rows_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks have prompts of other lengths, and wait for one another in each call."""
    model = tiny_causal("Llama").eval()
    task, examples = encoded([ROWS[0], ROWS[1]], format="text")
    model.config.max_position_embeddings = len(examples.prompt(1)) + 1
    generate = Mock(wraps=model.generate)
    monkeypatch.setattr(model, "generate", generate)
    accelerator = make_accelerator()
    evaluate_split(model, task, examples, accelerator, source="rows", batch_size=2)
    assert [call.kwargs["max_new_tokens"] for call in generate.call_args_list] == [1, 8]
    generate.reset_mock()
    monkeypatch.setattr(Sharding, "shards_weights", True)
    evaluate_split(model, task, examples, accelerator, source="rows", batch_size=2)
    assert [call.kwargs["max_new_tokens"] for call in generate.call_args_list] == [1]


def test_the_prompt_ends_where_the_answer_begins() -> None:
    _, examples = encoded(ROWS, format="text")
    decode = examples.tokenizer.decode
    assert [decode(examples.prompt(row)).strip().endswith(ROWS[row][0]) for row in range(len(ROWS))] == [True] * 5


def test_an_answer_is_cut_at_its_end_and_compared() -> None:
    task, examples = encoded(ROWS)
    assert examples.expected == ("2", "1000", "-3", "4", "5")
    stop, two = examples.stops[0], examples.tokenizer("2", add_special_tokens=False)["input_ids"]
    assert examples._text([*two, stop, *two]) == examples._text(two)
    judged = [(np.array([1.0, 2.0, 3.0]), text) for text in ("#### 2.0", "it is 1000", "3", "no idea", "#### 5")]
    predictions, references = task.answers(judged, examples)
    assert predictions[:, 2].tolist() == [1, 1, 0, 0, 1]
    assert references.tolist() == [3] * 5


def test_rows_without_a_readable_answer_are_named() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows have no answer in the format 'gsm8k' in column 'completion'"):
        encoded([*ROWS[:1], ("a film", "no idea")])


def test_the_rows_to_learn_from_are_those_without_answers() -> None:
    table = pa.table({"prompt": ["a"] * 2, "completion": ["no number", "#### 1"]})
    task, _ = Task.from_rows(table, "rows", answer="gsm8k")
    reader = TextReader(tokenizer=tiny_chat_tokenizer(), is_chat=False, takes_positions=True)
    reading = Reading(max_length=64, for_training=True)
    assert not isinstance(task.encode(Split(table=table, source="rows"), reader, reading), AnsweredExamples)
