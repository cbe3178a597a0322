# SPDX-License-Identifier: Apache-2.0
"""Trained adapters in use: many of them on one base model."""

__all__ = ["bank"]
