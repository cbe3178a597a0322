# SPDX-License-Identifier: Apache-2.0
"""Compare methods: plan, run, test, report."""

__all__ = ["grid", "report"]
