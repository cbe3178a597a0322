# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run: its schema, the layers it is merged from, and where each value came from."""

__all__ = ["recipe", "schema", "strict_yaml"]
