# SPDX-License-Identifier: Apache-2.0
"""Compare two checkpoints, before and after fine-tuning."""

__all__ = ["analyze", "checkpoints", "report"]
