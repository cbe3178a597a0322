# SPDX-License-Identifier: Apache-2.0
"""Use trained adapters: predict rows, hold conversations, and serve many adapters on one base model."""

__all__ = [
    "bank",
    "bank_answers",
    "chat",
    "predict",
    "prediction_rows",
    "speakers",
]
