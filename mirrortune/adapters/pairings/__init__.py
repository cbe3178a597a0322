# SPDX-License-Identifier: Apache-2.0
"""Pairings: which singular directions a rotation turns together."""
