# SPDX-License-Identifier: Apache-2.0
"""Pairings: which singular directions rotate in a common plane."""

__all__ = ["encoding", "listed", "matching", "rules"]
