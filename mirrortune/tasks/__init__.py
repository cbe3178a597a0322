# SPDX-License-Identifier: Apache-2.0
"""What kinds of task share: columns, encoding, loss, answers, metrics."""

__all__ = [
    "answered_rows",
    "base",
    "chat",
    "classes",
    "conversations",
    "drawn_inputs",
    "metrics",
    "model_outputs",
    "objective",
    "predicting",
    "probes",
    "prompts",
]
