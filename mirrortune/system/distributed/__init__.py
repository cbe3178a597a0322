# SPDX-License-Identifier: Apache-2.0
"""Launch, synchronise and shard over several processes."""

__all__ = ["launch", "processes", "sharding", "sync"]
