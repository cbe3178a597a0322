# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: writing, reading and checking their description and tensors."""

__all__ = ["adapter_file", "description", "find", "load", "tensors"]
