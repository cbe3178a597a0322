# SPDX-License-Identifier: Apache-2.0
"""Define the settings of a run, merge them from layers, and track the origin of each value."""

__all__ = ["data_paths", "foreign_names", "recipe", "schema", "strict_yaml"]
