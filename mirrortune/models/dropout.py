# SPDX-License-Identifier: Apache-2.0
"""Change the dropout of a base model through its configuration; it affects training only, so no file records it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource

# BERT's hidden_dropout_prob and attention_probs_dropout_prob, GPT-2's attn_pdrop, T5's dropout_rate, BART's dropout.
_NAMES = re.compile(r"(?:.*_)?(?:dropout|dropout_prob|dropout_rate|dropout_p|pdrop)")


def with_dropout(source: ModelSource, probability: float) -> ModelSource:
    """Return ``source`` with every dropout probability of its configuration and sub-configurations set.

    Raises:
        ConfigError: the configuration has no dropout.
    """
    described = source.config.to_dict()
    if not _set(described, probability):
        raise ConfigError(
            "model.dropout", f"the configuration of '{source.name}' has no dropout, got {probability}", fix="Remove it"
        )
    return replace(source, config=type(source.config).from_dict(described))


def _set(described: dict[str, Any], probability: float) -> int:
    """Set the dropout probabilities of a configuration in place and return how many were set.

    A value of None, as in ``classifier_dropout``, is kept, since it follows another dropout.
    """
    count = 0
    for key, value in described.items():
        if isinstance(value, dict):
            count += _set(value, probability)
        elif isinstance(value, int | float) and not isinstance(value, bool) and _NAMES.fullmatch(str(key)):
            described[key] = probability
            count += 1
    return count
