# SPDX-License-Identifier: Apache-2.0
"""Adapters: their mathematics, the layers they go into, and their files. Knows no task, data or command."""
