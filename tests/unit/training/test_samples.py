# SPDX-License-Identifier: Apache-2.0
"""Samples of what a model writes: which validation rows, their prompts, and the file of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.models.load import find_model, load_model
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import Task, task_class
from mirrortune.training.samples import Samples, choose_samples
from tests.tiny_models import write_tiny_causal, write_tiny_seq2seq
from tests.tiny_runs import classification, make_accelerator


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a chat template."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "tiny-llama")


def made(kind: str, model: Path, table: dict[str, list[Any]], count: int | None = None) -> tuple[Task, Samples | None]:
    """A task of some rows, and the samples chosen from them."""
    split = Split(table=pa.table(table), source="rows")
    task, _ = task_class(kind).from_rows(split.table, "rows")
    return task, choose_samples(task, split, task.load_processor(find_model(str(model))), Reading(max_length=64), count)


def test_rows_are_chosen_from_all_over_the_split(chatty: Path) -> None:
    table = {"prompt": [f"number {i}" for i in range(100)], "completion": [f"it is {i}" for i in range(100)]}

    _, found = made("causal-lm", chatty, table)
    assert found is not None
    assert found.rows == (1, 50, 100)
    assert found.prompts == ("number 0", "number 49", "number 99")
    assert found.expected == ("it is 0", "it is 49", "it is 99")
    assert found.options.max_new_tokens == 32, "half of the longest row"
    _, five = made("causal-lm", chatty, table, 5)
    assert five is not None
    assert len(five.rows) == 5
    assert made("causal-lm", chatty, table, 0)[1] is None


def test_a_row_without_room_for_an_answer_gives_way_to_the_next(chatty: Path) -> None:
    table = {"prompt": ["x" * 50, "y" * 50, "short", "", "last"], "completion": ["a", "b", "c", "d", "e"]}

    _, found = made("causal-lm", chatty, table)
    assert found is not None
    assert (found.rows, found.prompts) == ((3, 5), ("short", "last"))
    assert made("causal-lm", chatty, {"prompt": ["x" * 50] * 3, "completion": ["a"] * 3})[1] is None


def test_a_conversation_is_asked_up_to_its_last_answer_and_a_text_up_to_its_middle(chatty: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    _, found = made("causal-lm", chatty, {"messages": [talk]})
    assert found is not None
    assert (found.prompts, found.expected) == (("user\nhi\nassistant",), ("hello",))

    _, found = made("causal-lm", chatty, {"text": ["one two three four", "undivided"]})
    assert found is not None
    assert (found.prompts, found.expected) == (("one two", "undi"), (" three four", "vided"))


def test_other_kinds_have_no_samples() -> None:
    split = Split(table=pa.table({"text": ["a"], "label": ["good"]}), source="rows")
    assert choose_samples(classification(), split, None, Reading(max_length=8), None) is None


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_answers_are_written_by_step_and_again_by_a_continued_run(tmp_path: Path, chatty: Path, kind: str) -> None:
    folder = chatty if kind == "causal-lm" else write_tiny_seq2seq(tmp_path / "t5")
    names = ("prompt", "completion") if kind == "causal-lm" else ("document", "summary")
    task, found = made(kind, folder, dict(zip(names, (["one", "two", "three"], ["a", "b", "c"]), strict=True)))
    assert found is not None
    source = find_model(str(folder))
    model = load_model(source, task.auto_class, {}, source.config.dtype, 258).model.train()
    run = RunDirectory(tmp_path / "run")
    run.create()

    for step in (0, 2, 4, 2):
        found.answer(model, task, run, make_accelerator(), step)
    entries = run.sampled()
    assert model.training
    assert [(e["step"], e["row"]) for e in entries] == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3)]
    assert entries[:3] == [{**entry, "step": 0} for entry in entries[3:]], "the model has not changed"
    assert [e["expected"] for e in entries[:3]] == ["a", "b", "c"]
    assert {type(e["finished"]) for e in entries} == {bool}
