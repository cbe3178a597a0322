# SPDX-License-Identifier: Apache-2.0
"""From a place to rows, and from rows to batches."""

__all__ = [
    "columns",
    "dataset",
    "draws",
    "duplicates",
    "examples",
    "files",
    "labels",
    "loader",
    "loose",
    "mixture",
    "stream",
    "token_cache",
    "tokenize",
]
