# SPDX-License-Identifier: Apache-2.0
"""Trained adapters in use: rows answered by one, and many of them on one base model."""

__all__ = [
    "bank",
    "bank_answers",
    "chat",
    "predict",
    "prediction_rows",
    "speakers",
]
