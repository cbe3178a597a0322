# SPDX-License-Identifier: Apache-2.0
"""From a place to rows, and from rows to batches."""

__all__ = [
    "columns",
    "dataset",
    "duplicates",
    "examples",
    "files",
    "labels",
    "loader",
    "loose",
    "stream",
    "token_cache",
    "tokenize",
]
