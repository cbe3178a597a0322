# SPDX-License-Identifier: Apache-2.0
"""What kinds of task share: columns, encoding, loss, answers, metrics."""

__all__ = [
    "answered_rows",
    "base",
    "chat",
    "conversations",
    "drawn_inputs",
    "metrics",
    "model_outputs",
    "objective",
    "per_class",
    "predicting",
    "probes",
    "prompts",
]
