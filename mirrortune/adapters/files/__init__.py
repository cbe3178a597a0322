# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: their description, tensors and checks, written and read."""
