# SPDX-License-Identifier: Apache-2.0
"""Take a run from its recipe to its results: check, size, fit, train, evaluate."""

__all__ = ["adapted_base", "checks", "evaluate", "find_lr", "job", "prepare", "results", "rows", "target", "train"]
