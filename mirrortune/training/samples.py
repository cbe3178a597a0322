# SPDX-License-Identifier: Apache-2.0
"""Let the model answer a few validation prompts at every evaluation, so that users can see what it learns."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Examples
from mirrortune.data.token_cache import uncached
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError, cut_after
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import Generates, Task, WritesText, generated_tokens
from mirrortune.tasks.predicting import PredictOptions
from mirrortune.training.evaluate import judge_split

DEFAULT_COUNT = 3
_LONGEST = 128  # tokens of an answer
_MOST_TRIES = 20  # rows tried instead of one whose prompt is too long
_LONGEST_TEXT = 1000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Prompts to answer.

    Attributes:
        rows: row numbers in the validation split, starting at 1.
        prompts: texts of the prompts.
        expected: texts of the reference answers.
        split: rows of the prompts.
        examples: encoded prompts.
        options: options of generation: greedy, with a maximum length.
    """

    rows: tuple[int, ...]
    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    split: Split
    examples: Examples
    options: PredictOptions

    def answer(self, model: nn.Module, task: Task, run: RunDirectory, accelerator: Any, step: int) -> None:
        """Answer the prompts greedily in one batch and write the answers to ``samples.jsonl``; called on all ranks.

        Entries of this step and later ones are replaced, because a continued run generates them again.
        """
        # A compiled model would be recompiled for every length of prompt and answer.
        is_compiled = getattr(model, "_compiled_call_impl", None) is not None
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            judged = judge_split(model, task, self.examples, accelerator, batch_size=len(self.rows))
        if not accelerator.is_main_process:
            return
        found = task.prediction_columns(judged, self.examples, self.split, self.options)
        answers, finished = found["prediction"], found["finished"]
        entries = [entry for entry in run.sampled() if entry["step"] < step]
        for row, *texts, is_finished in zip(self.rows, self.prompts, self.expected, answers, finished, strict=True):
            prompt, expected, answer = (cut_after(text, _LONGEST_TEXT) for text in texts)
            entries.append({"step": step, "row": row, "prompt": prompt, "expected": expected, "answer": answer,
                            "finished": is_finished})  # fmt: skip
        run.write_lines(run.samples.name, entries)


def choose_samples(
    task: Task, validation: Split, processor: Any, reading: Reading, count: int | None
) -> Samples | None:  # fmt: skip
    """Choose validation rows that are spread over the split, independent of the seed.

    Args:
        task: task of the run.
        validation: validation rows.
        processor: processor of the task.
        reading: how validation rows are read.
        count: number of prompts, or None for the default of the task.

    Returns:
        The prompts, or None if there are none or none leaves room for an answer.
    """
    if count == 0 or not isinstance(task, WritesText):
        return None
    options = PredictOptions(max_new_tokens=_longest_answer(task, reading.num_tokens), temperature=0.0)
    if not isinstance(task, Generates):  # prompt and answer share the positions
        reading = replace(reading, max_length=reading.num_tokens - (options.max_new_tokens or 0))
    found: dict[int, Split] = {}
    total = validation.table.num_rows
    for first in np.linspace(0, total - 1, min(count or DEFAULT_COUNT, total)).astype(int).tolist():
        for row in range(first, min(first + _MOST_TRIES, total)):
            if row not in found and _encoded(task, one := _row(validation, [row]), processor, reading, options):
                found[row] = one
                break
    if not found:
        return None
    split, expected = task.asked(_row(validation, sorted(found)))
    examples = _encoded(task, _row(validation, sorted(found)), processor, reading, options)
    assert examples is not None
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = [examples.input_ids(row) for row in range(len(examples))]
    prompts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids if row is not None]
    return Samples(
        rows=tuple(row + 1 for row in sorted(found)), prompts=tuple(prompts), expected=tuple(expected), split=split,
        examples=examples, options=options,
    )  # fmt: skip


def _longest_answer(task: Task, max_length: int) -> int:
    own = generated_tokens(task) or _LONGEST
    return max(1, min(_LONGEST, own, max_length // 2))


def _row(split: Split, rows: list[int]) -> Split:
    return split.take(np.isin(np.arange(split.table.num_rows), rows))


def _encoded(task: Task, split: Split, processor: Any, reading: Reading, options: PredictOptions) -> Examples | None:
    """Encode rows, or return None if a prompt is empty or too long."""
    assert isinstance(task, WritesText)
    with uncached():
        try:
            return task.encode_to_predict(task.asked(split)[0], processor, reading, options)
        except DataError:
            return None
