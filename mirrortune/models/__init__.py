# SPDX-License-Identifier: Apache-2.0
"""Find base models, and load them through transformers' Auto classes or read them tensor by tensor."""

__all__ = [
    "dropout", "gaps", "load", "load_errors", "new_tokens", "parts", "pooling", "quantized", "skeleton", "tensors",
]  # fmt: skip
