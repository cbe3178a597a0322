# SPDX-License-Identifier: Apache-2.0
"""Write prompts without a chat template, and generate text for prompts, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import LogitsProcessor
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, IntArray, Padding, Rows, TokenExamples
from mirrortune.data.files.arrow import cells
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.token_cache import ragged
from mirrortune.errors import DataError
from mirrortune.system.devices import to_float64
from mirrortune.tasks.conversations import Message, conversation
from mirrortune.tasks.predicting import Predictions, PredictOptions

# The wording of Stanford Alpaca, which is common for models without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
Around = Callable[[Rows, int], AbstractContextManager[None]]
"""(rows of the examples, number of rows of the model's batch) -> context manager entered while the model runs."""


def unchanged(rows: Rows, count: int) -> AbstractContextManager[None]:
    """Return a context manager without effect."""
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A generated text: its tokens without the end token, and whether an end token was generated."""

    ids: list[int]
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptExamples(TokenExamples):
    """Prompts without answers.

    Attributes:
        tokenizer: decodes generated tokens.
        options: options of sampling.
        max_new_tokens: maximum length of a generated text, in tokens.
        stops: ids of the tokens that end a text; empty to use those of the model.
        is_continued: whether the model continues the prompt (a decoder) or encodes it (an encoder and decoder).
        numbers: index of each row for sampling, (N,); None to count from ``options.first_row``.
    """

    tokenizer: Any
    options: PredictOptions
    max_new_tokens: int
    stops: tuple[int, ...] = ()
    is_continued: bool
    numbers: Rows | None = None

    @property
    @override
    def lengths(self) -> IntArray:
        """Number of positions of each row, including the maximum number of generated tokens."""
        return np.diff(self.offsets) + self.max_new_tokens

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return ``input_ids`` and ``attention_mask`` of the given rows, (B, L) each."""
        made = TokenExamples.batch(self, rows)
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def generate(self, model: Any, rows: Rows, around: Around = unchanged, *, at_once: bool = False) -> list[Written]:
        """Generate a text for each of the given rows.

        Args:
            model: a language model.
            rows: indices of the rows, (B,).
            around: makes the context in which the model runs.
            at_once: call the model's ``generate`` once, as the processes of a sharded model must, with the maximum
                length that suits all rows; otherwise texts do not depend on the other rows of the batch.
        """
        room = self._room(model, rows)
        if at_once:
            room[:] = room.min()
        found: dict[int, Written] = {}
        for most in np.unique(room):  # a single value, unless prompts come close to the model's maximum length
            here = rows[room == most]
            with around(here, len(here)):
                found |= dict(zip(here.tolist(), self._generate(model, here, int(most)), strict=True))
        return [found[row] for row in rows.tolist()]

    def _generate(self, model: Any, rows: Rows, max_new_tokens: int) -> list[Written]:
        device = next(model.parameters()).device
        batch = {name: values.to(device) for name, values in self.batch(rows).items()}
        stops = self.stops or _own_stops(model)
        numbers = self.options.first_row + rows if self.numbers is None else self.numbers[rows]
        made = model.generate(
            **batch, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False, use_cache=True,
            eos_token_id=list(stops) or None, pad_token_id=self.padding.fill["input_ids"],
            logits_processor=[RowSampler(self.options, numbers)] if self.options.is_sampled else None,
        )  # fmt: skip
        begin = batch["input_ids"].shape[1] if self.is_continued else 1
        return [_until(ids, stops) for ids in made[:, begin:].tolist()]

    def _room(self, model: Any, rows: Rows) -> IntArray:
        """Return the number of tokens that may be generated for each row, (B,), limited by the model's positions."""
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is None:
            return np.full(len(rows), self.max_new_tokens)
        taken = np.diff(self.offsets)[rows] if self.is_continued else np.zeros(len(rows), dtype=np.int64)
        return np.asarray(np.clip(positions - taken, 1, self.max_new_tokens))

    def columns(self, written: Sequence[Written], *, strip: bool = True) -> Predictions:
        """Return generated texts as the column ``prediction``, and as ``finished`` whether the model ended each."""
        texts = [str(self.tokenizer.decode(text.ids, skip_special_tokens=True)) for text in written]
        return {
            "prediction": [text.strip() for text in texts] if strip else texts,
            "finished": [text.is_finished for text in written],
        }


class RowSampler(LogitsProcessor):
    """Sample each row with its own random numbers, and mask all other tokens.

    transformers samples a complete batch at once, so the text of a row would depend on the other rows of the batch.

    Args:
        options: temperature, top_p and seed.
        numbers: index of each row of the batch among all rows, (B,).
    """

    def __init__(self, options: PredictOptions, numbers: Rows) -> None:
        self._temperature = 1.0 if options.temperature is None else options.temperature
        self._top_p = 1.0 if options.top_p is None else options.top_p
        self._draws = [np.random.default_rng([options.seed, number]) for number in numbers.tolist()]

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw a token from the softmax of ``scores`` (B, V), and return them with minus infinity for all others."""
        shares = (to_float64(scores) / self._temperature).softmax(dim=-1)
        order: Tensor | None = None
        if self._top_p < 1:
            shares, order = shares.sort(dim=-1, descending=True, stable=True)
            shares = shares * (shares.cumsum(dim=-1) - shares < self._top_p)
        ends = shares.cumsum(dim=-1)
        drawn = torch.tensor([[draw.random()] for draw in self._draws], dtype=ends.dtype, device=ends.device)
        # Draws are below 1, so a token of probability 0 is never the first to exceed one.
        chosen = torch.searchsorted(ends, drawn * ends[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        token = chosen if order is None else order.gather(1, chosen)
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0.0)


def alpaca_prompt(instruction: str, context: str) -> str:
    """Return the prompt for an instruction and an optional input in the format of Stanford Alpaca."""
    if not context.strip():
        return f"{_ALPACA.format('')}### Instruction:\n{instruction}\n\n### Response:\n"
    more = ", paired with an input that provides further context"
    return f"{_ALPACA.format(more)}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def asked_text(
    layout: str, texts: Sequence[str], added: dict[str, Any], where: str
) -> tuple[str, list[Message]]:  # fmt: skip
    """Return the prompt and the earlier turns of a row that is not formatted by a chat template.

    Earlier turns have a ``weight`` of 1, or 0 for those that are not learned.
    """
    if layout == "text":
        return texts[0], []
    prompt = alpaca_prompt(texts[0], "".join(texts[1:])) if layout == "alpaca" else texts[0]
    before: list[Message] = []
    if any(added.values()):
        turns: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        talk = conversation(turns, added, where)
        before = [{**m, "weight": float(i not in talk.given)} for i, m in enumerate(talk.messages[:-2])]
    if layout == "alpaca":
        before = [{**m, "content": alpaca_prompt(m["content"], "")} if m["role"] == "user" else m for m in before]
    return prompt, before


def halved_texts(split: Split, column: str) -> tuple[Split, list[str]]:
    """Split the texts of a column in half at a space; return the rows with the first halves, and the second halves."""
    texts = [str(cell or "") for cell in cells(split.table, column)]
    places = [text.rfind(" ", 1, len(text) // 2 + 1) for text in texts]
    places = [len(text) // 2 if place < 0 else place for text, place in zip(texts, places, strict=True)]
    begun = pa.array([text[:place] for text, place in zip(texts, places, strict=True)], pa.string())
    table = split.table.set_column(split.table.column_names.index(column), column, begun)
    return replace(split, table=table), [text[place:] for text, place in zip(texts, places, strict=True)]


def prompt_examples(
    prompts: Sequence[Sequence[int]], places: RowPlaces, tokenizer: Any, options: PredictOptions, *,
    max_length: int, max_new_tokens: int, stops: tuple[int, ...], cut: bool,
) -> PromptExamples:  # fmt: skip
    """Create examples from prompts that a model continues, padded on the left.

    Args:
        prompts: token ids of each row.
        places: places of the rows, for messages.
        tokenizer: a transformers tokenizer.
        options: options of sampling.
        max_length: maximum length of a prompt, in tokens.
        max_new_tokens: maximum length of a generated text, unless ``options`` sets it.
        stops: ids of the tokens that end an answer.
        cut: keep the last ``max_length`` tokens of longer prompts instead of raising an error.

    Raises:
        DataError: a prompt is too long, unless ``cut``.
    """
    long = [row for row, ids in enumerate(prompts) if len(ids) > max_length]
    if long and not cut:
        most = max(len(prompts[row]) for row in long)
        raise DataError(
            places.source, f"{len(long)} of {len(prompts)} prompts are too long, up to {most:,} tokens "
            f"({places.listed(long)})",
            allowed=f"{max_length:,} tokens", fix="Raise --max-length, or shorten them",
        )  # fmt: skip
    flat, offsets = ragged([ids[-max_length:] for ids in prompts])
    return PromptExamples(
        features={"input_ids": flat}, offsets=offsets, targets=None, max_length=max_length,
        padding=Padding(side="left", fill={"input_ids": tokenizer.pad_token_id or 0}), num_truncated=len(long),
        num_unlabelled=len(prompts), tokenizer=tokenizer, options=options, stops=stops, is_continued=True,
        max_new_tokens=options.max_new_tokens or max_new_tokens,
    )  # fmt: skip


def _own_stops(model: Any) -> tuple[int, ...]:
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)


def _until(ids: list[int], stops: Sequence[int]) -> Written:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Written(ids=ids[:end], is_finished=end is not None)
