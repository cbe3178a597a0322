# SPDX-License-Identifier: Apache-2.0
"""Nested rows and columns of conversations from the command line: what the model will see is what the file has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirrortune.data.dataset import load_data
from mirrortune.data.files.arrow import cells
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace
from mirrortune.tasks.conversations import asked_conversation
from mirrortune.tasks.kinds.causal_lm import Task
from mirrortune.tasks.token_scores import weighted_loss
from tests.cli.console import Outcome, mirrortune
from tests.tiny_models import CHATML, TOOL_CHATML, write_tiny_causal

TALKS = [
    [{"role": "user", "content": "paris"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "paris", "days": None}}}]}],
    [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": [1, "two", {"c": 3.5}], "b": 2}}}]}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose template writes tools and calls."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "tools", template=TOOL_CHATML)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose template does not."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "chat", template=CHATML)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without a template."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "bare", template=None)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines, or one array of them."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")
    return path


def prepare(model: Path, data: object, *words: object) -> Outcome:
    """A dry run that shows all rows."""
    return mirrortune("prepare", "-m", model, "-t", "causal-lm", "-d", data, "--dry-run", "--show", 9, *words)


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.json"])
def test_nested_values_are_those_of_the_file(desk: Path, name: str) -> None:
    """Not a union of keys with nulls, and not only values of one type."""
    write(desk / name, [{"messages": talk, "meta": {"n": i}, "mixed": [i, "a"]} for i, talk in enumerate(TALKS)])
    table = load_data(DataPlace.parse(name)).splits["train"].table
    assert list(cells(table, "messages")) == TALKS
    assert list(cells(table, "meta")) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert list(cells(table, "mixed")) == [[0, "a"], [1, "a"], [2, "a"]]


def test_nested_values_of_files_that_differ_are_joined(desk: Path) -> None:
    """A column may be flat objects of text, or all null, in one file and nested in the next."""
    parts: list[list[Any]] = [[{"a": "x"}, None], [{"a": [1]}], [None]]
    for number, values in enumerate(parts):
        write(desk / f"part{number}.jsonl", [{"v": value, "text": "t"} for value in values])
    table = load_data(DataPlace.parse("part*.jsonl")).splits["train"].table
    assert list(cells(table, "v")) == [{"a": "x"}, None, {"a": [1]}, None]


def test_in_parquet_a_null_in_a_struct_is_a_key_that_the_row_lacks(desk: Path) -> None:
    rows = [{"messages": talk} for talk in ([{"role": "user", "content": "a", "name": "x"}], [{"role": "user"}])]
    pq.write_table(pa.Table.from_pylist(rows), desk / "rows.parquet")
    table = load_data(DataPlace.parse("rows.parquet")).splits["train"].table
    assert list(cells(table, "messages")) == [row["messages"] for row in rows]


def test_answers_and_translations_stay_what_they_were(desk: Path) -> None:
    answers = [{"text": ["a"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    write(desk / "qa.jsonl", [{"answers": a, "translation": {"en": "x", "ro": "y"}} for a in answers])
    table = load_data(DataPlace.parse("qa.jsonl")).splits["train"].table
    assert list(cells(table, "answers")) == answers
    assert {"translation.en", "translation.ro"} <= set(table.column_names)


def test_tools_and_calls_are_shown_to_the_model(desk: Path, chatty: Path, plain: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
    rows = [{"messages": TALKS[i % 3], "tools": tools if i % 2 else None, "id": i, "note": "n"} for i in range(12)]
    write(desk / "rows.jsonl", rows)

    outcome = prepare(chatty, "rows.jsonl")

    assert outcome.exit_code == 0, outcome.stderr
    assert "  also read: tools" in outcome.stderr
    assert "  columns not used: id, note" in outcome.stderr
    assert json.dumps(tools[0]) in outcome.stderr
    assert '{"name": "weather", "arguments": {"city": "paris", "days": null}}</call><|im_end|>' in outcome.stderr
    assert '{"name": "add", "arguments": {"a": [1, "two", {"c": 3.5}], "b": 2}}</call><|im_end|>' in outcome.stderr
    refused = prepare(plain, "rows.jsonl")
    assert refused.exit_code == 3
    assert "rows have tool calls, which the model's chat template does not write (lines 1, 2, " in refused.said
    write(desk / "hello.jsonl", [{"messages": TALKS[2], "tools": tools}] * 8)
    said = prepare(plain, "hello.jsonl").said
    assert "the tools are not shown to the model" in said
    assert "generation prompt" not in said


def test_answers_that_are_asked_for_differently_are_reported(desk: Path) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    model = write_tiny_causal(desk / "thinking", template=template)
    write(desk / "rows.jsonl", [{"messages": TALKS[2]}] * 8)
    said = prepare(model, "rows.jsonl").said
    assert said.count(r"the chat template's generation prompt is '<|im_start|>assistant\n<think>\n', which") == 1


def test_fields_of_turns_that_are_not_used_are_named(desk: Path, plain: Path) -> None:
    answer = {"role": "assistant", "content": "hello", "score": 5, "train_detail": [{"train": False}], "train": True}
    write(desk / "rows.jsonl", [{"messages": [TALKS[2][0], answer]}] * 8)
    for _ in range(2):  # the second time, the counts come from the cache
        assert prepare(plain, "rows.jsonl").said.count("fields of turns not used: score, train_detail") == 2


def test_reasoning_that_the_template_does_not_write_is_reported_with_its_rows(desk: Path, plain: Path) -> None:
    more = [{"reasoning_content": "since"}, {"thinking": "so"}, {"thinking": ""}, {}]
    write(desk / "train.jsonl", [{"messages": [TALKS[2][0], {**TALKS[2][1], **more[i % 4]}]} for i in range(12)])
    write(desk / "validation.jsonl", [{"messages": TALKS[2]}])
    said = prepare(plain, ".").said
    for name in ("reasoning_content", "thinking"):
        assert said.count(f"the reasoning of answers ('{name}' in 3 rows) is left out: the chat template does not") == 1
    assert "of turns not used" not in said


def test_turns_marked_as_not_learned_are_shown_so(desk: Path, plain: Path) -> None:
    asked, bad = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}
    good = {"role": "assistant", "content": "good"}
    turns = [asked, {**bad, "train": False}, asked, {**good, "train": True}]
    write(desk / "messages.jsonl", [{"messages": turns}] * 8)
    write(desk / "pairs.jsonl", [{"prompt": turns[:1], "completion": [{**bad, "loss": False}, asked, good]}] * 8)
    for name in ("messages.jsonl", "pairs.jsonl"):
        assert "learned: good<|im_end|> " in prepare(plain, name).said


def test_empty_answers_are_refused_with_a_count(desk: Path, plain: Path) -> None:
    rows = [{"prompt": "a", "completion": "" if i < 2 else "b"} for i in range(9)]
    write(desk / "train.jsonl", rows)
    (desk / "data").mkdir()
    write(desk / "data" / "train.jsonl", rows)
    write(desk / "data" / "validation.jsonl", rows[2:])
    for words in ([], ["task.format=chat"]):
        outcome = prepare(plain, "data", *words)
        assert outcome.exit_code == 3
        assert "2 of 9 rows have an empty answer, of which only its end would be learned (lines 1, 2)" in outcome.said


def test_system_history_and_weight_of_a_row_are_used(desk: Path, plain: Path) -> None:
    own = {"system": "Be brief.", "history": [["a", "b"]], "prompt": "c", "completion": "d"}
    write(desk / "rows.jsonl", [{**own, "weight": w} for w in (1, 0, 1, 1, 1, 1e-7, 1, 1)])
    outcome = prepare(plain, "rows.jsonl", "task.format=chat", "data.validation_fraction=0.3")
    assert "also read: system, history, weight" in outcome.stderr
    assert "<|im_start|>system Be brief.<|im_end|> <|im_start|>user a<|im_end|>" in outcome.said
    assert "learned: b<|im_end|>d<|im_end|>" in outcome.said
    assert "2 left out: their weight is 0" in outcome.said, "a weight below half a millionth counts as 0"
    as_text = prepare(plain, "rows.jsonl", "task.format=text").said
    assert "text: Be brief. a b c d<|im_end|>" in as_text


def test_turns_that_ask_and_turns_that_answer_in_two_columns(desk: Path, plain: Path) -> None:
    """TRL's form of conversations; a list must not be learned as Python writes it."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    write(desk / "rows.jsonl", [{"prompt": before, "completion": [{"role": "assistant", "content": "done"}]}] * 8)
    assert "learned: done<|im_end|>" in prepare(plain, "rows.jsonl").said


@pytest.mark.parametrize("packing", ["false", "true"])
def test_weights_count_in_training(desk: Path, plain: Path, packing: str) -> None:
    rows = [{"prompt": "a", "completion": "b" * i, "weight": i / 2} for i in range(1, 9)]
    write(desk / "rows.jsonl", rows)
    words = ["-m", plain, "-t", "causal-lm", "-d", "rows.jsonl", "--max-steps", 1, f"data.packing={packing}"]
    outcome = mirrortune("train", *words, "-o", "run", "--json")
    assert outcome.exit_code == 0, outcome.stderr


def test_the_loss_is_the_mean_by_weight() -> None:
    import torch

    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    weights = torch.tensor([[2_000_000] * 4, [500_000] * 4])
    loss, items = weighted_loss(logits, torch.stack([ids, weights], dim=1))
    task = Task(text_columns=("text",), label_column=None, layout="text", loss_on="all", format="auto", packing=False,
                metric_names=("perplexity",), selection_metric="perplexity")  # fmt: skip
    output = type("Output", (), {"logits": logits})
    apart = [task.loss({}, type("Output", (), {"logits": logits[i : i + 1]}), ids[i : i + 1]) for i in range(2)]
    assert float(loss) == pytest.approx(float(2 * apart[0][0] + 0.5 * apart[1][0]), rel=1e-5)
    assert float(items) == 2 * 3 + 0.5 * 3
    assert task.loss({}, output, torch.stack([ids, weights], dim=1))[0] == loss


ASKED = [{"role": "user", "content": "hi"}]
SAID = [{"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [(ASKED, "yo", "yo"), ("hi", SAID, "yo"), (json.dumps(ASKED), '[{"name": 1}]', '[{"name": 1}]'),
     (ASKED, "[1]", "[1]")],
)  # fmt: skip
def test_a_text_beside_messages_is_one_turn(
    desk: Path, plain: Path, prompt: Any, completion: Any, learned: str
) -> None:  # fmt: skip
    """It was joined to the messages in Python's notation."""
    write(desk / "rows.jsonl", [{"prompt": prompt, "completion": completion}] * 4)
    out = prepare(plain, "rows.jsonl").stderr
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + learned in out
    assert f"learned: {learned}<|im_end|>" in out


@pytest.mark.parametrize(
    "row", [{"prompt": "hi", "completion": ["a", "b"]}, {"prompt": ["a"], "completion": "b"}, {"text": ["a", "b"]},
            {"instruction": "a", "output": [{"c": 1}]}],
)  # fmt: skip
def test_lists_are_not_learned_as_text(desk: Path, plain: Path, row: dict[str, Any]) -> None:
    write(desk / "rows.jsonl", [row] * 4)
    out = prepare(plain, "rows.jsonl")
    assert out.exit_code == 3
    assert "rows.jsonl:1: got " in out.stderr


@pytest.mark.parametrize(
    ("context", "answer"), [("context", "response"), ("input", "response"), ("context", "output"), ("input", "output")]
)
def test_what_belongs_to_an_instruction_is_shown(desk: Path, plain: Path, context: str, answer: str) -> None:
    """Dolly's rows have a context and a response."""
    write(desk / "rows.jsonl", [{"instruction": "sum", context: "1 2", answer: "3"}] * 4)
    assert "user\nsum\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>" in prepare(plain, "rows.jsonl").stderr


def test_passages_in_a_context_are_not_shown(desk: Path, plain: Path) -> None:
    """They are lists, which are no text; such rows were refused."""
    write(desk / "rows.jsonl", [{"instruction": "sum", "context": ["1", "2"], "response": "3"}] * 4)
    out = prepare(plain, "rows.jsonl")
    assert "text: sum\n3<|im_end|>" in out.stderr, out.said
    assert "column not used: context" in out.stderr


@pytest.mark.parametrize("answer", ['[{"name": "add", "arguments": {}}]', '[{"value": 3}]', '[{"role": "king"}]'])
@pytest.mark.parametrize("words", [(), ("--text-column", "prompt", "--label-column", "completion")])
def test_answers_in_json_are_no_messages(desk: Path, bare: Path, answer: str, words: tuple[str, ...]) -> None:
    """A base model, without a chat template, learns them as they are."""
    write(desk / "rows.jsonl", [{"prompt": "hi", "completion": answer}] * 4)
    out = prepare(bare, "rows.jsonl", *words)
    assert f"learned: {answer}" in out.stderr, out.said


@pytest.mark.parametrize("name", ["dialog", "conversations"])
def test_a_conversation_of_texts_is_refused(desk: Path, plain: Path, name: str) -> None:
    """No other column is learned in its place, such as an id."""
    write(desk / "rows.jsonl", [{"id": "a1", name: ["hi", "yo"]}] * 4)
    out = prepare(plain, "rows.jsonl")
    assert out.exit_code == 3
    assert "rows.jsonl:1: a turn of the conversation is 'hi'" in out.stderr


def test_other_columns_beside_messages_in_prompt_and_completion(desk: Path, plain: Path) -> None:
    """They ended in a traceback (KeyError)."""
    write(desk / "rows.jsonl", [{"id": 1, "system": "brief", "prompt": ASKED, "completion": SAID}] * 4)
    out = prepare(plain, "rows.jsonl")
    assert "system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo" in out.stderr, out.said


def test_keys_of_a_turn_in_json_text_have_any_order() -> None:
    turns = [{"id": 1, "role": "user", "content": "a {b}"}]
    for text, expected in ((json.dumps(turns), "a {b}"), ("[a] b", "[a] b"), ('[{"n": 1}]', '[{"n": 1}]')):
        assert asked_conversation("messages", [text], {}, "row 1", "").messages[0]["content"] == expected
    for text in ("[]", '[{"role": "user", "content": "a'):
        with pytest.raises(DataError, match="row 1"):
            asked_conversation("messages", [text], {}, "row 1", "")


def test_roles_of_unknown_speakers_are_reported(desk: Path, plain: Path) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}, {"from": "gpt", "value": "c"}]
    write(desk / "rows.jsonl", [{"conversations": talk}] * 4)
    assert "turns of 'bing' (3 rows) are not learned: answers have the role" in prepare(plain, "rows.jsonl").stderr
    assert "not learned" not in prepare(plain, "rows.jsonl", "task.loss_on=all").stderr
