# SPDX-License-Identifier: Apache-2.0
"""Figures, pages, tables and model cards."""

__all__ = ["drawing", "finished_run", "html", "lr_page", "model_card", "run_figures", "run_page", "tables"]
