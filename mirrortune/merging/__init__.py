# SPDX-License-Identifier: Apache-2.0
"""Base plus adapter as plain weights, LoRA or GGUF, verified; and pushed to the Hub."""

__all__ = ["bases", "gguf", "lora", "push", "verify", "write"]
