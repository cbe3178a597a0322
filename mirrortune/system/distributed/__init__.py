# SPDX-License-Identifier: Apache-2.0
"""Launch, synchronise and shard over several processes."""
