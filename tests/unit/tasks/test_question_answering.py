# SPDX-License-Identifier: Apache-2.0
"""question-answering: windows over long contexts, where answers stand in them, and how answers are scored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError, NoRowsError
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict
from mirrortune.tasks.metrics import score
from mirrortune.tasks.predicting import PredictOptions
from tests.tiny_models import tiny_tokenizer

KIND = task_class("question-answering")
CONTEXT = "the old film was good , but the new movie was very very awful and so dull"
NONE: dict[str, list[Any]] = {"text": [], "answer_start": []}


def answer(text: str, start: int | None = None) -> dict[str, list[Any]]:
    """An answer as the Hub's data sets have them."""
    return {"text": [text], "answer_start": [CONTEXT.index(text) if start is None else start]}


def rows(*answers: Any, context: str = CONTEXT) -> pa.Table:
    """Questions about the context."""
    count = len(answers)
    return pa.table({"question": ["was it good ?"] * count, "context": [context] * count, "answers": list(answers)})


def encode(tokenizer: Any, table: pa.Table, max_length: int = 48, **settings: Any) -> tuple[Any, Any]:
    """The task and its examples."""
    task = KIND.from_rows(table, "squad.json", **settings)[0]
    return task, task.encode(Split(table=table, source="squad.json"), tokenizer, Reading(max_length=max_length))


def told(examples: Any, starts: list[int], ends: list[int], by: float = 9.0) -> Any:
    """Outputs of a model that names one token of every window."""
    mask = examples.batch(np.arange(len(examples)))["attention_mask"]
    logits = torch.zeros(2, *mask.shape)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        logits[0, row, start] = logits[1, row, end] = by
    return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])


def said(task: Any, examples: Any, outputs: Any) -> list[str]:
    """The answers that are made of a model's outputs."""
    batch = examples.batch(np.arange(len(examples)))
    judged = task.judge(None, batch, outputs, batch["targets"])
    return list(task.answers(judged, examples)[0])


def test_targets_are_the_tokens_of_the_answer(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows(answer("very very awful")))
    (start, end) = found.targets[0]
    assert tokenizer.decode(found.features["input_ids"][start : end + 1]) == "very very awful"
    assert said(task, found, told(found, [start], [end])) == ["very very awful"]


def test_targets_are_those_tokens_also_for_a_tokenizer_that_pads_on_the_left() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    table = pa.concat_tables([rows(answer("very very awful")), rows(answer("film", 2), context="a film")])
    batch = encode(tokenizer, table)[1].batch(np.arange(2))
    found = [
        tokenizer.decode(ids[start : end + 1])
        for ids, (start, end) in zip(batch["input_ids"], batch["targets"], strict=True)
    ]
    assert found == ["very very awful", "film"]


def test_every_window_knows_whether_it_has_the_answer(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows(answer("very very awful"), answer("film")), 16, stride=4)
    assert len(found) > 4
    assert found.lengths.max() <= 16
    texts = [
        tokenizer.decode(found.features["input_ids"][found.offsets[i] :][start : end + 1]) if end else ""
        for i, (start, end) in enumerate(found.targets)
    ]
    assert set(texts) == {"", "very very awful", "film"}
    right = told(found, found.targets[:, 0].tolist(), found.targets[:, 1].tolist())
    assert said(task, found, right) == ["very very awful", "film"]
    assert "2 questions, 2 of them read through several windows" in found.describe()


def test_every_word_of_the_context_is_in_a_window(tokenizer: Any) -> None:
    _, found = encode(tokenizer, rows(answer("film")), 16, stride=2)
    seen = {(low, high) for low, high in zip(found.references.starts, found.references.ends, strict=True) if high > 0}
    assert {CONTEXT[low:high] for low, high in seen} >= set(CONTEXT.split())


def test_no_answer_is_said_only_where_it_may_be(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows(answer("film"), NONE))
    assert task.may_lack_answer
    assert found.targets[1].tolist() == [0, 0]
    start, end = found.targets[0].tolist()
    assert said(task, found, told(found, [start, 0], [end, 0])) == ["film", ""]
    always, other = encode(tokenizer, rows(answer("film")))
    assert not always.may_lack_answer
    assert said(always, other, told(other, [0], [0])) != [""]


def test_spans_are_forwards_short_and_inside_the_context(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows(answer("film")))
    start, _ = found.targets[0].tolist()
    backwards = said(task, found, told(found, [start + 3], [start]))
    assert backwards[0] in CONTEXT
    in_question = said(task, found, told(found, [1], [2]))
    assert in_question[0] in CONTEXT


@pytest.mark.parametrize(
    "value", ["very very awful", ["very very awful", "awful"], [{"text": "awful", "answer_start": 3}]]
)
def test_answers_come_in_many_forms(tokenizer: Any, value: Any) -> None:
    _, found = encode(tokenizer, rows(value))
    assert found.targets[0].min() > 0


@pytest.mark.parametrize(("start", "place"), [(-1, 0), (None, 0), (0, 0), (2, 0), (8, 10), (10, 10), (40, 10)])
def test_an_answer_whose_place_is_wrong_is_the_nearest_of_its_text(
    tokenizer: Any, start: int | None, place: int
) -> None:
    table = rows({"text": ["film"], "answer_start": [start]}, context="film plot film")
    _, found = encode(tokenizer, table)
    assert found.references.starts[found.targets[0][0]] == place


def encode_training(tokenizer: Any, table: pa.Table) -> Any:
    """The training examples of a table."""
    task = KIND.from_rows(table, "squad.json")[0]
    split = Split(table=table, source="squad.json")
    return task.encode(split, tokenizer, Reading(max_length=48, for_training=True))


def test_rows_whose_answers_the_context_lacks_are_not_learned_as_unanswerable(tokenizer: Any) -> None:
    lost = {"text": ["VERY GOOD"], "answer_start": [4]}
    table = rows(lost, answer("film"), NONE, lost)
    learned = encode_training(tokenizer, table)
    assert learned.row_numbers.tolist() == [1, 2]
    assert learned.targets[0].min() > 0
    assert "; 2 whose context holds none of their answers: left out (rows 1, 4)" in learned.describe()
    _, scored = encode(tokenizer, table)
    assert scored.row_numbers.tolist() == [0, 1, 2, 3]
    assert "; 2 whose context holds none of their answers: scored" in scored.describe()
    with pytest.raises(NoRowsError, match=r"squad\.json: no context holds an answer of its question, as in squad"):
        encode_training(tokenizer, rows(lost, lost))


def test_a_blank_answer_is_none(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows({"text": [""], "answer_start": [0]}, answer("film")))
    assert task.may_lack_answer
    assert found.targets[0].tolist() == [0, 0]
    assert [answers for _, answers, _ in found.references.questions()] == [(), (("film", 8),)]


def test_the_loss_is_the_mean_of_both_ends(tokenizer: Any) -> None:
    task, found = encode(tokenizer, rows(answer("film"), answer("dull")))
    outputs = told(found, [0, 0], [0, 0], by=0.0)
    loss, items = task.loss(found.batch(np.arange(2)), outputs, torch.from_numpy(found.targets))
    assert items == 2
    assert float(loss) == pytest.approx(2 * np.log(outputs.start_logits.shape[1]))


def test_the_loss_of_a_window_does_not_depend_on_its_padding(tokenizer: Any) -> None:
    table = pa.table({"question": ["was it good ?"] * 2, "context": [CONTEXT, "the film was fun"],
                      "answers": [answer("film"), answer("film", 4)]})  # fmt: skip
    task, found = encode(tokenizer, table)
    batch = found.batch(np.arange(2))
    length = int(batch["attention_mask"][1].sum())
    logits = torch.randn(2, *batch["attention_mask"].shape, requires_grad=True)
    assert length < logits.shape[2]

    alone = found.batch(np.array([1]))
    own = SimpleNamespace(start_logits=logits[0, 1:, :length], end_logits=logits[1, 1:, :length])
    both = SimpleNamespace(start_logits=logits[0], end_logits=logits[1])
    first = SimpleNamespace(start_logits=logits[0, :1], end_logits=logits[1, :1])
    loss = task.loss(batch, both, batch["targets"])[0]
    rest = task.loss(found.batch(np.array([0])), first, batch["targets"][:1])[0]
    assert torch.allclose(loss - rest, task.loss(alone, own, alone["targets"])[0])
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 1, length:].any()


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "f1"),
    [
        ("The Film!", ("film",), 1.0, 1.0),
        ("a good film", ("film", "an old film"), 0.0, 2 / 3),
        ("", (), 1.0, 1.0),
        ("film", (), 0.0, 0.0),
        ("", ("film",), 0.0, 0.0),
        ("b", ("c",), 0.0, 0.0),
    ],
)
def test_answers_are_scored_as_squad_does(answer: str, truths: tuple[str, ...], exact: float, f1: float) -> None:
    found = score(("exact_match", "squad_f1"), [answer], [truths])
    assert found == pytest.approx({"exact_match": exact, "squad_f1": f1})


@pytest.mark.parametrize("start", [float("nan"), float("inf"), 1.5])
def test_the_place_of_an_answer_is_a_whole_number(start: float) -> None:
    table = rows({"text": ["film"], "answer_start": [start]})
    with pytest.raises(DataError, match=r"squad\.json row 1: answers are"):
        KIND.from_rows(table, "squad.json")[0].strata(Split(table=table, source="squad.json"))


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no columns of questions, contexts and answers; the columns are text"):
        KIND.from_rows(pa.table({"text": ["a"]}), "squad.json")
    with pytest.raises(DataError, match=r"1 of 2 rows have no answer in column 'answers' \(row 2\)"):
        encode(tokenizer, rows(answer("film"), None))
    with pytest.raises(ConfigError, match=r"data\.stride: got 40, windows have 64 tokens. Allowed: less than 32"):
        KIND.from_rows(rows(answer("film")), "squad.json", stride=40)[0].resolve_length(64, tokenizer, None)


def test_a_task_describes_itself() -> None:
    task = KIND.from_rows(rows(answer("film"), NONE), "squad.json")[0]
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task


def test_answers_do_not_begin_with_the_space_of_their_first_token() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "[CLS]", "[SEP]", "<pad>", "▁", *(f"▁{word}" for word in ("a", "film", "was", "good"))]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]")
    table = rows({"text": ["good"], "answer_start": [11]}, context="a film was good")
    task, found = encode(tokenizer, table)
    (start, end) = found.targets[0].tolist()
    outputs, batch = told(found, [start], [end]), found.batch(np.arange(1))
    judged = task.judge(None, batch, outputs, batch["targets"])

    answered = task.prediction_columns(judged, found, Split(table=table, source="squad.json"), PredictOptions())
    assert (answered["prediction"], answered["start"], answered["end"]) == (["good"], [11], [15])
    assert said(task, found, outputs) == ["good"]


def test_an_empty_cell_of_texts_is_no_answer(tokenizer: Any) -> None:
    """csv cannot express anything else."""
    table = rows("very very awful", None, "good")
    task, notes = KIND.from_rows(table, "squad.csv")
    assert "1 row with an empty 'answers': questions without an answer" in notes
    assert task.may_lack_answer
    split = Split(table=table, source="squad.csv")
    task.strata(split)
    found = task.encode(split, tokenizer, Reading(max_length=48, for_training=True))
    assert (len(found), found.num_unlabelled) == (3, 0)
    assert (found.targets == 0).all(axis=1).tolist() == [False, True, False]
    assert task.answers(list(np.zeros((3, 2, 48))), found)[1] == [("very very awful",), (), ("good",)]


def test_empty_cells_are_labels_that_are_missing_where_nothing_else_says_what_they_are(tokenizer: Any) -> None:
    table, unlabelled = rows("very very awful", "good"), rows(None, None).cast(rows("a").schema)
    task, _ = KIND.from_rows(table, "squad.csv")
    for own, split in ((task, rows("good", None)), (KIND.from_rows(rows("good", None), "a")[0], unlabelled)):
        with pytest.raises(DataError, match="no answer"):
            own.strata(Split(table=split, source="squad.csv"))
        kept = own.encode(Split(table=split, source="a"), tokenizer, Reading(max_length=48, allow_missing=True))
        assert kept.num_unlabelled > 0
    listed = rows(answer("good"), NONE, None)
    with pytest.raises(DataError, match=r"row 3"):
        KIND.from_rows(listed, "squad.json")[0].strata(Split(table=listed, source="squad.json"))


def test_a_null_beside_empty_texts_is_a_missing_label() -> None:
    """Unlike a csv, json and parquet tell them apart."""
    table = rows("good", "", None)
    task, notes = KIND.from_rows(table, "squad.jsonl")
    assert task.may_lack_answer
    assert not [note for note in notes if "without an answer" in note]
    with pytest.raises(DataError, match=r"no answer.*row 3"):
        task.strata(Split(table=table, source="squad.jsonl"))
