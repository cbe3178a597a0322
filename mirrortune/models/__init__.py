# SPDX-License-Identifier: Apache-2.0
"""Base models by transformers' Auto classes: found, loaded whole, or read tensor by tensor."""

__all__ = ["dropout", "load", "load_errors", "parts", "pooling", "quantized", "skeleton", "tensors"]
