# SPDX-License-Identifier: Apache-2.0
"""Merge adapters into plain weights or export them as LoRA or GGUF, verify the result, and push it to the Hub."""

__all__ = ["bases", "gguf", "lora", "push", "verify", "write"]
