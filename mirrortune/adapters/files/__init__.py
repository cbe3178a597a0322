# SPDX-License-Identifier: Apache-2.0
"""Write, read and check adapter folders: their description and their tensors."""

__all__ = ["adapter_file", "description", "find", "load", "tensors"]
