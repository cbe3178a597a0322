# SPDX-License-Identifier: Apache-2.0
"""Comparisons of methods: plan, run, test, report."""

__all__ = ["grid", "report"]
