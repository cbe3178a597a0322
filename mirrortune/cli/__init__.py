# SPDX-License-Identifier: Apache-2.0
"""The command-line interface: each command parses, calls one function, and prints."""

__all__ = ["app"]
