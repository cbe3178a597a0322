# SPDX-License-Identifier: Apache-2.0
"""Singular spectra and subspaces of two checkpoints."""
