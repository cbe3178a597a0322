# SPDX-License-Identifier: Apache-2.0
"""Launch and synchronise several processes, and shard a model over them."""

__all__ = ["launch", "processes", "sharding", "sync"]
