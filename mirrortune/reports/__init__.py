# SPDX-License-Identifier: Apache-2.0
"""Figures, pages, tables and model cards."""
