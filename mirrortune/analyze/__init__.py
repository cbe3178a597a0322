# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints compared, before and after fine-tuning."""

__all__ = ["analyze", "checkpoints", "report"]
