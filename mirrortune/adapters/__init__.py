# SPDX-License-Identifier: Apache-2.0
"""Adapters: their mathematics, the layers they go into, and their files. Knows no task, data or command."""

__all__ = [
    "core",
    "effect",
    "factor_cache",
    "files",
    "fingerprint",
    "inject",
    "kinds",
    "layer_patterns",
    "layers",
    "layout",
    "methods",
    "pairings",
    "peft_bridge",
    "spec",
    "strategies",
    "svd",
    "targets",
]
