# SPDX-License-Identifier: Apache-2.0
"""PEFT's tuners as methods beside mirrortune's own."""

__all__ = ["files", "options", "single_layer", "tuners"]
