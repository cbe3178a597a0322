# SPDX-License-Identifier: Apache-2.0
"""PEFT's tuners as additional methods."""

__all__ = ["files", "options", "single_layer", "tuners"]
