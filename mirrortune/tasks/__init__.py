# SPDX-License-Identifier: Apache-2.0
"""Code shared by the kinds of task: columns, encoding, losses, answers and metrics."""

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
