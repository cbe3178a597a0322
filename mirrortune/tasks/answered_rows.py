# SPDX-License-Identifier: Apache-2.0
"""Examples of a language model that are scored by the generated answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrortune.data.dataset import Split
from mirrortune.data.examples import IGNORE_INDEX, Rows, TokenExamples
from mirrortune.errors import DataError
from mirrortune.tasks.answer_formats import AnswerFormat, answer_format


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredExamples(TokenExamples):
    """Tokens of prompts and answers, scored by the loss of the tokens and by the answer generated after the prompt.

    Attributes:
        expected: reference answer of each row, in the normal form of ``format``.
        format: extracts answers from texts.
        tokenizer: decodes generated tokens.
        stops: ids of the tokens that end an answer.
        max_new_tokens: maximum length of a generated answer, in tokens.
    """

    expected: tuple[str, ...]
    format: AnswerFormat
    tokenizer: Any
    stops: tuple[int, ...]
    max_new_tokens: int

    def prompt(self, row: int) -> npt.NDArray[np.int64]:
        """Return the tokens of a row before its answer, the last run of tokens with a target."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        is_learned = self.features["targets"][start:end] != IGNORE_INDEX
        last = int(np.flatnonzero(is_learned)[-1])
        before = np.flatnonzero(~is_learned[:last])
        place = int(before[-1]) + 1 if len(before) else 1
        return self.features["input_ids"][start : start + place].astype(np.int64)

    @torch.no_grad()
    def generate(self, model: Any, rows: Rows, *, at_once: bool = False) -> list[str]:
        """Generate answers to the prompts of ``rows`` greedily.

        Args:
            model: a causal language model.
            rows: indices of the rows, (B,).
            at_once: call the model's ``generate`` once, as the processes of a sharded model must, with the maximum
                length that suits all rows; otherwise answers do not depend on the other rows of the batch.
        """
        prompts = {row: self.prompt(row) for row in rows.tolist()}
        room = {row: self._room(model, len(prompt)) for row, prompt in prompts.items()}
        if at_once:
            room = dict.fromkeys(room, min(room.values()))
        found: dict[int, str] = {}
        for most in sorted({*room.values()}):  # a single value, unless prompts come close to the model's maximum length
            here = [row for row in prompts if room[row] == most]
            found |= dict(zip(here, self._generate(model, [prompts[row] for row in here], most), strict=True))
        return [found[row] for row in rows.tolist()]

    def _generate(self, model: Any, prompts: list[npt.NDArray[np.int64]], max_new_tokens: int) -> list[str]:
        """Generate at most ``max_new_tokens`` after each prompt, in one batch with left padding."""
        ids, mask = _padded_left(prompts, self.tokenizer.pad_token_id or 0)
        device = next(model.parameters()).device
        width = ids.shape[1]
        written = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
            num_beams=1, do_sample=False, use_cache=True, eos_token_id=list(self.stops) or None,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )  # fmt: skip
        return [self._text(answer) for answer in written[:, width:].tolist()]

    def num_correct(self, row: int, text: str) -> int:
        """Return 1 if the answer in the generated text is the expected answer of the row, else 0."""
        return int(self.format.given(text) == self.expected[row])

    def _room(self, model: nn.Module, width: int) -> int:
        """Return how many tokens may follow a prompt of ``width`` tokens within the model's maximum length."""
        positions = getattr(model.config, "max_position_embeddings", None)
        return self.max_new_tokens if positions is None else max(1, min(self.max_new_tokens, positions - width))

    def _text(self, ids: Sequence[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.stops), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def expected_answers(texts: Sequence[str], answer: str, split: Split, numbers: Rows, column: str) -> tuple[str, ...]:
    """Extract the expected answers from reference texts, in the normal form of the format ``answer``.

    Args:
        texts: reference texts, one per row.
        answer: name of the format.
        split: split of the rows, for messages.
        numbers: indices of the rows in the split.
        column: column of the texts, for messages.

    Raises:
        DataError: a text has no answer in this format.
    """
    form = answer_format(answer)
    expected = [form.expected(text) for text in texts]
    if unread := [int(number) for number, text in zip(numbers, expected, strict=True) if text is None]:
        raise DataError(
            split.source, f"{len(unread)} of {len(numbers)} rows have no answer in the format '{answer}' in "
            f"column '{column}' ({split.places.listed(unread)})",
            fix="Name another format with task.answer, or correct these rows",
        )  # fmt: skip
    return tuple(filter(None, expected))


def _padded_left(prompts: list[npt.NDArray[np.int64]], fill: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left with ``fill``; return ids and attention mask, each (B, L)."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
