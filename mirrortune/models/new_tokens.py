# SPDX-License-Identifier: Apache-2.0
"""Add tokens to the tokenizer of a base model, and room for their embeddings to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mirrortune.adapters.plain import ADD_TOKENS, embedding_tables
from mirrortune.errors import ConfigError


def known_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Return those of ``tokens`` that a tokenizer has as single pieces already."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in tokens if token in vocabulary]


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """Add tokens to a tokenizer, in place; they are found in texts exactly as they are written.

    They are no special tokens: texts that the model writes show them.

    Raises:
        ConfigError: the tokenizer takes no new tokens, or does not number them one after another.
    """
    from transformers import AddedToken  # noqa: PLC0415  (a second to import)

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    token_rows(tokenizer, tokens)
    return tokenizer


def token_rows(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, int]:
    """Return the first id of tokens that were added to a tokenizer, and one more than the last.

    Raises:
        ConfigError: see :func:`add_tokens`.
    """
    vocabulary = tokenizer.get_vocab()
    found = sorted(vocabulary.get(token, -1) for token in tokens)
    if found != list(range(found[0], found[0] + len(tokens))) or found[0] < 0:
        problem = f"{type(tokenizer).__name__} does not take them as new tokens (their ids are {found[:3]})"
        raise ConfigError(ADD_TOKENS, problem, fix="Remove it")
    return found[0], found[-1] + 1


@torch.no_grad()
def make_room(model: nn.Module, first: int, stop: int) -> nn.Module:
    """Give a model rows of embeddings up to the token ``stop - 1``, in place; those from ``first`` on are the mean of
    all before them, in input and output embeddings.

    Raises:
        ConfigError: the model has no embeddings of tokens, or they cannot be made longer.
    """
    count = embedding_tables(model)[0].shape[0]
    resize: Any = getattr(model, "resize_token_embeddings", None)
    if stop > count:
        with torch.random.fork_rng(devices=[]):  # it draws numbers, which are replaced
            try:
                resize(stop, mean_resizing=False)
            except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
                problem = f"the embeddings of {type(model).__name__} cannot be made longer ({error})"
                raise ConfigError(ADD_TOKENS, problem, fix="Remove it") from error
    for table in embedding_tables(model):
        known = min(first, count)
        table[known:stop] = table[:known].double().mean(dim=0).to(table.dtype)
    return model
