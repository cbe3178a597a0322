# SPDX-License-Identifier: Apache-2.0
"""Implement adapters: their mathematics, the layers they change, and their files, independent of tasks and data."""

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
    "plain",
    "spec",
    "strategies",
    "svd",
    "targets",
]
